"""Does one learning rate stand for every preset? Short runs of presets x rates x seeds, and a table.

    python bench/stability.py --data FOLDER --json bench/results/stability_cpu.json
    python bench/stability.py --data FOLDER --presets fast,sharp2 --seeds 1 --steps 40 --optimizers muon

Each run is training.step.train_step with all that it does, on 2 crops of 16,48,48, with the schedule of a run
of that length. `end` is the mean L1 of the last tenth of the steps, `peak` the largest loss over the first.
First bar: within a preset no rate and seed ends above 1.3 times the best of that preset. Second: runs of 12,
25 and 150 steps at 5e-4 and 2e-3 never exceed 1.5 times their first loss. Those have the same two crops in
every step: of new ones, some are air, of which an untrained network's loss is seven times that of tissue.
sharp2 is `sharp` with 2 blocks a level, wide is it with base 96: both died under AdamW.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import data  # noqa: E402
import training.order  # noqa: E402
import vae3d  # noqa: E402
from tasks import TASKS  # noqa: E402
from training.flags import load_config  # noqa: E402
from training.memory import begin  # noqa: E402
from training.step import train_step  # noqa: E402
from training.task import of  # noqa: E402

CASES = {name: {"preset": name} for name in vae3d.PRESETS}
CASES["sharp2"] = {"preset": "sharp", "vae.num_res_blocks": "2"}
CASES["wide"] = {"preset": "sharp", "vae.base_channels": "96"}
RATES = (5e-4, 1e-3, 2e-3)
SHORT, SHORT_RATES = (12, 25), (5e-4, 2e-3)
SPREAD, RISE = 1.3, 1.5                           # the two bars


def run(case: str, optimizer: str, rate: float, seed: int, steps: int, fixed: bool,
        own: argparse.Namespace) -> dict:
    """One run; a dead one ends with a number that is not finite, or high. fixed: the same crops always."""
    flags = {"data": own.data, "patch": own.patch, "batch": "2", "seed": str(seed), "optim.lr": str(rate),
             "optim.optimizer": optimizer, "device": own.device, **CASES[case]}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)] + own.flags
    cfg = load_config(words, TASKS)
    # One split for all seeds, which are of weights, crops and noise.
    dataset = data.open_data(cfg.data, 0, lambda line: None)
    device = torch.device(own.device)
    state, crops = begin(cfg, of(TASKS, cfg), device), data.Crops(dataset, seed)
    started, losses, l1 = time.monotonic(), [], []
    first = None
    for step, micro in training.order.step_batches(cfg, crops, range(steps), device, cfg.train.batch):
        if fixed:
            first = first or micro
            micro = first
        for group in state.optimizer.param_groups:
            group["lr"] = training.order.learning_rate(cfg.optim, step, steps)
        terms = train_step(cfg, state, micro).terms
        state.step = step + 1
        losses.append(float(terms["loss"]))
        l1.append(float(terms["l1"]))
    last = l1[-max(1, steps // 10):]
    return {
        "case": case, "optimizer": optimizer, "lr": rate, "seed": seed, "steps": steps, "fixed": fixed,
        "end": round(sum(last) / len(last), 5), "peak": round(max(losses) / losses[0], 3),
        "seconds": round(time.monotonic() - started, 1),
    }


def judged(rows: list[dict], steps: int) -> list[dict]:
    """A row for each case and optimizer: its best end, the worst end over it, the highest peak."""
    verdicts = []
    for case, optimizer in dict.fromkeys((row["case"], row["optimizer"]) for row in rows):
        own = [row for row in rows if (row["case"], row["optimizer"]) == (case, optimizer)]
        long = [row["end"] for row in own if not row["fixed"]]
        if not long:
            continue
        # `not x <= bar` instead of `x > bar`, so that NaN counts as above.
        peaks = [row["peak"] for row in own if row["fixed"]]
        worst = max(long, key=lambda end: end if end == end else float("inf"))
        verdicts.append({
            "case": case, "optimizer": optimizer, "runs": len(own), "best": min(long),
            "spread": round(worst / min(long), 3), "peak": max(peaks, default=None),
            "dies": sum(not end <= SPREAD * min(long) for end in long),
            "rises": sum(not peak <= RISE for peak in peaks),
        })
    return verdicts


def print_table(rows: list[dict], steps: int) -> None:
    print(f"\n| network | optimizer | L1 after {steps} steps at {', '.join(f'{r:g}' for r in RATES)} "
          "(mean of seeds) | worst / best | highest loss / first | runs above the bars |")
    print("|---|---|---|---|---|---|")
    for verdict in judged(rows, steps):
        cells = []
        for rate in RATES:
            ends = [row["end"] for row in rows if row["lr"] == rate and not row["fixed"]
                    and (row["case"], row["optimizer"]) == (verdict["case"], verdict["optimizer"])]
            cells.append(f"{sum(ends) / len(ends):.4f}" if ends else "-")
        print(f"| {verdict['case']} | {verdict['optimizer']} | {' / '.join(cells)} | "
              f"{verdict['spread']:.2f} | {verdict['peak']} | {verdict['dies']} + {verdict['rises']} |")


def main() -> None:
    argv = sys.argv[1:]
    extra = argv[argv.index("--") + 1:] if "--" in argv else []
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of volumes")
    parser.add_argument("--presets", default=",".join(CASES), help=f"[{','.join(CASES)}]")
    parser.add_argument("--optimizers", default="muon,adamw", help="in turn [muon,adamw]")
    parser.add_argument("--seeds", type=int, default=3, help="how many [3]")
    parser.add_argument("--steps", type=int, default=150, help="of the long runs [150]")
    parser.add_argument("--patch", default="16,48,48", help="crop D,H,W [16,48,48]")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    parser.add_argument("--json", help="file for the figures, written after each run")
    own = parser.parse_args(argv[:argv.index("--")] if "--" in argv else argv)
    own.flags = extra
    cases, optimizers = own.presets.split(","), own.optimizers.split(",")
    unknown = sorted(set(cases) - set(CASES))
    if unknown:
        parser.error(f"--presets {unknown[0]}: not among {', '.join(CASES)}")

    # The runs by seed, so that a bench that is cut short has a bit of all; with fixed crops of one seed.
    rows: list[dict] = []
    for seed in range(own.seeds):
        plan = [(case, name, rate, seed, own.steps, False) for case in cases for name in optimizers
                for rate in RATES]
        if seed == 0:
            plan += [(case, name, rate, seed, steps, True) for case in cases for name in optimizers
                     for rate in SHORT_RATES for steps in (*SHORT, own.steps)]
        for settings in plan:
            rows.append(run(*settings, own))
            print(json.dumps(rows[-1]), flush=True)
            write(own, rows)
    print_table(rows, own.steps)


def write(own: argparse.Namespace, rows: list[dict]) -> None:
    if not own.json:
        return
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "data": Path(own.data).name,
        "patch": own.patch,
        "flags": own.flags,
    }
    path = Path(own.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts, "verdicts": judged(rows, own.steps), "rows": rows}, indent=1)
    path.write_text(text.replace("NaN", "null") + "\n")


if __name__ == "__main__":
    main()
