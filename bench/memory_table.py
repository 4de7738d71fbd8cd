"""The table of docs/MEMORY.md: the predicted peak of a training step, as Markdown. Needs no card.

    python bench/memory_table.py                                  # all of it, some 2 minutes on one core
    python bench/memory_table.py --presets fast --sizes 64,256,256

Each step is that of `train.py --preset P --patch D,H,W --batch 1`, one channel, with the optimizer that the
preset has by default. Tiles of `auto` are those of a machine without a card: the least memory at 1.4 times
the time of a checkpointed step (training/plan.py). Sizes are D,H,W, memory is in GiB. Version 0.1 (2026-11).
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peaks  # noqa: E402
from tasks import TASKS  # noqa: E402
from training import fit  # noqa: E402
from training.config import TrainConfig  # noqa: E402
from training.flags import load_config  # noqa: E402
from training.plan import settled_config, tile_text  # noqa: E402
from training.task import of  # noqa: E402

PRESETS = "ultra_lightweight,high_res,fast,sharp"
SIZES = "64,256,256;512,512,512;1024,1024,1024"
# What a row is called, and the flags of it.
SETTINGS = {
    "fp32": [],
    "AMP": ["--amp"],
    "AMP, checkpoint": ["--amp", "--memory.mode", "checkpoint"],
    "AMP, tile auto": ["--amp", "--memory.mode", "tile"],
    "AMP, tile 64,64,64": ["--amp", "--memory.mode", "tile", "--memory.tile", "64,64,64"],
}


def cell(cfg: TrainConfig, is_auto: bool) -> str:
    """The predicted peak, with the tile where it was chosen. `fails`: a tensor is beyond 2^31 elements."""
    task = of(TASKS, cfg)
    chosen, _ = settled_config(cfg, task, "cuda")
    peak = fit.predicted(chosen, task, "cuda")
    gib = peak.bytes / peaks.GIB
    text = f"{gib:.2f}" if gib < 10 else f"{gib:.1f}"
    if gib >= 100:
        text = f"{gib:,.0f}"
    if peaks.is_too_large(peak, "cuda"):
        return f"({text}, fails)"
    return f"{text} ({tile_text(chosen.memory.tile)})" if is_auto else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default=PRESETS, help=f"[{PRESETS}]")
    parser.add_argument("--sizes", default=SIZES, help=f"D,H,W;D,H,W [{SIZES}]")
    options = parser.parse_args()
    sizes = options.sizes.split(";")
    print(f"| preset | setting | {' | '.join(sizes)} |")
    print("|---|---|" + "---|" * len(sizes))
    optimizers = set()
    for preset in options.presets.split(","):
        for name, flags in SETTINGS.items():
            cells = []
            for size in sizes:
                cfg = load_config(["--preset", preset, "--patch", size, "--batch", "1", *flags], TASKS)
                optimizers.add(cfg.optim.optimizer)
                cells.append(cell(cfg, name.endswith("auto")))
            print(f"| `{preset}` | {name} | {' | '.join(cells)} |", flush=True)
    print(f"\noptimizer: {', '.join(sorted(optimizers))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
