"""Volumes and labels on another grid of voxels over the same field of view.

Arrays are (C, D, H, W): C channels, D H W depth height width. Affines are (4, 4), X, Y, Z -> mm. Version 1.1.
"""
import numpy as np
import torch
import torch.nn.functional as F


def resample(array: np.ndarray, affine: np.ndarray,
             size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(C, D, H, W) and its affine -> (C, *size) over the same field of view and the affine of the new grid.

    Linear, with a wider kernel where an axis shrinks so that nothing aliases. The outer faces of the volume
    stay where they are.
    """
    old = array.shape[1:]
    x = torch.from_numpy(array)
    # First slice by slice, then along D.
    if tuple(size[1:]) != old[1:]:
        x = F.interpolate(x, size=tuple(size[1:]), mode="bilinear", antialias=True)        # (C, D, H', W')
    if size[0] != old[0]:
        x = x.reshape(len(array), 1, old[0], -1)                                           # (C, 1, D, H'W')
        x = F.interpolate(x, size=(size[0], x.shape[-1]), mode="bilinear", antialias=True)
    # A new voxel is `ratio` old ones wide (x, y, z). The first one's centre lies half of it from the common
    # face.
    ratio = np.array([old[axis] / size[axis] for axis in (2, 1, 0)])
    to_old = np.diag([*ratio, 1.0])
    to_old[:3, 3] = (ratio - 1) / 2
    return np.ascontiguousarray(x.reshape(len(array), *size).numpy()), affine @ to_old


def resample_label(label: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(D, H, W) -> size, the nearest voxel of the same field of view, where `resample` puts the image."""
    for axis, (old, new) in enumerate(zip(label.shape, size)):
        if old != new:
            label = label.take((2 * np.arange(new) + 1) * old // (2 * new), axis)
    return np.ascontiguousarray(label)
