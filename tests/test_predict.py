"""predict.py: outputs on their source's grid and scale, latents that decode to the bit, figures and report; what goes wrong in one line."""
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import checkpoints
import data
import predict
import train
import unet
import vae3d
from data import DataConfig, Intensity, Item
from peaks import LiveStorages

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("VAE3D_TEST_DATA", ROOT.parent / "shared" / "data"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real test data at {REAL}")
TINY = ["--data.synthetic_count", "4", "--data.synthetic_size", "8,16,16", "--patch", "4,8,8", "--data.crops_per_volume", "3",
        "--train.val_crops", "2", "--train.latent_crops", "2", "--device", "cpu", "--log.sample_every", "0", "--batch", "1", "--steps", "2"]
RUNS = {"kl": ["--vae.base_channels", "4"],
        "vq": ["--vae.base_channels", "4", "--vae.bottleneck", "vq", "--vae.num_codes", "300"],
        "fsq": ["--vae.base_channels", "4", "--vae.bottleneck", "fsq", "--vae.norm", "group"],
        "radar": ["--vae.base_channels", "4", "--data.synthetic", "radar"],
        "seg": ["--task", "seg", "--preset", "unet_light", "--unet.channels", "4,8"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function: name -> its trained run folder, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(name):
        if name not in made:
            assert train.main([*TINY, *RUNS[name], "--out", str(folder / name)]) == 0
            made[name] = folder / name
        return made[name]
    return get


def oriented(codes, shape=(9, 14, 11), shear=0.05):
    """An oblique affine for voxels stored in the order and directions of `codes`."""
    to_codes = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
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


def through_files(path, out, modality="ct", **fields):
    """Read as predict.py does and write back as it does, with the identity in place of the network."""
    cfg = DataConfig(modality=modality, **fields)
    channels = data.load(Item(path), cfg).volumes[0][0].shape[0]
    checkpoint = types.SimpleNamespace(model=types.SimpleNamespace(cfg=types.SimpleNamespace(in_channels=channels)))
    case = predict.read_case(Item(path), checkpoint, cfg)
    out.mkdir(exist_ok=True)
    job, = predict.make_jobs([Item(path)], [str(path)], str(out), predict.kind_of)
    predict.write_result(job.output, case.volumes, case.affine, case.origin)
    return job.output


def same_grid(path, other):
    a, b = nib.load(path), nib.load(other)
    assert a.shape == b.shape and a.get_data_dtype().newbyteorder("=") == b.get_data_dtype().newbyteorder("=")
    assert np.allclose(a.affine, b.affine, atol=1e-5) and nib.aff2axcodes(a.affine) == nib.aff2axcodes(b.affine)
    assert a.dataobj.slope == b.dataobj.slope and a.dataobj.inter == b.dataobj.inter
    return np.asarray(a.dataobj), np.asarray(b.dataobj)


def failed_line(capsys, *words):
    """The one line on stderr of a command that could not start."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("predict.py: ") and "Traceback" not in text, text
    assert all(word in text for word in words), text


# ------------------------------------------------------------------------------------------------- grid, number type, intensities

@pytest.mark.parametrize("codes", ["RAS", "LPS", "AIL", "SPR", "PIR", "IRP", "ASL", "RSA"])
def test_hu_come_back_as_hu_in_the_files_own_axes(tmp_path, codes):
    """DEFECTS 5, with the identity as network: every voxel, exactly."""
    path = ct_file(tmp_path / "in" / "scan.nii.gz", codes)
    a, b = same_grid(path, through_files(path, tmp_path / "out"))
    assert (a == b).all(), f"largest difference {np.abs(a - b).max()}"


@needs_real
@pytest.mark.parametrize("name", sorted(p.name for p in (REAL / "odd").glob("orient_*")) if REAL.is_dir() else ["orient"])
def test_orientations_of_real_files_survive(tmp_path, name):
    """uint8 with a scale: the stored numbers come back. As `voxel`, which clips nothing."""
    a, b = same_grid(REAL / "odd" / name, through_files(REAL / "odd" / name, tmp_path / "out", "voxel"))
    assert (a == b).all(), f"largest difference {np.abs(a - b).max()}"


@needs_real
def test_hu_of_a_real_ct_survive(tmp_path):
    """512 x 512, stored with a scale: HU within the default range to half a stored step, what lies beyond clipped to it."""
    source = REAL / "ct" / "abdomen_5mm_slab.nii.gz"
    a, b = same_grid(source, through_files(source, tmp_path / "out"))
    assert np.abs(a.clip(-1000, 1000) - b).max() <= 0.5 * nib.load(source).dataobj.slope + 1e-3, np.abs(a.clip(-1000, 1000) - b).max()


ODD = ["big_endian_int16.nii", "float64_oblique.nii.gz", "single_slice.nii.gz", "singleton_depth_4d.nii.gz", "tiny27_int64.nii",
       "tiny27_uint32.nii", "nifti2.nii.gz", "trailing_dim_zero_pixdim.nii.gz", "functional_4d_scl.nii", "pair_big_endian.hdr"]


@needs_real
@pytest.mark.parametrize("name", ODD)
def test_odd_files_come_back_on_their_grid(tmp_path, name, caplog):
    """4-D, flat, big-endian, scaled, NIfTI-2 and .hdr/.img sources; floats come back as float32. nibabel has nothing to say."""
    source = REAL / "odd" / name
    out = through_files(source, tmp_path / "out", "voxel")
    assert not caplog.records
    a, b = nib.load(source), nib.load(out)
    assert out.name == re.sub(r"\.(nii|hdr)(\.gz)?$", "", name) + ".nii.gz" and a.shape == b.shape
    assert np.allclose(a.affine, b.affine, atol=1e-4), np.abs(a.affine - b.affine).max()
    wanted = a.get_data_dtype().newbyteorder("=")
    assert b.get_data_dtype() == (wanted if wanted.kind in "iu" else np.float32)
    x, y = np.asarray(a.dataobj, dtype=np.float64), np.asarray(b.dataobj, dtype=np.float64)
    assert np.abs(x - y).max() <= 1e-6 * np.abs(x).max(), np.abs(x - y).max()


@pytest.mark.parametrize("field, value", [(254, 7), (252, -32767), (80, -2.0), (84, 1e30), (296, 3e38)])
def test_headers_that_nibabel_complains_of_are_read_and_written_without_a_word(tmp_path, runs, capfd, caplog, field, value):
    """sform_code, qform_code, pixdim, an affine; each makes nibabel log or numpy warn where nobody stops them."""
    path = ct_file(tmp_path / "in" / "a.nii", "RAS")
    content = bytearray(path.read_bytes())
    struct.pack_into("<h" if field > 250 and field < 280 else "<f", content, field, value)
    path.write_bytes(content)
    capfd.readouterr()
    assert predict.main(["reconstruct", "--checkpoint", str(runs("kl")), "--input", str(path), "--output", str(tmp_path / "o")]) == 0
    assert capfd.readouterr().err == "" and not caplog.records


def test_whole_numbers_are_rounded_and_clipped_to_their_type(tmp_path):
    path = ct_file(tmp_path / "in" / "scan.nii", dtype=np.int16)
    checkpoint = types.SimpleNamespace(model=types.SimpleNamespace(cfg=types.SimpleNamespace(in_channels=1)))
    origin = predict.read_case(Item(path), checkpoint, DataConfig(modality="ct")).origin
    values = np.full((1, 11, 14, 9), 0.6, dtype=np.float32)
    values[0, 0, 0, :4] = (1e9, -1e9, -0.6, 32767.4)
    assert predict.in_stored_type(values, origin)[0, 0, 0, :5].tolist() == [32767, -32768, -1, 32767, 1]
    for dtype in ("int64", "uint64", "uint8"):
        stored = predict.in_stored_type(np.array([-1e30, 1e30], dtype=np.float32).reshape(1, 1, 1, 2),
                                        predict.Origin(".npy", (2, 1, 1), dtype, (1, 1, 2))).flatten()
        assert stored[0] == np.iinfo(dtype).min and stored[1] >= np.iinfo(dtype).max // 2 + 1  # the largest that float64 can name


@pytest.mark.parametrize("shape, axis", [((6, 7, 8), None), ((3, 6, 7, 8), None), ((6, 7, 8, 3), None), ((6, 3, 7, 8), 1)])
@pytest.mark.parametrize("kind", [".npy", ".npz"])
def test_arrays_come_back_in_their_shape(tmp_path, shape, axis, kind):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = tmp_path / f"grid{kind}"
    np.save(path, array) if kind == ".npy" else np.savez(path, voxel=array)
    out = through_files(path, tmp_path / "out", "voxel", channel_axis=axis)
    found = np.load(out) if kind == ".npy" else np.load(out)["voxel"]
    assert out.name == path.name and found.dtype == np.float32 and np.abs(found - array).max() < 1e-6
    if len(shape) == 4:
        one = through_files(path, tmp_path / "one", "voxel", channel_axis=axis, select_channel=1)
        found = np.load(one) if kind == ".npy" else np.load(one)["voxel"]
        assert np.abs(found - np.take(array, 1, {(3, 6, 7, 8): 0, (6, 7, 8, 3): 3, (6, 3, 7, 8): 1}[shape])).max() < 1e-6


def test_sparse_grid_comes_back_dense(tmp_path):
    np.savez(tmp_path / "s.npz", shape=np.array([4, 5, 6]), coords=np.array([[1, 2, 3], [0, 4, 5]]),
             features=np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32))
    found = np.load(through_files(tmp_path / "s.npz", tmp_path / "out", "voxel"))["volume"]
    assert found.shape == (4, 5, 6, 2) and found[1, 2, 3].tolist() == [1, 2] and found[0, 4, 5].tolist() == [3, 4] and found.sum() == 10


def test_resampled_volume_goes_back_to_the_sources_grid(tmp_path):
    """Smooth values survive a coarser grid in between, where they were."""
    affine, shape = oriented("LPS", (24, 20, 16), 0)
    z = np.indices(shape).sum(0) * 10.0 - 300
    path = tmp_path / "in.nii.gz"
    nib.save(nib.Nifti1Image(z.astype(np.int16), affine), path)
    a, b = same_grid(path, through_files(path, tmp_path / "out", spacing="5,4,3"))
    assert np.abs(a - b)[3:-3, 3:-3, 3:-3].max() <= 2 and np.abs(a - b).max() <= 40


def test_picture_comes_back_as_png(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    image.fromarray(picture).save(tmp_path / "photo.bmp")
    out = through_files(tmp_path / "photo.bmp", tmp_path / "out", "picture")
    assert out.name == "photo.png" and (np.asarray(image.open(out)) == picture).all()


# ---------------------------------------------------------------------------------------------------------- the autoencoder's files

@pytest.mark.parametrize("kind", ["kl", "vq", "fsq"])
def test_decode_of_encode_equals_reconstruct_to_the_bit(tmp_path, runs, kind):
    path = ct_file(tmp_path / "in" / "a.nii.gz", "PIR", shape=(19, 26, 13))
    common = ["--checkpoint", str(runs(kind)), "--tile", "8,16,8"]
    assert predict.main(["reconstruct", *common, "--input", str(path), "--output", str(tmp_path / "r")]) == 0
    assert predict.main(["encode", *common, "--input", str(path), "--output", str(tmp_path / "z")]) == 0
    assert [p.name for p in (tmp_path / "z").iterdir()] == ["a_latent.npz"]
    assert predict.main(["decode", *common, "--input", str(tmp_path / "z"), "--output", str(tmp_path / "d")]) == 0
    same_grid(path, tmp_path / "r" / "a.nii.gz")
    assert (tmp_path / "r" / "a.nii.gz").read_bytes() == (tmp_path / "d" / "a.nii.gz").read_bytes()
    checkpoint = predict.load_network(runs(kind), device="cpu")  # before the rounding to int16 too
    volume = predict.read_case(Item(path), checkpoint, predict.data_config(checkpoint)).volumes[0][0]
    latents = predict.read_latents(tmp_path / "z" / "a_latent.npz", predict.set_tiles(checkpoint.model, (8, 16, 8)))
    recon = predict.reconstruct_volume(checkpoint, volume)
    assert np.array_equal(predict.decode_volume(checkpoint, latents.arrays[0], latents.size), recon)
    with torch.no_grad():
        plain = checkpoint.model.memory("none")(torch.from_numpy(volume)[None]).recon[0].numpy()
    assert np.abs(plain - recon).max() < 1e-5


def test_encode_writes_the_mean_unless_asked_to_sample(tmp_path, runs):
    """DEFECTS 19. With what is needed besides: scale factor, affine, size; and no pickles."""
    path = ct_file(tmp_path / "a.nii.gz")
    for name, flags in (("z", []), ("s1", ["--sample"]), ("s2", ["--sample"])):
        command = ["encode", "--checkpoint", str(runs("kl")), "--input", str(path), "--output", str(tmp_path / name)]
        assert predict.main(command + flags) == 0
    z, s1, s2 = (np.load(tmp_path / name / "a_latent.npz", allow_pickle=False) for name in ("z", "s1", "s2"))
    checkpoint = predict.load_network(runs("kl"), device="cpu")
    case = predict.read_case(Item(path), checkpoint, predict.data_config(checkpoint))
    with torch.no_grad():
        mu = checkpoint.model.encode(torch.from_numpy(case.volumes[0][0])[None]).mu
    assert np.abs(z["latent"] - mu.numpy()).max() < 1e-5 and z["latent"].dtype == np.float32
    assert not np.array_equal(z["latent"], s1["latent"]) and np.array_equal(s1["latent"], s2["latent"])
    assert z["size"].tolist() == [11, 14, 9] and np.allclose(z["affine"], data.read_volume(path).affine)
    best = torch.load(runs("kl") / "best.pt", weights_only=True)
    assert float(z["scale_factor"]) == best["latent"]["scale_factor"] > 0


def test_series_keeps_its_volumes(tmp_path, runs):
    """A 4-D image: each volume by itself, 4-D again on the way out, through latents too."""
    affine, shape = oriented("LPS")
    values = np.random.default_rng(0).integers(-1000, 1000, (*shape, 3)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "t.nii.gz")
    for command, source, out in (("reconstruct", "t.nii.gz", "r"), ("encode", "t.nii.gz", "z"), ("decode", "z", "d")):
        assert predict.main([command, "--checkpoint", str(runs("kl")), "--input", str(tmp_path / source), "--output",
                             str(tmp_path / out)]) == 0
    assert nib.load(tmp_path / "r" / "t.nii.gz").shape == values.shape
    assert (tmp_path / "r" / "t.nii.gz").read_bytes() == (tmp_path / "d" / "t.nii.gz").read_bytes()


def test_radar_grids_keep_their_channels_and_layout(tmp_path, runs):
    array = np.zeros((10, 9, 8, 4), dtype=np.float32)
    array[2, 3, 4] = (1, 20, -3, 0.5)
    np.savez_compressed(tmp_path / "grid.npz", voxel=array)
    assert predict.main(["reconstruct", "--checkpoint", str(runs("radar")), "--input", str(tmp_path / "grid.npz"), "--output",
                         str(tmp_path / "o")]) == 0
    found = np.load(tmp_path / "o" / "grid.npz")
    assert found.files == ["voxel"] and found["voxel"].shape == array.shape and found["voxel"].dtype == np.float32


def test_tiles_equal_the_untiled_volume_and_bound_the_peak():
    """Five times the volume takes less than one and a half times the peak; untiled it takes five times as much."""
    torch.manual_seed(0)
    vae = vae3d.VAE3D(vae3d.VAEConfig(base_channels=8)).eval()
    checkpoint = predict.Checkpoint(Path(), None, vae, {}, None, "float32", "")
    peaks, results = {}, {}
    for tile, depth in (("none", 24), ("none", 120), ((8, 16, 32), 24), ((8, 16, 32), 120)):
        x = np.random.default_rng(0).standard_normal((1, depth, 32, 32)).astype(np.float32)
        predict.set_tiles(vae, tile)
        with LiveStorages("cpu") as log:
            results[tile, depth] = predict.reconstruct_volume(checkpoint, x)
        peaks[tile, depth] = log.peak()[0]
        assert results[tile, depth].shape == x.shape
    whole, tiled = (results[tile, 120] for tile in ("none", (8, 16, 32)))
    difference, scale = np.abs(whole - tiled).max(), np.abs(whole).max()
    assert difference < 1e-5 * scale, f"{difference} of {scale}: more than float32 sums in another order"
    assert peaks["none", 120] > 4.5 * peaks["none", 24] and peaks[(8, 16, 32), 120] < 1.5 * peaks[(8, 16, 32), 24], peaks


def test_default_tiles_depend_on_the_size_alone():
    """So that encode and decode, run apart, compute the same bits; and a large volume is cut."""
    vae = predict.set_tiles(vae3d.VAE3D.from_preset("ultra_lightweight"))
    plan = vae.tile_plan((160, 512, 512), 1, torch.float32)
    assert plan.peak_bytes <= predict.BUDGET * 2 ** 30 and plan == vae.tile_plan((160, 512, 512), 1, torch.float32, "cuda")


# ------------------------------------------------------------------------------------------------------------------- segmentation

def segmenter(logits_of, out_channels=3, patch=(4, 8, 8)):
    """A checkpoint whose network is a function."""
    model = torch.nn.Conv3d(1, 1, 1)
    model.forward = lambda x: types.SimpleNamespace(logits=logits_of(x))
    cfg = types.SimpleNamespace(data=types.SimpleNamespace(patch=patch), unet=unet.UNetConfig(out_channels=out_channels))
    return predict.Checkpoint(Path(), cfg, model, {}, None, "float32", "")


@pytest.mark.parametrize("size, window, overlap", [((9, 17, 20), (4, 8, 8), 0.5), ((4, 30, 8), (4, 8, 8), 0.0),
                                                   ((13, 7, 9), (5, 9, 4), 0.75)])
def test_windows_of_a_local_network_give_the_whole_volumes_logits(size, window, overlap):
    """A partition of unity: weights sum to one everywhere, so what does not depend on the window comes through."""
    x = np.random.default_rng(0).standard_normal((1, *size)).astype(np.float32)
    checkpoint = segmenter(lambda t: torch.cat([t, 0 * t + 2.5], 1), 2)
    ticks = []
    found = torch.cat(list(predict.window_logits(checkpoint, x, window, overlap, 0.0, lambda *told: ticks.append(told))), 1)
    assert (found[0] - torch.from_numpy(x[0])).abs().max() < 1e-5 and (found[1] - 2.5).abs().max() < 1e-5
    assert found.shape == (2, *size) and ticks[-1][0] == ticks[-1][1] == len(ticks)


def test_windows_cover_and_overlap():
    for n in range(1, 40):
        for w in range(1, 12):
            starts = unet.window_starts(n, min(n, w), 0.5)
            assert starts[0] == 0 and starts[-1] + min(n, w) == n
            assert all(b - a <= max(1, w / 2 + 0.5) for a, b in zip(starts, starts[1:]))


def test_one_window_is_one_plain_forward_pass(runs):
    checkpoint = predict.load_network(runs("seg"), device="cpu")
    x = np.random.default_rng(0).standard_normal((1, 8, 16, 16)).astype(np.float32)
    found, = predict.window_logits(checkpoint, x, (8, 16, 16))
    with torch.no_grad():
        wanted = checkpoint.model(train.to_device(torch.from_numpy(x)[None], torch.device("cpu"))).logits[0]
    assert torch.equal(found, wanted)
    assert np.array_equal(predict.segment_volume(checkpoint, x, (8, 16, 16)), wanted.argmax(0).numpy())


def test_threshold_decides_between_two_classes():
    x = np.linspace(-3, 3, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    p = 1 / (1 + np.exp(-x[0]))
    for threshold in (None, 0.2, 0.5, 0.9):
        wanted = p > (threshold or 0.5)
        one, two = segmenter(lambda t: t, 1), segmenter(lambda t: torch.cat([-t, 0 * t], 1), 2)
        for checkpoint in (one, two):
            assert (predict.segment_volume(checkpoint, x, (4, 4, 4), threshold=threshold) == wanted).all()
    with pytest.raises(ValueError, match="decides between two"):
        predict.segment_volume(segmenter(lambda t: torch.cat([t, t, t], 1)), x, (4, 4, 4), threshold=0.5)


def test_segment_command(tmp_path, runs, capsys):
    """Several inputs, odd orientations, overlay, class numbers on the source's grid; --no-save writes none."""
    paths = [ct_file(tmp_path / "in" / f"{codes}.nii.gz", codes, shape=(20, 18, 9)) for codes in ("LPS", "AIL")]
    common = ["segment", "--checkpoint", str(runs("seg")), "--input", *map(str, paths), "--output", str(tmp_path / "o"), "--viz"]
    assert predict.main([*common, "--no-save"]) == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["AIL_viz.png", "LPS_viz.png"]
    assert predict.main([*common, "--window", "4,8,8", "--overlap", "0.25"]) == 0
    for path in paths:
        a, b = nib.load(path), nib.load(tmp_path / "o" / path.name)
        assert a.shape == b.shape and np.allclose(a.affine, b.affine, atol=1e-5) and b.get_data_dtype() == np.uint8
        assert set(np.unique(b.dataobj)) <= set(range(4))
    assert (tmp_path / "o" / "LPS_viz.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert predict.main([*common, "--mask-threshold", "0.5"]) == 2
    failed_line(capsys, "4 classes", "--mask-threshold")


def test_labels_go_back_to_a_finer_grid_and_to_their_stored_values(tmp_path, runs):
    """A network that finds what is above 0 HU, at 3 mm; the source has 1 mm and the values 0 and 7."""
    values = np.full((30, 30, 30), -500, dtype=np.int16)
    values[8:22, 10:20, 6:24] = 500
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    content = torch.load(runs("seg") / "best.pt", weights_only=True)
    content["config"]["data"] |= {"spacing": "3,3,3", "label_values": [0, 5, 6, 7]}
    content["data"]["label_values"] = [0, 5, 6, 7]
    for value in content["model"].values():
        value.zero_()
    content["model"]["head.bias"][3] = 1.0
    torch.save(content, tmp_path / "seg.pt")
    assert predict.main(["segment", "--checkpoint", str(tmp_path / "seg.pt"), "--input", str(tmp_path / "a.nii.gz"), "--output",
                         str(tmp_path / "o")]) == 0
    found = nib.load(tmp_path / "o" / "a.nii.gz")
    assert found.shape == values.shape and np.unique(found.dataobj).tolist() == [7]
    x = data.load(Item(tmp_path / "a.nii.gz"), DataConfig(modality="ct", spacing="3,3,3")).volumes[0][0]
    labels = predict.segment_volume(segmenter(lambda t: torch.cat([0 * t, t], 1), 2), x, (10, 10, 10), size=(30, 30, 30))
    assert (labels.T != (values > 0)).mean() < 0.02


# --------------------------------------------------------------------------------------------------------------------- evaluation

def test_evaluate_json_table_and_report(tmp_path, runs, capsys):
    folder = tmp_path / "in"
    for i in range(4):
        ct_file(folder / (f"<b>{i}&.nii.gz" if i else "plain.nii.gz"), seed=i, shape=(9, 14 + i, 12))
    ct_file(folder / "broken.nii.gz").write_bytes(b"no NIfTI")
    assert predict.main(["evaluate", "--checkpoint", str(runs("kl")), "--data", str(folder), "--json", str(tmp_path / "o.json"),
                         "--report", str(tmp_path / "o.html")]) == 1
    result = json.loads((tmp_path / "o.json").read_text())
    assert list(result)[:4] == ["volumes", "mean", "peak_gib", "voxels_per_second"] and len(result["volumes"]) == 4
    assert {"file", "psnr", "ssim", "l1", "sharpness", "bits_per_voxel", "compression"} <= set(result["volumes"][0])
    for name in ("psnr", "ssim", "l1"):
        assert math.isclose(result["mean"][name], np.mean([row[name] for row in result["volumes"]]))
    assert "broken" in result["failed"][0]["file"] and result["peak_gib"] > 0 and result["voxels_per_second"] > 0
    row = next(row for row in result["volumes"] if "plain" in row["file"])  # 12,14,9 -> 6,4,3 of 4 channels at 32 bits
    assert row["shape"] == [12, 14, 9] and math.isclose(row["bits_per_voxel"], 6 * 4 * 3 * 4 * 32 / (12 * 14 * 9))
    assert math.isclose(row["compression"], 16 / row["bits_per_voxel"]) and math.isclose(row["compression_16"], 2 * row["compression"])
    checkpoint = predict.load_network(runs("kl"), device="cpu")
    x = torch.from_numpy(predict.read_case(Item(folder / "plain.nii.gz"), checkpoint, predict.data_config(checkpoint)).volumes[0][0])[None]
    recon = torch.from_numpy(predict.reconstruct_volume(checkpoint, x[0].numpy()))[None]
    assert math.isclose(row["psnr"], 10 * math.log10(4 / float((recon - x).square().mean())), abs_tol=1e-3)
    page = (tmp_path / "o.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 27 and not re.search(r"https?://|<script|<link|<b>\d&", page)
    assert page.count("<h3>") == 3 and all(f"<h3>{name}</h3>" in page for name in ("Worst", "Median", "Best")) and "&lt;b&gt;1&amp;" in page
    captured = capsys.readouterr()
    assert "PSNR" in captured.out and captured.err.count("\n") == 2 and "broken.nii.gz" in captured.err and "1 of 5 failed" in captured.err


def test_held_out_files_are_those_that_the_run_did_not_train_on(tmp_path, capsys):
    for n in range(4):
        ct_file(tmp_path / "data" / f"case{n}.nii.gz", seed=n)
    assert train.main([*TINY, "--vae.base_channels", "4", "--data", str(tmp_path / "data"), "--data.cache_dir", str(tmp_path / "cache"),
                       "--out", str(tmp_path / "run")]) == 0
    trained = torch.load(tmp_path / "run/best.pt", weights_only=True)["data"]["training"]
    argv = ["evaluate", "--checkpoint", str(tmp_path / "run"), "--split", "held-out", "--device", "cpu", "--json", str(tmp_path / "e.json")]
    assert predict.main([*argv, "--data", str(tmp_path / "data")]) == 0
    seen = {Path(row["file"]).name.split(".")[0] for row in json.loads((tmp_path / "e.json").read_text())["volumes"]}
    assert seen == {f"case{n}" for n in range(4)} - set(trained) and len(seen) == 1
    capsys.readouterr()
    assert predict.main([*argv, "--data", str(tmp_path / "data" / f"{trained[0]}.nii.gz")]) == 2
    assert "all of 1 files were trained on" in capsys.readouterr().err


def test_evaluate_counts_codes_and_channels(tmp_path, runs):
    path = ct_file(tmp_path / "a.nii.gz", shape=(16, 16, 8))
    assert predict.main(["evaluate", "--checkpoint", str(runs("vq")), "--data", str(path), "--json", str(tmp_path / "vq.json")]) == 0
    result = json.loads((tmp_path / "vq.json").read_text())
    assert 0 < result["codebook_usage"] <= 1 and 1 <= result["perplexity"] <= 300
    assert math.isclose(result["mean"]["bits_per_voxel"], 4 * 4 * 4 * math.log2(300) / (16 * 16 * 8))
    grid = np.zeros((8, 8, 8, 4), dtype=np.float32)
    grid[3, 3, 3], grid[1, 2, 3] = (1, 2, 3, 4), (1, 1, -2, 0)
    np.save(tmp_path / "g.npy", grid)
    assert predict.main(["evaluate", "--checkpoint", str(runs("radar")), "--data", str(tmp_path / "g.npy"), "--json",
                         str(tmp_path / "g.json"), "--report", str(tmp_path / "g.html")]) == 0
    row, = json.loads((tmp_path / "g.json").read_text())["volumes"]
    assert 0 <= row["iou"] <= 1 and len(row["channels"]) == 4
    assert math.isclose(row["l1"], np.mean([channel["l1"] for channel in row["channels"]]), rel_tol=1e-4)
    assert "The only" in (tmp_path / "g.html").read_text()


def test_evaluate_segmentation(tmp_path, runs, capsys):
    """Dice by hand over a network of constant answer; a label that is no class is refused."""
    for i, codes in enumerate(("LPS", "PIR", "RAS")):
        image = ct_file(tmp_path / "d" / f"c{i}_image.nii.gz", codes, i)
        stored = nib.load(image)
        label = np.random.default_rng(i).integers(0, 4 if i < 2 else 9, stored.shape).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, stored.affine), tmp_path / "d" / f"c{i}_label.nii.gz")
    content = torch.load(runs("seg") / "best.pt", weights_only=True)
    for value in content["model"].values():
        value.zero_()
    content["model"]["head.bias"][2] = 1.0
    torch.save(content, tmp_path / "seg.pt")
    assert predict.main(["evaluate", "--checkpoint", str(tmp_path / "seg.pt"), "--data", str(tmp_path / "d"), "--json",
                         str(tmp_path / "o.json"), "--report", str(tmp_path / "o.html")]) == 1
    result = json.loads((tmp_path / "o.json").read_text())
    label = np.asarray(nib.load(tmp_path / "d" / "c1_label.nii.gz").dataobj)
    row = next(row for row in result["volumes"] if "c1" in row["file"])
    share = (label == 2).mean()
    assert math.isclose(row["dice_2"], 2 * share / (1 + share), rel_tol=1e-5) and row["dice_1"] == 0 and "psnr" not in row
    assert math.isclose(row["dice"], row["dice_2"] / 3, rel_tol=1e-5) and set(result["pooled"]) == {"dice", "dice_1", "dice_2", "dice_3"}
    assert (tmp_path / "o.html").read_text().count("<img") == 18
    assert "c2_label.nii.gz" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- many files, and what goes wrong

def test_interrupted_folder_goes_on_and_a_failure_is_told_at_the_end(tmp_path, runs, capsys):
    folder = tmp_path / "in"
    for i in range(3):
        ct_file(folder / f"{i}.nii.gz", seed=i)
    (folder / "1.nii.gz").write_bytes(b"no NIfTI")
    ct_file(folder / "other" / "2.nii.gz", seed=9)               # the same name again
    command = ["reconstruct", "--checkpoint", str(runs("kl")), "--input", str(folder), "--output", str(folder / "out")]
    capsys.readouterr()
    assert predict.main(command) == 1
    captured = capsys.readouterr()
    def written():
        return sorted(str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*.nii.gz"))
    assert written() == ["0.nii.gz", "2.nii.gz", "other/2.nii.gz"]
    assert captured.err.count("\n") == 2 and "1.nii.gz" in captured.err and "1 of 4 failed" in captured.err
    ct_file(folder / "1.nii.gz", seed=1)
    (folder / "out" / "2.nii.gz").unlink()
    before = {name: (folder / "out" / name).stat().st_mtime_ns for name in written()}
    assert predict.main(command) == 0
    text = capsys.readouterr().out
    assert "2 of 4 outputs are there" in text and "skipped" in text and "[2/2]" in text
    assert len(written()) == 4
    assert all((folder / "out" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert predict.main([*command, "--overwrite"]) == 0
    assert all((folder / "out" / name).stat().st_mtime_ns != time for name, time in before.items())


def test_a_signal_stops_at_once_and_leaves_nothing_half_written(tmp_path, runs, monkeypatch, capsys):
    for i in range(2):
        ct_file(tmp_path / "in" / f"{i}.nii.gz", seed=i)
    write = checkpoints.write_atomic

    def interrupted(path, content):
        write(path, content)
        if path.name == "1.nii.gz":
            path.rename(path.with_name(path.name + ".tmp"))      # as if it came before the end
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(checkpoints, "write_atomic", interrupted)
    assert predict.main(["reconstruct", "--checkpoint", str(runs("kl")), "--input", str(tmp_path / "in"), "--output",
                         str(tmp_path / "out")]) == 143
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["0.nii.gz"] and "the same command" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_out_of_memory_is_one_files_failure(tmp_path, runs, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(predict, "reconstruct_volume", full)
    path = ct_file(tmp_path / "a.nii.gz")
    assert predict.main(["reconstruct", "--checkpoint", str(runs("kl")), "--input", str(path), "--output", str(tmp_path / "o")]) == 1
    assert "--tile" in capsys.readouterr().err


def test_what_cannot_start_is_one_line(tmp_path, runs, capsys):
    path = ct_file(tmp_path / "a.nii.gz")
    runs("kl"), runs("seg")
    torch.save({"kind": "vae3d.other", "version": 1}, tmp_path / "other.pt")
    torch.save({"kind": "vae3d.weights", "version": 1}, tmp_path / "empty.pt")
    torch.save(torch.nn.Conv3d(1, 1, 1), tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "nothing").mkdir()
    capsys.readouterr()

    def refused(command, checkpoint, *flags, words, source=path):
        argv = [command, "--checkpoint", str(checkpoint), "--input", str(source), "--output", str(tmp_path / "o"), *flags]
        assert predict.main(argv) == 2
        failed_line(capsys, *words)
    refused("reconstruct", tmp_path / "other.pt", words=["other.pt", "vae3d.other"])
    refused("reconstruct", tmp_path / "empty.pt", words=["empty.pt", "holds no config"])
    refused("reconstruct", tmp_path / "code.pt", words=["code.pt", "objects"])   # DEFECTS 17
    refused("reconstruct", tmp_path / "text.pt", words=["text.pt"])
    refused("reconstruct", tmp_path / "absent.pt", words=["no such checkpoint"])
    refused("reconstruct", tmp_path / "nothing", words=["neither best.pt nor last.pt"])
    refused("segment", runs("kl"), words=["--task vae"])
    refused("encode", runs("seg"), words=["--task seg"])
    refused("reconstruct", runs("kl"), words=["no volumes"], source=tmp_path / "nothing")
    refused("reconstruct", runs("kl"), words=["no such file"], source=tmp_path / "absent.nii")
    refused("reconstruct", runs("kl"), "--tile", "8,8", words=["--tile", "3 values"])
    refused("reconstruct", runs("kl"), "--memory", "-1", words=["--memory", "0"])
    refused("reconstruct", runs("kl"), "--device", "tpu", words=["tpu"])
    refused("reconstruct", runs("kl"), "--overwrit", words=["did you mean --overwrite"])
    refused("encode", runs("vq"), "--sample", words=["--sample", "vq"])
    refused("decode", runs("kl"), words=["_latent.npz"], source=tmp_path / "nothing")
    assert predict.main(["reconstruct", "--checkpoint", str(runs("kl")), "--input", str(path), "--output", str(tmp_path)]) == 2
    failed_line(capsys, "a.nii.gz", "overwritten")
    assert predict.main(["evaluate", "--checkpoint", str(runs("kl")), "--data", str(path), "--json", str(tmp_path / "no" / "o.json")]) == 2
    failed_line(capsys, "folder does not exist")
    refused("segment", runs("seg"), "--data.label_values", "0,1", words=["2 values", "4 classes"])
    refused("segment", runs("seg"), "--overlap", "1", words=["--overlap", "between 0 and 1"])
    assert predict.main([]) == 2
    failed_line(capsys)
    assert not (tmp_path / "o" / "a.nii.gz").exists()


def test_a_reconstruction_that_is_not_finite_is_a_failure(tmp_path, runs, capsys):
    """No number that stands for NaN is written."""
    content = torch.load(runs("kl") / "best.pt", weights_only=True)
    content["model"]["decoder.head.conv.bias"].fill_(math.nan)
    torch.save(content, tmp_path / "nan.pt")
    path, out = ct_file(tmp_path / "a.nii.gz"), str(tmp_path / "o")
    assert predict.main(["reconstruct", "--checkpoint", str(tmp_path / "nan.pt"), "--input", str(path), "--output", out]) == 1
    assert "not finite" in capsys.readouterr().err and not list((tmp_path / "o").iterdir())


def test_files_that_do_not_fit_the_network_are_told_in_one_line(tmp_path, runs, capsys):
    np.save(tmp_path / "two.npy", np.random.default_rng(0).standard_normal((6, 6, 6, 2)))
    path = ct_file(tmp_path / "a.nii.gz")
    assert predict.main(["encode", "--checkpoint", str(runs("kl")), "--input", str(path), "--output", str(tmp_path / "z")]) == 0
    (tmp_path / "z" / "b_latent.npz").write_bytes(b"PK no archive")
    runs("vq")
    capsys.readouterr()
    assert predict.main(["reconstruct", "--checkpoint", str(runs("kl")), "--input", str(tmp_path / "two.npy"), "--output",
                         str(tmp_path / "o")]) == 1
    assert "2 channels, the checkpoint takes 1" in capsys.readouterr().err.splitlines()[0]
    assert predict.main(["reconstruct", "--checkpoint", str(runs("kl")), "--input", str(tmp_path / "two.npy"), "--output",
                         str(tmp_path / "o"), "--data.select_channel", "0"]) == 0
    capsys.readouterr()
    assert predict.main(["decode", "--checkpoint", str(runs("vq")), "--input", str(tmp_path / "z"), "--output", str(tmp_path / "d")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "holds kl latents" in lines[0] and "is no latent" in lines[1] and lines[2].endswith("2 of 2 failed")


def test_latents_that_lie_are_refused_in_one_line(tmp_path, runs, capsys):
    path = ct_file(tmp_path / "a.nii.gz")
    assert predict.main(["encode", "--checkpoint", str(runs("kl")), "--input", str(path), "--output", str(tmp_path)]) == 0
    with np.load(tmp_path / "a_latent.npz") as content:
        good = dict(content)
    about = json.loads(str(good["about"]))
    for number, (name, value, words) in enumerate([
            ("size", good["size"] + 0.5, "its size"), ("size", good["size"] * 10**6, "decode it with the checkpoint"),
            ("affine", good["affine"] * math.nan, "its affine"), ("affine", np.eye(3), "is no latent"),
            ("low", good["low"] * 1j, "its low"), ("low", good["low"][:0], "low and high"),
            ("high", good["high"].repeat(3, 1), "low and high"),
            ("high", good["high"] + math.inf, "its high"), ("latent", good["latent"] * math.nan, "NaN or infinite latents"),
            ("latent", np.array("x"), "decode it"), ("about", np.array("{"), "is no latent"),
            *(("about", np.array(json.dumps(about | {"origin": origin})), "is no latent")
              for origin in (3, {}, about["origin"] | {"dtype": "zz"}, about["origin"] | {"more": 1}))]):
        np.savez(tmp_path / f"{number}.npz", **good | {name: value})
        capsys.readouterr()
        assert predict.main(["decode", "--checkpoint", str(runs("kl")), "--input", str(tmp_path / f"{number}.npz"), "--output",
                             str(tmp_path / "o")]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and f"{number}.npz" in lines[0] and words in lines[0] and lines[1].endswith("1 of 1 failed"), lines


def test_last_checkpoint_and_averages_load(tmp_path, runs):
    """last.pt serves too, with the weights that would ship."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--vae.base_channels", "4", "--train.ema", "0.5", "--out", str(out)]) == 0
    last = torch.load(out / "last.pt", weights_only=True)
    model = predict.load_network(out / "last.pt", device="cpu").model
    assert all(torch.equal(value, last["ema"][0][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, last["model"][name]) for name, value in model.state_dict().items())
    (out / "best.pt").unlink()
    assert predict.load_network(out, device="cpu").path.name == "last.pt"


def test_preparation_follows_the_checkpoint(runs):
    """Modality, window, grid and channels are those of the run; a random zoom is none."""
    checkpoint = predict.load_network(runs("kl"), device="cpu")
    assert predict.data_config(checkpoint).modality == "ct"
    checkpoint.cfg.data.window, checkpoint.cfg.data.spacing = "lung", "random"
    cfg = predict.data_config(checkpoint, nan="zero", max_gib=None)
    assert (cfg.window, cfg.spacing, cfg.nan, cfg.max_gib) == ("lung", "original", "zero", 8.0)
    assert predict.data_config(predict.load_network(runs("radar"), device="cpu")).modality == "voxel"
    assert predict.data_config(predict.load_network(runs("radar") / "last.pt", device="cpu")).modality == "voxel"


def test_denormalised_values_are_those_of_data():
    volume = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5)).astype(np.float32)
    intensity = Intensity("mr", (0.0, 10.0), (5.0, 400.0))
    origin = predict.Origin(".npy", (5, 4, 3, 2), "float32", (3, 4, 5))
    assert np.array_equal(predict.to_source_grid([(volume, intensity)], np.eye(4), origin), data.denormalise(volume, intensity))


@pytest.mark.parametrize("command", ["", *predict.COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main([command, "--help"] if command else ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and (f"predict.py {command}".strip() in text) and len(text.splitlines()) > 8


def test_as_a_script_piped(tmp_path, runs):
    """Plain lines, no tracebacks, exit code of the process."""
    path = ct_file(tmp_path / "a.nii.gz")
    done = subprocess.run([sys.executable, str(ROOT / "predict.py"), "reconstruct", "--checkpoint", str(runs("kl")), "--input", str(path),
                           str(path), "--output", str(tmp_path / "o")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout and done.stdout.count("\n") == 2, done
