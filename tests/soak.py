"""Beside the suite, minutes long: kills and signals at random moments, after which the run must go on and end as if nothing had been.

    python tests/soak.py                                             # 200 of them
    python tests/soak.py --kills 6 --steps 9 --commands 0            # the suite's short version

A start costs seconds, most of them torch's import, so nearly all are forks of this process, which has imported train.py and done nothing
else; one in `--commands` goes through the real command line. Kinds: SIGKILL at a random moment, SIGKILL while a temporary file is being
written, SIGKILL and a flipped bit in last.pt, SIGTERM, SIGINT and SIGUSR1, the same to the whole process group (workers too), and two
signals in a row, where the forks count a second one from 0 seconds on instead of 1. Every fresh run starts a new folder; every second one
has two DataLoader workers. At the end of each, all files but last.prev.pt must be those of the undisturbed run, to the byte, and the rows
of log.jsonl equal, but for the times.
"""
import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
import training.flags
import training.signals
from tasks import TASKS  # noqa: E402

FLAGS = ("--vae.base_channels 4 --vae.bottleneck vq --vae.num_codes 16 --data.synthetic_count 4 --data.synthetic_size 8,16,16 "
         "--patch 4,8,8 --data.crops_per_volume 3 --train.val_crops 2 --train.latent_crops 2 --device cpu --batch 1 --train.save_every 1 "
         "--train.keep 3 --train.val_every 3 --train.ema 0.9,0.99 --log.sample_every 5 --log.samples 1 --optim.schedule plateau "
         "--optim.plateau_patience 2").split()
TIMES = ("seconds", "voxels_per_second", "peak_gib")
KINDS = ("kill", "kill", "kill while writing", "kill while writing", "kill and bit flip", "SIGTERM", "SIGINT", "SIGUSR1", "group SIGINT",
         "group SIGTERM", "second signal", "second signal")
STARTED = "; run folder "                                        # the line that train.py prints before its loop


def start(arguments: list[str], output: Path, command: bool) -> int:
    """train.py in a process group of its own, as a fork of this one or as a command; returns its process id."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, training.signals.SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        for number in training.signals.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if command:
            os.execv(sys.executable, [sys.executable, str(Path(train.__file__)), *arguments])
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        training.signals.SECOND_SIGNAL = 0.0
        code = train.main(arguments)
        sys.stdout.flush()
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def finished(pid: int, seconds: float) -> int | None:
    """The exit code when the process ends within `seconds`; below 0: by a signal."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.0005)


def wait_until(pid: int, seconds: float, happened) -> int | None:
    """As `finished`, and None as soon as happened()."""
    until, code = time.monotonic() + seconds, None
    while code is None and not happened() and time.monotonic() < until:
        code = finished(pid, 0)
    return code


def being_written(out: Path) -> bool:
    names = [name for folder in (out, out / "samples") if folder.is_dir() for name in os.listdir(folder)]
    return any(name.endswith((".tmp", "last.next.pt")) for name in names)


def disturb(pid: int, kind: str, out: Path, output: Path, rng: random.Random, slow: float) -> int | None:
    """Let it go on for a random time and end it as `kind` says; returns its exit code, None when it ended by itself before."""
    code = None
    if rng.random() < 0.8 or "writing" in kind:                  # the others hit imports, data and first state too
        code = wait_until(pid, 60, lambda: STARTED in output.read_text())
    code = finished(pid, rng.uniform(0, 0.7 * slow)) if code is None else code
    if "writing" in kind and code is None:
        code = wait_until(pid, 60, lambda: being_written(out))
        code = finished(pid, rng.uniform(0, 0.002)) if code is None else code
    if code is not None:
        if code:
            raise SystemExit(f"soak: left alone it ended with {code}: {output.read_text()[-2000:]}")
        return None
    if kind.startswith("kill"):
        os.killpg(pid, signal.SIGKILL) if rng.random() < 0.5 else os.kill(pid, signal.SIGKILL)
        allowed = {0, -signal.SIGKILL}
    else:
        first, second = rng.choices(list(training.signals.SIGNALS), k=2)
        if kind.startswith("second"):
            os.kill(pid, first)
            time.sleep(rng.uniform(0, 0.03))
            with_second = finished(pid, 0)
            if with_second is None:
                os.kill(pid, second)
            code, sent = with_second, (first, second)
        else:
            number = signal.Signals[kind.split()[-1]]
            (os.killpg if kind.startswith("group") else os.kill)(pid, number)
            sent = (number,)
        allowed = {0} | {training.signals.SIGNALS[n] for n in sent} | {-n for n in sent}  # by the signal itself: before main or after it
    code = finished(pid, 60) if code is None else code
    text = output.read_text()
    # the workers of a killed process tell how they lost it, which nobody can help
    if code not in allowed or code != -signal.SIGKILL and ("Traceback" in text or "rror:" in text):
        raise SystemExit(f"soak: after {kind} it ended with {code}: {text[-2000:]}")
    return code or None                                          # 0: it came too late


