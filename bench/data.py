"""Random 96^3 crops of a 256x256x128 int16 .nii.gz: our cache against decoding the file each time, and
against MONAI's PersistentDataset.

    python bench/data.py [--json FILE] [--seconds 60]

The file is made here: a smooth body with noise, so that it compresses as a CT does. Each round times every
contender on crops of its own, one after the other; a ratio is the median over the rounds, so that a slow
moment of the machine hits both sides. The transforms are the same for all: load, reorient to RAS, scale
intensities to [-1, 1], random crop of 96^3. MONAI caches what comes before the crop.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402 (the one beside this folder, not this file)
from data import open_data
from volumes.config import DataConfig
from volumes.intensities import normalise

SIZE, CROP = (256, 256, 128), 96  # X, Y, Z; voxels
ROUNDS, OURS_A_ROUND = 12, 200    # one crop of ours takes less than a millisecond: so many in a round


def make_volume(path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y, z = (
        np.linspace(-1, 1, n, dtype=np.float32).reshape(shape)
        for n, shape in zip(SIZE, ((-1, 1, 1), (-1, 1), (-1,))))
    body = x**2 / 0.7 + y**2 / 0.5 < 1 + 0.1 * z
    hu = np.where(
        body, 60 + 300 * np.sin(9 * x) * np.sin(7 * y) * np.sin(5 * z), -1000
    ) + 15 * rng.standard_normal(SIZE, dtype=np.float32)
    nib.save(nib.Nifti1Image(hu.clip(-1024, 3071).astype(np.int16), np.diag([-0.8, -0.8, 2.0, 1.0])), path)


def decode_each_time(path: Path) -> Callable[[int], torch.Tensor]:
    """What a loader without a cache does for every crop."""
    def crop(index: int) -> torch.Tensor:
        array, _ = normalise(data.read_volume(path).array, "ct")
        rng = np.random.default_rng(index)
        d, h, w = (int(rng.integers(0, n - CROP + 1)) for n in array.shape[1:])
        return torch.from_numpy(array[:, d:d + CROP, h:h + CROP, w:w + CROP].copy())
    return crop


def our_cache(path: Path, folder: Path) -> Callable[[int], torch.Tensor]:
    cfg = DataConfig(path=str(path), cache_dir=str(folder / "ours"), patch=(CROP,) * 3, modality="ct")
    crops = data.Crops(open_data(cfg, 0, lambda line: None), 0)
    return lambda index: crops[index][0]


def monai_persistent(path: Path, folder: Path) -> Callable[[int], torch.Tensor]:
    from monai.data import PersistentDataset
    from monai.transforms import Compose, LoadImage, Orientation, RandSpatialCrop, ScaleIntensityRange

    transforms = Compose([
        LoadImage(image_only=True, ensure_channel_first=True), Orientation("RAS", labels=None),
        ScaleIntensityRange(-1000, 1000, -1, 1, clip=True),
        RandSpatialCrop((CROP,) * 3, random_size=False)])
    dataset = PersistentDataset([str(path)], transforms, cache_dir=folder / "monai")
    return lambda index: dataset[0]


def seconds_per_crop(crop: Callable[[int], torch.Tensor], start: int, count: int) -> float:
    begin = time.perf_counter()
    for index in range(start, start + count):
        assert crop(index).shape == (1, CROP, CROP, CROP)
    return (time.perf_counter() - begin) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument(
        "--seconds", type=float, default=60, help="begin no round after so many seconds (default 60)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "volume.nii.gz"
        make_volume(path)
        contenders = {"ours": our_cache(path, folder), "decode": decode_each_time(path)}
        try:
            contenders["monai"] = monai_persistent(path, folder)
        except ImportError as error:
            print(
                f"MONAI is not installed ({error}): its ratio is left out; python -m pip install monai==1.6.1"
            )
        for crop in contenders.values():
            crop(0)                                              # caches built, libraries warm
        times: dict[str, list[float]] = {name: [] for name in contenders}
        begin = time.perf_counter()
        while len(times["ours"]) < ROUNDS and time.perf_counter() - begin < args.seconds:
            rounds = len(times["ours"])
            for name, crop in contenders.items():
                count = {"ours": OURS_A_ROUND, "monai": 10, "decode": 2}[name]
                times[name].append(seconds_per_crop(crop, 1 + rounds * count, count))
        megabytes = path.stat().st_size / 1e6
    row = {
        "volume": SIZE, "crop": (CROP,) * 3, "file_mb": round(megabytes, 1), "rounds": len(times["ours"]),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "torch": torch.__version__, "date": str(date.today())}
    for name, values in times.items():
        row[f"{name}_crops_per_second"] = round(1 / statistics.median(values), 1)
        print(f"{name:7} {row[f'{name}_crops_per_second']:10.1f} crops/s")
    for name, goal in (("decode", 100), ("monai", 10)):
        if name in times:
            row[f"ratio_{name}"] = ratio = round(
                statistics.median(other / ours for other, ours in zip(times[name], times["ours"])), 1)
            what = {
                "decode": "decoding the .nii.gz each time",
                "monai": "MONAI PersistentDataset, same transforms"}[name]
            print(
                f"ratio {ratio:8.1f}x  our cache / {what} (goal: at least "
                f"{goal}x{'' if ratio >= goal else ', MISSED'})"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
