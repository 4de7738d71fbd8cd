"""Shared by the tests of predict.py and its rooms: tiny runs, volumes in odd orientations."""
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import predict

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("VAE3D_TEST_DATA", ROOT.parent / "shared" / "data"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real test data at {REAL}")
TINY = ["--data.synthetic_count", "4", "--data.synthetic_size", "8,16,16", "--patch", "4,8,8",
        "--data.crops_per_volume", "3", "--train.val_crops", "2", "--train.latent_crops", "2",
        "--log.sample_every", "0", "--batch", "1", "--steps", "2", "--device", "cpu"]
RUNS = {"kl": ["--vae.base_channels", "4"],
        "vq": ["--vae.base_channels", "4", "--vae.bottleneck", "vq", "--vae.num_codes", "300"],
        "fsq": ["--vae.base_channels", "4", "--vae.bottleneck", "fsq", "--vae.norm", "group"],
        "radar": ["--vae.base_channels", "4", "--data.synthetic", "radar"],
        "seg": ["--task", "seg", "--preset", "unet_light", "--unet.channels", "4,8"]}


def oriented(codes, shape=(9, 14, 11), shear=0.05):
    """An oblique affine for voxels stored in the order and directions of `codes`."""
    ornt = nib.orientations.axcodes2ornt
    to_codes = nib.orientations.ornt_transform(ornt("RAS"), ornt(codes))
    ras = np.diag([1.5, 2.0, 2.5, 1.0])
    ras[:3, :3] += shear * np.arange(9).reshape(3, 3) / 9
    ras[:3, 3] = (-20, 30, 5)
    stored_shape = nib.apply_orientation(np.zeros(shape), to_codes).shape
    return ras @ nib.orientations.inv_ornt_aff(to_codes, shape), stored_shape


def ct_file(path, codes="RAS", seed=0, shape=(9, 14, 11), dtype=np.int16):
    """Whole HU in [-1000, 1000], all of which the default range keeps."""
    affine, stored = oriented(codes, shape)
    values = np.random.default_rng(seed).integers(-1000, 1001, stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(dtype), affine), path)
    return path


def same_grid(path, other):
    a, b = nib.load(path), nib.load(other)
    assert a.shape == b.shape and a.get_data_dtype().newbyteorder("=") == b.get_data_dtype().newbyteorder("=")
    assert np.allclose(a.affine, b.affine, atol=1e-5)
    assert nib.aff2axcodes(a.affine) == nib.aff2axcodes(b.affine)
    assert a.dataobj.slope == b.dataobj.slope and a.dataobj.inter == b.dataobj.inter
    return np.asarray(a.dataobj), np.asarray(b.dataobj)


def failed_line(capsys, *words):
    """The one line on stderr of a command that could not start."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("predict.py: ") and "Traceback" not in text, text
    assert all(word in text for word in words), text


def use(command, checkpoint, *words):
    """predict.py COMMAND --checkpoint CHECKPOINT ... -> its exit code."""
    return predict.main([command, "--checkpoint", *map(str, (checkpoint, *words))])
