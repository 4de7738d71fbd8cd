"""What tests of volumes share: files of volumes and of pairs, a config that trains on them, refusals."""
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from data import Data, open_data
from volumes.config import DataConfig

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("VAE3D_TEST_DATA", ROOT.parent / "shared" / "data"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real test data at {REAL}")


def quiet(_: str) -> None:
    pass


def ct_like(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Whole HU (X, Y, Z): air around, tissue inside, every voxel different enough to tell places apart."""
    rng = np.random.default_rng(seed)
    array = rng.integers(-1000, 900, shape).astype(np.int16)
    array[:2] = -1000
    return array


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def config(path: Path | str | None, tmp_path: Path, **fields) -> DataConfig:
    return DataConfig(
        **{"path": path and str(path), "cache_dir": str(tmp_path / "cache"), "patch": (8, 10, 12), **fields}
    )


def one_line(error: pytest.ExceptionInfo | BaseException, *words: str) -> str:
    text = str(getattr(error, "value", error))
    assert "\n" not in text and len(text) < 500, text
    for word in words:
        assert word in text, f"{word!r} is missing in: {text}"
    return text


def pair_like(shape: tuple[int, int, int], seed: int = 0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """An image (X, Y, Z), radar-like, that equals its label: whatever is done to one must be done to the
    other.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, shape).astype(np.uint8)
    return label.astype(np.float32), label


def matches(image: torch.Tensor, label: torch.Tensor, largest: int = 3) -> bool:
    return label.dtype == torch.int64 and torch.equal((image[0] * largest).round().long(), label)


def said_and_data(path: Path, tmp_path: Path, **fields) -> tuple[list[str], Data]:
    said: list[str] = []
    fields = {"labels": True, "modality": "voxel", **fields}
    return said, open_data(config(path, tmp_path, **fields), 0, said.append)
