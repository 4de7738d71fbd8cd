#!/usr/bin/env python3
"""The surface that a sparse and a dense autoencoder give back of the same scans, and the bits of each.

    python bench/sparse_vs_dense.py --sparse runs/points --dense runs/vq --data FOLDER [--json OUT]

The dense one reconstructs intensities (HU), of which the surface is then taken with the level and the
smoothing of the sparse run; the sparse one decodes its tokens. Both are compared with the surface of the
scan itself: IoU of the points within the band, surface Dice within a voxel. Bits: of the dense one
log2(codes) a cell of its latent; of the sparse one those of the tokens and of where they are, with one of its
residual codebooks, with two and so on. Between these the figures at equal bits, and the bits at equal
surface Dice, are read off straight lines over log(bits).
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks import TASKS, sparse  # noqa: E402
from training.jobs import list_inputs  # noqa: E402
from training.ready import data_config, load  # noqa: E402
from volumes.intensities import denormalise  # noqa: E402
from volumes.loading import load as load_file  # noqa: E402
from volumes.surfaces import surface_points  # noqa: E402


def points(grid: np.ndarray) -> np.ndarray:
    return (grid != 0).any(0)


def compared(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Two grids of distances (C, D, H, W), 0 for no point."""
    a, b = points(found), points(true)
    dice = sparse.surface_dice(torch.from_numpy(found[0]), torch.from_numpy(true[0]))
    return {"iou": float((a & b).sum() / (a | b).sum()), "surface_dice": dice}


def read_off(rows: list[dict[str, float]], known: str, wanted: str, value: float) -> float | None:
    """Of rows by rising bits: `wanted` where `known` has the value; None where no two rows enclose it."""
    def scale(name: str, number: float) -> float:
        return math.log(number) if name == "bits" else number
    at = scale(known, value)
    for low, high in zip(rows, rows[1:]):
        a, b = scale(known, low[known]), scale(known, high[known])
        if min(a, b) <= at <= max(a, b) and a != b:
            share = (at - a) / (b - a)
            found = (1 - share) * scale(wanted, low[wanted]) + share * scale(wanted, high[wanted])
            return math.exp(found) if wanted == "bits" else found
    return None


def tell(row: dict) -> None:
    lines = [("dense", row["dense"])]
    lines += [(f"sparse, {count} of {len(row['sparse'])} codebooks", found)
              for count, found in enumerate(row["sparse"], 1)]
    for name, found in lines:
        print(f"{row['file']}  {name:27} IoU {found['iou']:.3f}  surface Dice {found['surface_dice']:.3f}  "
              f"{found['bits'] / 1000:.1f} kbit", flush=True)
    equal, bits = row["sparse_at_equal_bits"], row["sparse_bits_at_equal_dice"]
    words = [f"{name} {value:.3f}" for name, value in equal.items() if value is not None]
    print(f"{row['file']}  sparse at the dense one's bits: {', '.join(words) or 'beyond its range'}; at its "
          f"surface Dice: {'beyond its range' if bits is None else f'{bits / 1000:.1f} kbit'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("sparse", "dense", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    thin, thick = (load(path, TASKS, (), "cpu") for path in (options.sparse, options.dense))
    cfg_thin, cfg_thick = data_config(thin), data_config(thick)
    surface, rows = cfg_thin.surface_of(), []
    for item in list_inputs([options.data]):
        scan = load_file(item, cfg_thick)
        image, intensity = scan.volumes[0]
        true = surface_points(denormalise(image, intensity), scan.spacing, surface)

        latent = thick.task.encode(thick, image)
        recon = denormalise(thick.task.decode(thick, latent, image.shape[1:]), intensity)
        dense = compared(surface_points(recon, scan.spacing, surface), true)
        dense["bits"] = latent.size * math.log2(thick.model.quantizer.num_codes)

        tokens, every = thin.task.encode(thin, true), []
        for count in range(1, len(tokens) + 1):
            few = compared(thin.task.decode(thin, tokens[:count], true.shape[1:]), true)
            every.append(few | {"bits": sparse.bits_of(thin, tokens[:count])})
        row = {"file": item.known_as, "voxels": true[0].size, "dense": dense, "sparse": every}
        row["sparse_at_equal_bits"] = {name: read_off(every, "bits", name, dense["bits"])
                                       for name in ("iou", "surface_dice")}
        row["sparse_bits_at_equal_dice"] = read_off(every, "surface_dice", "bits", dense["surface_dice"])
        rows.append(row)
        tell(row)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
