#!/usr/bin/env python3
"""The surface that a sparse and a dense autoencoder give back of the same scans, and the bits of each.

    python bench/sparse_vs_dense.py --sparse runs/points --dense runs/vq --data FOLDER [--json OUT]

The dense one reconstructs intensities (HU), of which the surface is then taken with the level and the
smoothing of the sparse run; the sparse one decodes its tokens. Both are compared with the surface of the
scan itself: IoU of the points within the band, surface Dice within a voxel. Bits: of the dense one
log2(codes) a cell of its latent; of the sparse one those of the tokens and of where they are.
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

        tokens = thin.task.encode(thin, true)
        few = compared(thin.task.decode(thin, tokens, true.shape[1:]), true)
        few["bits"] = sparse.bits_of(thin, tokens)
        rows.append({"file": item.known_as, "dense": dense, "sparse": few})
        for name in ("dense", "sparse"):
            found = rows[-1][name]
            print(f"{item.known_as}  {name:6}  IoU {found['iou']:.3f}  surface Dice "
                  f"{found['surface_dice']:.3f}  {found['bits'] / 1000:.1f} kbit", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
