"""The README's picture: a whole CT, its reconstruction and the error, in slices.

    python train.py --preset thick --data DATA --data.split_seed 3 --patch 8,128,128 --steps 1100 \
        --out runs/picture
    python bench/picture.py --checkpoint runs/picture --input DATA/abdomen_5mm_slab.nii.gz --png docs/ct.png

The volume goes through predict.py whole. Columns: input and reconstruction in a window of HU, then the
error: black where there is none, red at half of --error, yellow at --error. The slices are those with most
tissue. It prints PSNR over the whole volume, of HU clipped to [-1000, 1000].
"""
from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pictures  # noqa: E402
import predict  # noqa: E402


def read(path: Path) -> tuple[torch.Tensor, list[float]]:
    """HU (D, H, W) along RAS axes, and the spacing in mm along D, H, W."""
    image = nib.as_closest_canonical(nib.load(path))
    spacing = [float(mm) for mm in image.header.get_zooms()[:3]]
    return torch.from_numpy(image.get_fdata().astype("float32").T.copy()), spacing[::-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="run folder or .pt file")
    parser.add_argument("--input", type=Path, required=True, help="a CT")
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--window", default="-200,300", help="HU that are black and white [-200,300]")
    parser.add_argument("--error", type=float, default=200, help="HU that are yellow [200]")
    options = parser.parse_args()
    low, high = (float(hu) for hu in options.window.split(","))

    with tempfile.TemporaryDirectory() as folder:
        code = predict.main(["reconstruct", "--checkpoint", options.checkpoint, "--input", str(options.input),
                             "--output", folder, "--data.modality", "ct"])
        written = sorted(Path(folder).rglob("*.nii*"))
        if code or not written:
            print(f"picture: {options.input} was not reconstructed")
            return 1
        y, _ = read(written[0])
    x, spacing = read(options.input)

    # The figure is of all that the network was given, the window is for the eye alone.
    x, y = x.clamp(-1000, 1000), y.clamp(-1000, 1000)            # below air is the scanner's padding
    mse = (x - y).square().mean().item()
    print(f"{options.input.name}: {10 * math.log10(2000 ** 2 / mse):.2f} dB over {tuple(x.shape)} voxels")
    weight = (x > -300).float()
    seen = [2 * (v - low) / (high - low) - 1 for v in (x, y)]
    far = [v / (2 * options.error) for v in (x, y)]              # pictures.error is yellow at 0.5
    columns = [
        pictures.slices([seen[0]], weight, spacing, pictures.grey),
        pictures.slices([seen[1]], weight, spacing, pictures.grey),
        pictures.slices(far, weight, spacing, pictures.error),
    ]
    options.png.write_bytes(pictures.png(pictures.sheet(columns)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
