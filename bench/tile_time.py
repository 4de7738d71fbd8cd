"""Time of a tiled training step over a checkpointed one, in pairs, with the live memory of both. Runs on the
CPU; ends in a few minutes.

    python bench/tile_time.py --size 96,96,96 --json bench/results/tile_time_cpu.json

Rows: what `auto` picks for half of the checkpointed peak, then cubic tiles on one and on two levels. The
ratio is the median over pairs of runs that follow each other, so that a machine whose speed drifts does not
matter.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402

import peaks  # noqa: E402
import training.config  # noqa: E402
import training.plan  # noqa: E402
import vae3d  # noqa: E402
from tasks import TASKS  # noqa: E402
from training.fit import make_step  # noqa: E402
from training.flags import load_config  # noqa: E402
from training.task import of  # noqa: E402


def config(preset: str, size: str, memory: list[str]) -> training.config.TrainConfig:
    return load_config(
        ["--preset", preset, "--patch", size, "--batch", "1", "--device", "cpu", *memory], TASKS
    )


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="high_res")
    parser.add_argument("--size", default="96,96,96", help="D,H,W of the volume")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", help="write the rows")
    options = parser.parse_args()
    base = config(options.preset, options.size, ["--memory.mode", "checkpoint"])
    base_step, cpu = make_step(base, of(TASKS, base), "cpu"), torch.device("cpu")
    peak = peaks.predict(lambda d: make_step(base, of(TASKS, base), d), cpu).bytes / peaks.GIB
    base_step()                                                  # warm-up
    rows = [{"setting": "checkpoint", "predicted_gib": peak, "ratio": 1.0}]
    settings = [("auto for half of it", ["--memory.budget", str(peak / 2)])]
    settings += [
        (
            f"tile {n}, {levels} level{'s' * (levels > 1)}",
            ["--memory.tile", f"{n},{n},{n}", "--memory.stretch", str(levels)],
        )
        for levels in (1, 2)
        for n in (48, 64)
    ]
    for name, memory in settings:
        cfg = config(options.preset, options.size, ["--memory.mode", "tile", *memory])
        step = make_step(cfg, of(TASKS, cfg), "cpu")
        step()
        pairs = [(seconds(base_step), seconds(step)) for _ in range(options.pairs)]
        plan = training.plan.set_dial(vae3d.VAE3D(cfg.vae), cfg.memory).tiling().plan(
            cfg.data.patch, 1, torch.float32
        )
        rows.append(
            {
                "setting": name,
                "tile": plan.tile,
                "stretch": plan.stretch,
                "estimated_ratio": plan.work,
                "predicted_gib": peaks.predict(
                    lambda d, cfg=cfg: make_step(cfg, of(TASKS, cfg), d), cpu
                ).bytes
                / peaks.GIB,
                "ratio": statistics.median(b / a for a, b in pairs),
                "pairs": pairs,
            }
        )
    for row in rows:
        print(
            f"{row['setting']:22} {row['predicted_gib']:6.3f} GiB  ratio {row['ratio']:.2f}"
            + (
                f"  (tile {','.join(map(str, row['tile']))}, stretch {row['stretch']})"
                if "tile" in row
                else ""
            )
        )
    if options.json:
        machine = {
            "cpu": torch.cpu.get_capabilities().get("cpu_name"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "preset": options.preset,
            "size": options.size,
        }
        Path(options.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