def files_of(out: Path) -> dict[str, bytes]:
    """All that a run leaves and that must be equal between two of them."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    found.pop("last.prev.pt", None)
    found["config.yaml"] = found["config.yaml"].replace(str(out).encode(), b"OUT")
    rows = [json.loads(line) for line in found["log.jsonl"].decode().splitlines()]
    found["log.jsonl"] = json.dumps([{k: v for k, v in row.items() if k not in TIMES} for row in rows]).encode()
    return found


def flip_a_bit(path: Path, rng: random.Random) -> None:
    """In the middle half, where the weights and moments lie."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content) // 4, 3 * len(content) // 4)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--commands", type=int, default=10)      # every so many starts is a real command; 0: none
    options = parser.parse_args()
    training.flags.build_parser(TASKS)                                         # 0.4 s of reading sources, kept for the forks
    rng, began, starts, runs = random.Random(options.seed), time.monotonic(), 0, 0
    counts, codes = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name), {}
        while sum(counts.values()) < options.kills:
            runs, workers, out, done, had_state = runs + 1, 2 * (runs % 2), folder / f"run{runs}", False, False
            flags = [*FLAGS, "--steps", str(options.steps), "--data.workers", str(workers)]
            if workers not in whole:
                pid = start([*flags, "--out", str(folder / f"whole{workers}")], folder / "output", False)
                if finished(pid, 600) != 0:
                    raise SystemExit(f"soak: the undisturbed run failed: {(folder / 'output').read_text()[-2000:]}")
                whole[workers] = files_of(folder / f"whole{workers}")
            while not done:
                starts += 1
                output = folder / f"output{starts % 100}"        # of its own: workers of a killed process may still write into theirs
                output.unlink(missing_ok=True)
                output.write_text("")
                last = sum(counts.values()) >= options.kills     # enough: to the end now
                resume = (out / "last.pt").exists()
                if had_state and not resume:
                    raise SystemExit(f"soak: {out} lost its last.pt")
                had_state = resume
                arguments = ["--resume", str(out)] if resume else [*flags, "--out", str(out)]
                command = bool(options.commands) and starts % options.commands == 0
                kind = rng.choice(KINDS)
                kind = "SIGTERM" if kind == "second signal" and command else kind
                pid = start(arguments, output, command)
                if last:
                    code = finished(pid, 600)
                    if code:
                        raise SystemExit(f"soak: the last resume ended with {code}: {output.read_text()[-2000:]}")
                else:
                    code = disturb(pid, kind, out, output, rng, 4.0 if command and rng.random() < 0.3 else 1.0)
                    if code is not None:
                        counts[kind + " (command)" * command] += 1
                        codes[code] += 1
                    if kind == "kill and bit flip" and code and (out / "last.prev.pt").exists():
                        flip_a_bit(out / "last.pt", rng)
                done = code in (None, 0)
            found = files_of(out)
            wrong = sorted(path for path in found.keys() | whole[workers].keys() if found.get(path) != whole[workers].get(path))
            print(f"run {runs}: {sum(counts.values())} ends, {starts} starts, {time.monotonic() - began:.0f} s", flush=True)
            if wrong:
                os.rename(folder, folder.with_name(folder.name + "-kept"))
                raise SystemExit(f"soak: run {runs} differs from the undisturbed one in {wrong}; kept in {folder}-kept")
    print(f"{sum(counts.values())} ends in {runs} runs, {starts} starts, all resumed and equal to the undisturbed run; "
          f"{time.monotonic() - began:.0f} s")
    print("by kind: " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    print("exit codes: " + ", ".join(f"{code}: {count}" for code, count in sorted(codes.items())))


if __name__ == "__main__":
    main()
