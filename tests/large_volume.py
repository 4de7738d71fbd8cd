"""Beside the suite, minutes long: a volume of 512x512x160 voxels, made from a real CT, through predict.py
with its peak memory.

    python tests/large_volume.py CT.nii.gz [CHECKPOINT]              # without: an untrained ultra_lightweight

Prints the peak resident memory of the whole process, what of it a smaller depth takes, and the largest
difference between tiles and none on that smaller one.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def run(*command) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")


def main(source: str, checkpoint: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = nib.load(source)
        voxels = np.asarray(image.dataobj).astype(np.int16)                              # HU
        missing = [(0, max(0, 512 - n)) for n in voxels.shape[:2]] + [(0, 0)]
        voxels = np.pad(voxels, missing, mode="edge")[:512, :512]
        slices = np.concatenate([voxels, voxels[..., ::-1]], -1)  # there and back: no jump between the copies
        if checkpoint is None:
            run(ROOT / "train.py", "--steps", 1, "--data.synthetic_count", 2, "--train.val_crops", 1,
                "--device", "cpu",
                "--out", folder / "run")
            checkpoint = folder / "run"
        for depth in (32, 160):
            tall = np.take(slices, np.arange(depth) % slices.shape[-1], axis=-1)
            nib.save(nib.Nifti1Image(tall, image.affine), folder / f"depth{depth}.nii.gz")
            for tile in ("64,64,64", "none") if depth == 32 else ("64,64,64",):
                out = folder / f"{depth}-{tile}"
                path = folder / f"depth{depth}.nii.gz"
                common = ["--checkpoint", checkpoint, "--tile", tile, "--device", "cpu"]
                run(ROOT / "predict.py", "reconstruct", "--input", path, "--output", out, *common)
                run(ROOT / "predict.py", "evaluate", "--data", path, "--json", folder / "result.json",
                    *common)
                result = json.loads((folder / "result.json").read_text())
                written = nib.load(out / f"depth{depth}.nii.gz")
                assert written.shape == tall.shape and written.get_data_dtype() == tall.dtype
                assert np.allclose(written.affine, image.affine)
                psnr, speed = result["mean"]["psnr"], result["voxels_per_second"]
                print(f"512x512x{depth}, tile {tile}: peak {result['peak_gib']:.2f} GiB, "
                      f"{speed / 1e3:.0f} k voxels/s, PSNR {psnr:.2f} dB", flush=True)
        paths = [folder / f"32-{tile}" / "depth32.nii.gz" for tile in ("64,64,64", "none")]
        a, b = (np.asarray(nib.load(path).dataobj).astype(float) for path in paths)
        print(f"512x512x32: tiles and none differ by at most {np.abs(a - b).max():.4g} HU")


if __name__ == "__main__":
    main(*sys.argv[1:])
