"""Beside the suite, minutes long: kills and signals at random moments, after which the run must go on and end
as if nothing had been.

    python tests/soak.py                                             # 200 of them
    python tests/soak.py --kills 6 --steps 9 --commands 0            # the suite's short version

A start costs seconds, most of them torch's import, so nearly all are forks of this process, which has
imported train.py and done nothing else; one in `--commands` goes through the real command line. Kinds:
SIGKILL at a random moment, SIGKILL while a temporary file is being written, SIGKILL and a flipped bit in
last.pt, SIGTERM, SIGINT and SIGUSR1, the same to the whole process group (workers too), and two signals in a
row, where the forks count a second one from 0 seconds on instead of 1. Every fresh run starts a new folder;
every second one has two DataLoader workers. At the end of each, all files but last.prev.pt must be those of
the undisturbed run, to the byte, and the rows of log.jsonl equal, but for the times.
"""
from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from tasks import TASKS  # noqa: E402
from training import flags, signals  # noqa: E402
from training.signals import SIGNALS  # noqa: E402

FLAGS = """
    --vae.base_channels 4 --vae.bottleneck vq --vae.num_codes 16
    --data.synthetic_count 4 --data.synthetic_size 8,16,16 --patch 4,8,8 --data.crops_per_volume 3
    --train.val_crops 2 --train.latent_crops 2 --device cpu --batch 1
    --train.save_every 1 --train.keep 3 --train.val_every 3 --train.ema 0.9,0.99
    --log.sample_every 5 --log.samples 1 --optim.schedule plateau --optim.plateau_patience 2
""".split()
TIMES = ("seconds", "voxels_per_second", "peak_gib")
KINDS = ("kill", "kill", "kill while writing", "kill while writing", "kill and bit flip", "SIGTERM", "SIGINT",
         "SIGUSR1", "group SIGINT", "group SIGTERM", "second signal", "second signal")
STARTED = "; run folder "                                        # in the line that comes before the loop


# -------------------------------------------------------------------------------------- one process of ours

def start(arguments: list[str], output: Path, command: bool) -> int:
    """train.py in a process group of its own, as a fork of this one or as a command; returns its process
    id.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
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
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if command:
            os.execv(sys.executable, [sys.executable, str(Path(train.__file__)), *arguments])
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        signals.SECOND_SIGNAL = 0.0
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


def wait_until(pid: int, seconds: float, happened: Callable[[], bool]) -> int | None:
    """As `finished`, and None as soon as happened()."""
    until, code = time.monotonic() + seconds, None
    while code is None and not happened() and time.monotonic() < until:
        code = finished(pid, 0)
    return code


def end_of(output: Path) -> str:
    return output.read_text()[-2000:]


# ------------------------------------------------------------------------------------- what is done to it

def being_written(out: Path) -> bool:
    names = [name for folder in (out, out / "samples") if folder.is_dir() for name in os.listdir(folder)]
    return any(name.endswith((".tmp", "last.next.pt")) for name in names)


def let_go_on(pid: int, kind: str, out: Path, output: Path, rng: random.Random, slow: float) -> int | None:
    """For a random time, to the moment that `kind` asks for; its exit code where it ended by itself."""
    code = None
    # Four of five are hit in the loop, the others in imports, data and first state too.
    if rng.random() < 0.8 or "writing" in kind:
        code = wait_until(pid, 60, lambda: STARTED in output.read_text())
    if code is None:
        code = finished(pid, rng.uniform(0, 0.7 * slow))
    if code is None and "writing" in kind:
        code = wait_until(pid, 60, lambda: being_written(out))
        if code is None:
            code = finished(pid, rng.uniform(0, 0.002))
    return code


def send(pid: int, kind: str, rng: random.Random) -> tuple[tuple[int, ...], int | None]:
    """The signals of `kind` -> those that were sent, and its exit code where it ended between two of them."""
    if kind.startswith("second"):
        first, second = rng.choices(list(SIGNALS), k=2)
        os.kill(pid, first)
        time.sleep(rng.uniform(0, 0.03))
        code = finished(pid, 0)
        if code is None:
            os.kill(pid, second)
        return (first, second), code
    number = signal.Signals[kind.split()[-1]]
    if kind.startswith("group"):
        os.killpg(pid, number)
    else:
        os.kill(pid, number)
    return (number,), None


def disturb(pid: int, kind: str, out: Path, output: Path, rng: random.Random, slow: float) -> int | None:
    """Let it go on for a random time and end it as `kind` says; returns its exit code, None when it ended by
    itself before.
    """
    code = let_go_on(pid, kind, out, output, rng, slow)
    if code is not None:
        if code:
            raise SystemExit(f"soak: left alone it ended with {code}: {end_of(output)}")
        return None

    # An exit code below 0: by the signal itself, before main or after it.
    if kind.startswith("kill"):
        if rng.random() < 0.5:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
        allowed = {0, -signal.SIGKILL}
    else:
        sent, code = send(pid, kind, rng)
        allowed = {0} | {SIGNALS[number] for number in sent} | {-number for number in sent}
    if code is None:
        code = finished(pid, 60)

    # The workers of a killed process tell how they lost it, which nobody can help.
    text = output.read_text()
    complains = code != -signal.SIGKILL and ("Traceback" in text or "rror:" in text)
    if code not in allowed or complains:
        raise SystemExit(f"soak: after {kind} it ended with {code}: {end_of(output)}")
    return code or None                                          # 0: it came too late


def flip_a_bit(path: Path, rng: random.Random) -> None:
    """In the middle half, where the weights and moments lie."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content) // 4, 3 * len(content) // 4)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def files_of(out: Path) -> dict[str, bytes]:
    """All that a run leaves and that must be equal between two of them."""
    paths = [path for path in sorted(out.rglob("*")) if path.is_file()]
    found = {str(path.relative_to(out)): path.read_bytes() for path in paths}
    # Which processes there were, and when a page was written, differ.
    for name in ("last.prev.pt", "commands.jsonl", "report.html"):
        found.pop(name, None)
    found["config.yaml"] = found["config.yaml"].replace(str(out).encode(), b"OUT")
    rows = [json.loads(line) for line in found["log.jsonl"].decode().splitlines()]
    timeless = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    found["log.jsonl"] = json.dumps(timeless).encode()
    return found


