"""Does a perceptual or an adversarial term help? Four runs of train.py, alike in all else, and a table.

    python bench/ablation.py --data FOLDER                          # 300 steps each; 4 x 5 to 10 minutes on
    a CPU core python bench/ablation.py --data FOLDER --steps 2000 --jobs 1 -- --device cuda --amp

What follows `--` goes to every run. Each run is kept under --out; the table is printed as Markdown and,
with --json, written to a file that names machine, versions, date and command. Sharpness is the gradient
energy of the reconstruction over that of the input: 1 is as sharp.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PERCEPTUAL = ["--loss.perceptual_weight", "0.05"]
PATCHGAN = ["--loss.adv_weight", "0.02", "--loss.disc_strides", "1,2,2"]
VARIANTS = {
    "L1": [],
    "L1 + perceptual": PERCEPTUAL,
    "L1 + PatchGAN": PATCHGAN,
    "L1 + both": PERCEPTUAL + PATCHGAN,
}


def run(name: str, flags: list[str], out: Path) -> dict:
    """One training run; its last validation."""
    folder = out / name.replace(" ", "").replace("+", "_")
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: train.py ended with {done.returncode}: {done.stderr.strip()}")
    rows = [json.loads(line) for line in (folder / "log.jsonl").open()]
    last = [row for row in rows if row["split"] == "val"][-1]
    seconds = sorted(row["seconds"] for row in rows if row["split"] == "train")
    return {
        "variant": name,
        "flags": flags,
        **{k: last[k] for k in ("step", "psnr", "ssim", "l1", "sharpness")},
        "median_step_seconds": seconds[len(seconds) // 2],
    }


def main() -> None:
    argv = sys.argv[1:]
    extra = argv[argv.index("--") + 1:] if "--" in argv else []
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of volumes")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run [300]")
    parser.add_argument("--patch", default="16,64,64", help="crop D,H,W [16,64,64]")
    parser.add_argument("--out", default="runs/ablation", help="folder of the runs [runs/ablation]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one CPU thread each [2]")
    parser.add_argument("--json", help="file for the figures")
    own = parser.parse_args(argv[:argv.index("--")] if "--" in argv else argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    common = [
        "--data",
        own.data,
        "--patch",
        own.patch,
        "--batch",
        "2",
        "--steps",
        str(own.steps),
        "--loss.disc_start",
        str(own.steps // 3),
        "--train.val_crops",
        "16",
        *extra,
    ]
    if Path(own.out).exists():
        raise SystemExit(
            f"{own.out}: exists already, and its runs may have had other settings; remove it or name "
            f"another --out"
        )
    with concurrent.futures.ThreadPoolExecutor(own.jobs) as pool:
        rows = list(pool.map(lambda item: run(item[0], common + item[1], Path(own.out)), VARIANTS.items()))
    print(f"| {own.steps} steps, same seed | PSNR (dB) | SSIM | L1 | sharpness |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['variant']} | {row['psnr']:.2f} | {row['ssim']:.3f} "
            f"| {row['l1']:.4f} | {row['sharpness']:.3f} |"
        )
    if own.json:
        facts = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        for row in rows:
            row["flags"] = [flag.replace(own.data, "DATA") for flag in row["flags"]]
        Path(own.json).parent.mkdir(parents=True, exist_ok=True)
        Path(own.json).write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
