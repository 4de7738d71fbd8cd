"""Predicted against measured peak memory on this machine's GPU, a step of 1024^3 among the rows.

    python bench/gpu_memory.py                    # all rows; 10-30 minutes
    python bench/gpu_memory.py --quick            # 64,256,256 only

Every row runs in its own process through memtest.py --one, so an out-of-memory ends that row only. Rows
whose prediction does not leave 10 % of the card's free memory are recorded as predicted, without a
measurement. Result: bench/results/gpu_memory_CARD.json. Exit codes: 0 done and every ratio within 10 %; 1 a
row failed or is further off; 2 no GPU. Version 0.1 (2026-11).
"""
import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import memtest  # noqa: E402
import peaks  # noqa: E402
import vae3d  # noqa: E402

PRESETS = ("ultra_lightweight", "high_res")
SIZES = ("64,256,256", "512,512,512", "1024,1024,1024")
TOLERANCE = 0.1                                                  # of predicted over allocated


def settings(quick: bool):
    """The flags of every row, smallest volumes first."""
    for size in SIZES[:1] if quick else SIZES:
        for preset in PRESETS:
            for amp, mode in [("false", "none"), *(("true", mode) for mode in vae3d.MEMORY_MODES)]:
                yield ["--preset", preset, "--resolution", size, "--amp", amp, "--memory.mode", mode]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest volume only")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "bench/gpu_memory.py: torch sees no GPU here, so nothing was run; predictions need none: "
            "python memtest.py",
            file=sys.stderr,
        )
        return 2
    free = memtest.budget_bytes("card", "cuda", True)
    rows = []
    for flags in settings(options.quick):
        row = memtest.in_process([*flags, "--no-measure"])
        if row.get("predicted_gib") and row["predicted_gib"] * peaks.GIB <= free * (1 - peaks.SPARE):
            row = memtest.in_process([*flags, "--measure"])
        row["ratio"] = row["predicted_gib"] / row["measured_gib"] if row.get("measured_gib") else None
        rows.append({"flags": " ".join(flags), **row})
        shown = ("predicted_gib", "measured_gib", "reserved_gib", "ratio", "step_seconds", "error")
        print(rows[-1]["flags"], {key: row.get(key) for key in shown}, flush=True)
    card = torch.cuda.get_device_name()  # last: from here on this process holds a context on the card too
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu_memory_{card.replace(' ', '_')}.json"
    path.write_text(
        json.dumps(
            {
                "card": card,
                "free_gib": free / peaks.GIB,
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "warnings": peaks.environment_warnings(),
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )
    print(path)
    return (
        0
        if all(
            not row.get("error") and (row["ratio"] is None or abs(row["ratio"] - 1) <= TOLERANCE)
            for row in rows
        )
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