# ------------------------------------------------------------------------------------------------- the soak

def undisturbed(words: list[str], out: Path, output: Path) -> dict[str, bytes]:
    pid = start([*words, "--out", str(out)], output, False)
    if finished(pid, 600) != 0:
        raise SystemExit(f"soak: the undisturbed run failed: {end_of(output)}")
    return files_of(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    # Every so many starts is a real command; 0: none.
    parser.add_argument("--commands", type=int, default=10)
    options = parser.parse_args()
    flags.build_parser(TASKS)                                    # 0.4 s of reading sources, for all forks
    rng, began, starts, runs = random.Random(options.seed), time.monotonic(), 0, 0
    counts, codes = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name), {}
        while counts.total() < options.kills:
            # First what this run must become: that of the same flags, left alone.
            runs += 1
            workers, out, done, had_state = 2 * (runs % 2), folder / f"run{runs}", False, False
            words = [*FLAGS, "--steps", str(options.steps), "--data.workers", str(workers)]
            if workers not in whole:
                whole[workers] = undisturbed(words, folder / f"whole{workers}", folder / "output")

            # Then start it and end it again and again, until it gets to its end.
            while not done:
                starts += 1
                output = folder / f"output{starts % 100}"        # a killed one's workers may still write
                output.unlink(missing_ok=True)
                output.write_text("")
                resume = (out / "last.pt").exists()
                if had_state and not resume:
                    raise SystemExit(f"soak: {out} lost its last.pt")
                had_state = resume
                arguments = [*words, "--out", str(out)]
                if resume:
                    arguments = ["--resume", str(out)]
                command = bool(options.commands) and starts % options.commands == 0
                kind = rng.choice(KINDS)
                if kind == "second signal" and command:
                    kind = "SIGTERM"
                pid = start(arguments, output, command)
                if counts.total() >= options.kills:              # enough: to the end now
                    code = finished(pid, 600)
                    if code:
                        raise SystemExit(f"soak: the last resume ended with {code}: {end_of(output)}")
                else:
                    slow = 4.0 if command and rng.random() < 0.3 else 1.0
                    code = disturb(pid, kind, out, output, rng, slow)
                    if code is not None:
                        counts[f"{kind} (command)" if command else kind] += 1
                        codes[code] += 1
                    if kind == "kill and bit flip" and code and (out / "last.prev.pt").exists():
                        flip_a_bit(out / "last.pt", rng)
                done = code in (None, 0)

            # Then compare.
            found, wanted = files_of(out), whole[workers]
            every = found.keys() | wanted.keys()
            wrong = sorted(path for path in every if found.get(path) != wanted.get(path))
            seconds = time.monotonic() - began
            print(f"run {runs}: {counts.total()} ends, {starts} starts, {seconds:.0f} s", flush=True)
            if wrong:
                kept = folder.with_name(f"{folder.name}-kept")
                os.rename(folder, kept)
                raise SystemExit(f"soak: run {runs} differs from the undisturbed one in {wrong}; "
                                 f"kept in {kept}")
    print(f"{counts.total()} ends in {runs} runs, {starts} starts, "
          f"all resumed and equal to the undisturbed run; {time.monotonic() - began:.0f} s")
    print("by kind: " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    print("exit codes: " + ", ".join(f"{code}: {count}" for code, count in sorted(codes.items())))


if __name__ == "__main__":
    main()
