"""tasks/sparse.py in the house: a step, memory modes, recovery, resume, prediction, figures, predict.py."""
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch

import memtest
import peaks
import predict
import train
from data import open_data
from runs import (
    CPU,
    RunsOut,
    assert_equal_runs,
    flat,
    gradients,
    load_config,
    make_step,
    new_state,
    resume,
    rows,
)
from tasks import TASKS, sparse
from training import fit
from training.order import MicroBatch
from training.step import train_step
from training.task import of
from volume_files import save

NETWORK = ["--task", "sparse", "--preset", "sparse_light", "--sparse.model_channels", "32",
           "--sparse.head_channels", "8", "--sparse.num_blocks", "1", "--sparse.z_channels", "4",
           "--sparse.num_codes", "16", "--sparse.codebooks", "2", "--device", "cpu"]
SHORT = ["--patch", "24,24,24", "--batch", "1", "--data.crops_per_volume", "3", "--train.val_crops", "2",
         "--train.latent_crops", "3", "--log.sample_every", "0", "--data.smooth", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Balls of soft tissue in air, 40x36x32 voxels."""
    path = tmp_path_factory.mktemp("balls")
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(36), np.arange(32), indexing="ij"), -1)
    for number, radius in enumerate((8, 10, 12, 14)):
        inside = np.linalg.norm(grid - (19.5, 17.5, 15.5), axis=-1) < radius
        save(path / f"ball{number}.nii.gz", np.where(inside, 40, -1000).astype(np.int16))
    return path


def run(folder, out, *words):
    return train.main([*NETWORK, *SHORT, "--data", str(folder), "--data.cache_dir", str(folder / "cache"),
                       *words, "--out", str(out)])


def crops(count, edge=24, seed=0):
    """(count, 1, edge^3) distances to balls, 0 beyond a band of 2."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(edge)] * 3, indexing="ij"), -1).float()
    source = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        middle = edge / 2 + 4 * (torch.rand(3, generator=source) - .5)
        distance = ((grid - middle).norm(dim=-1) - edge / 3) / 2
        found.append(torch.where(distance.abs() <= 1, distance, 0.0))
    return torch.stack(found)[:, None]


def state_of(*words):
    cfg = load_config([*NETWORK, *SHORT, *words])
    return cfg, new_state(cfg)


def micro(image, first=0):
    return MicroBatch(image, [100 + first + n for n in range(len(image))], [0] * len(image))


def gradient_of(*words, parts=(2,), image=None):
    cfg, state = state_of("--optim.grad_clip", "0", *words)
    state.model.start_linear(sparse.sparse.patches(*patches_input(state.model, crops(2))))
    image = crops(2) if image is None else image
    pieces, first = [], 0
    for count in parts:
        pieces.append(micro(image[first:first + count], first))
        first += count
    result = train_step(cfg, state, pieces)
    return gradients(state.model), result, state


def patches_input(model, image):
    points = sparse.points_of(image, CPU)
    return points.feats, model.tables(points.code, points.size, points.samples)


def test_points_of_crops_are_their_voxels():
    image = crops(2)
    image[1, :, :, :, 20:] = 0
    points = sparse.points_of(image, CPU)
    assert len(points) == 2 and points.shape == (2, 1, 24, 24, 24) and len(points.code) == (image != 0).sum()
    bits = sparse.sparse_tables.grid_bits(points.size)
    first = sparse.sparse_tables.sample_of(points.code, bits) == 0
    grid = sparse.grid_of(points.code[first], points.feats[first], points.size)
    assert torch.equal(grid, image[0])


@pytest.mark.parametrize("words", [[], ["--sparse.bottleneck", "kl"],
                                   ["--sparse.bottleneck", "fsq", "--sparse.fsq_levels", "5,5,5"]])
@pytest.mark.slow
def test_the_terms_are_means_over_points_and_children(words):
    """By loops over the crop's voxels, apart from the tables."""
    cfg, state = state_of(*words, "--loss.recon", "mse", "--loss.kl_weight", "0.01")
    image = crops(1)
    found = sparse.objective(cfg, state, state.model, micro(image), [torch.Generator().manual_seed(0)])
    points = sparse.points_of(image, CPU)
    recon = sparse.grid_of(points.code, found.out.recon, points.size)
    mse = ((recon - image[0]) ** 2)[image[0] != 0].mean()
    torch.testing.assert_close(found.terms["mse"], mse)

    # Children of a parent at each level, from pooled masks.
    mask = (image != 0).float()
    total = 0
    for logits, edge in zip(found.out.occupancy, (8, 4, 2)):
        parents = torch.nn.functional.max_pool3d(mask, edge)[0, 0]
        children = torch.nn.functional.max_pool3d(mask, edge // 2)[0, 0] if edge > 2 else mask[0, 0]
        wanted = []
        for d, h, w in parents.nonzero().tolist():
            wanted.append(children[2 * d:2 * d + 2, 2 * h:2 * h + 2, 2 * w:2 * w + 2].flatten().tolist())
        wanted = torch.tensor(wanted)
        # In Z-order: sort parents by the interleaved bits of their places.
        order = sorted(range(len(wanted)), key=lambda n: morton(parents.nonzero()[n].tolist()))
        total = total + torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted[order]) / 3
    torch.testing.assert_close(found.terms["occupancy"], total)
    more = found.terms.get("vq")
    more = 0.01 * found.terms["kl"] if more is None else more
    torch.testing.assert_close(found.terms["loss"], mse + total + more)


def morton(place):
    return int("".join(str(n >> bit & 1) for bit in reversed(range(8)) for n in place), 2)


def test_the_occupancy_weight_and_the_band_of_the_encoder_count():
    a, _, _ = gradient_of()
    b, _, _ = gradient_of("--sparse.occupancy_weight", "0")
    c, _, _ = gradient_of("--sparse.input_band", "0.5")
    assert not torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.slow
def test_memory_modes_give_the_same_gradient_and_tiles_what_they_draw():
    # KL has no ties that rounding could break.
    flags = ["--sparse.bottleneck", "kl"]
    whole, result, _ = gradient_of(*flags)
    for mode in (["--memory.mode", "checkpoint"], ["--memory.mode", "tile", "--memory.tile", "8,8,8"]):
        found, other, _ = gradient_of(*flags, *mode)
        assert (found - whole).abs().max() < 1e-5
        assert abs(float(other.terms["loss"] - result.terms["loss"])) < 1e-5
    drawn, other, _ = gradient_of(*flags, "--memory.mode", "tile", "--memory.tile", "8,8,8",
                                  "--memory.tiles", "4")
    assert not torch.allclose(drawn, whole, atol=1e-4) and math.isfinite(float(other.terms["loss"]))


@pytest.mark.slow
def test_out_of_memory_turns_the_dial_down_to_the_least_tile(tmp_path, folder, monkeypatch, capsys):
    short = [RunsOut([9, 30, 60, 60, 60, 60, 60])]

    def short_of_memory(cfg, state, batches):
        with short[0]:
            return train_step(cfg, state, batches)
    monkeypatch.setattr(train, "train_step", short_of_memory)
    assert run(folder, tmp_path / "r", "--steps", "1") == 1
    changes = [row["change"] for row in rows(tmp_path / "r", "memory")]
    assert ["none -> checkpoint" in changes[0], "checkpoint -> tile" in changes[1]] == [True, True]
    assert "tile 32,32,32" in changes[2] and "tile 8,8,8" in changes[4] and len(changes) == 5
    assert "the last step of the dial" in capsys.readouterr().err


@pytest.mark.slow
def test_it_trains_is_stopped_and_resumed_to_the_bit(tmp_path, folder):
    flags = ["--train.val_every", "4", "--train.ema", "0.9", "--accum", "2", "--optim.lr", "3e-3",
             "--optim.clip_percentile", "90", "--optim.clip_window", "3"]
    assert run(folder, tmp_path / "whole", "--steps", "12", *flags) == 0
    val = rows(tmp_path / "whole", "val")
    assert val[-1]["l1"] < val[0]["l1"] and val[-1]["iou"] > val[0]["iou"]
    assert {"sign", "l1_constant", "l1_pca", "surface_dice"} <= val[0].keys()
    usage = [row["codebook_usage"] for row in rows(tmp_path / "whole", "train") if "codebook_usage" in row]
    assert usage and 0 < usage[-1] <= 1

    def stop(cfg, state, batches):
        if state.step == 7:
            import signal
            signal.raise_signal(signal.SIGINT)
        return train_step(cfg, state, batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", stop)
        assert run(folder, tmp_path / "cut", "--steps", "12", *flags) == 130
    assert resume(tmp_path / "cut") == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_micro_batches_and_a_batch_are_one_step():
    flags = ["--sparse.bottleneck", "kl", "--sparse.occupancy_weight", "0"]
    image = crops(1).repeat(2, 1, 1, 1, 1)                     # as many points in each
    one, _, _ = gradient_of(*flags, parts=(2,), image=image)
    two, _, _ = gradient_of(*flags, parts=(1, 1), image=image)
    assert (one - two).abs().max() < 1e-5


def test_flipped_signs_are_learnt_through_the_latent():
    """With the sign of each crop drawn at random a network whose latent does not carry it is right half of
    the time.
    """
    cfg, state = state_of("--sparse.bottleneck", "kl", "--optim.optimizer", "adamw", "--optim.lr", "3e-3",
                          "--optim.warmup", "0")
    state.model.start_linear(sparse.sparse.patches(*patches_input(state.model, crops(4))))
    source = torch.Generator().manual_seed(0)
    for step in range(12):
        sign = torch.randint(2, (1,), generator=source) * 2 - 1
        train_step(cfg, state, [micro(sign * crops(1, seed=step))])
        state.step += 1
    found = []
    for sign in (1, -1):
        image = sign * crops(1, seed=99)
        out = sparse.objective(cfg, state, state.model, micro(image), [torch.Generator().manual_seed(0)]).out
        feats = sparse.points_of(image, CPU).feats
        found.append(((out.recon > 0) == (feats > 0)).float().mean().item())
    assert min(found) > .65, found


def predicted(*words):
    """Of a step of a preset as it is."""
    cfg = load_config(["--task", "sparse", "--device", "cpu", "--batch", "1", *words])
    return fit.predicted(cfg, of(TASKS, cfg), CPU)


@pytest.mark.slow
def test_tiles_of_a_quarter_take_a_third_of_the_peak():
    """Of 500,000 points in a ball of some 24 tokens across; with the tables, which are of all points."""
    points = ["--preset", "sparse_light", "--data.max_points", "500000", "--patch", "256,256,256"]
    whole = predicted(*points)
    tiled = predicted(*points, "--memory.mode", "tile", "--memory.tile", "64,64,64")
    assert tiled.bytes <= whole.bytes / 3, tiled.bytes / whole.bytes


@pytest.mark.slow
def test_the_guides_network_takes_what_the_docs_page_says():
    """sparse_512 on 500,000 points in bf16: 3 GiB, checkpointed 2."""
    points = ["--preset", "sparse_512", "--data.max_points", "500000", "--patch", "256,256,256"]
    for words, gib in (([], 3), (["--memory.mode", "checkpoint"], 2)):
        cfg = load_config(["--task", "sparse", "--amp", "--batch", "1", *points, *words])
        assert fit.predicted(cfg, of(TASKS, cfg), "cuda").bytes <= gib * peaks.GIB


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--memory.mode", "checkpoint"],
                                   ["--memory.mode", "tile", "--memory.tile", "16,16,16"]])
def test_the_predicted_peak_is_the_counted_one(words):
    cfg = load_config([*NETWORK, *SHORT, "--patch", "32,32,32", "--data.max_points", "4000", *words])
    predicted = fit.predicted(cfg, of(TASKS, cfg), CPU).bytes
    counted = peaks.count(lambda device: make_step(cfg, device)).bytes
    assert abs(predicted - counted) <= .1 * counted


def test_memtest_takes_the_points_of_a_number_or_of_a_data_set(folder):
    """The densest crop of the set is what a step is predicted for."""
    flags = [*NETWORK, "--patch", "24,24,24", "--data.smooth", "0"]
    of_set = ["--data", str(folder), "--data.cache_dir", str(folder / "cache")]

    def points(*words):
        return memtest.asked_for([*flags, *words]).cfg.data.max_points
    dataset = open_data(load_config([*flags, *of_set, "--data.points", "true"]).data, 0, lambda text: None)
    most = max(int((entry.read((slice(d, d + 24), slice(h, h + 24), slice(w, w + 24))) != 0).sum())
               for entry in (*dataset.train, *dataset.val)
               for d in (0, 8, 16) for h in (0, 8, 16) for w in (0, 8, 16))
    assert points(*of_set) == most > 1000
    assert points(*of_set, "--data.max_points", "500") == points("--data.max_points", "500") == 500
    assert points(*of_set, "--data.max_points", "50000") == most


@pytest.mark.parametrize("words", [[], ["--sparse.codebooks", "1", "--sparse.codebook_update", "gradient"],
                                   ["--sparse.bottleneck", "kl"],
                                   ["--sparse.bottleneck", "fsq", "--sparse.fsq_levels", "5,5,5"]])
def test_weights_of_16_bits_make_a_step(words):
    cfg, state = state_of("--train.precision", "master16", *words)
    before = flat(state.model).clone()
    result = train_step(cfg, state, [micro(crops(1))])
    assert result.updated and state.model.lin_in.weight.dtype == torch.float16
    assert not torch.equal(before, flat(state.model))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--memory.mode", "tile", "--memory.tile", "8,8,8"]])
def test_a_step_in_bfloat16_has_about_the_gradient_of_float32(mode):
    """Weights, latents and what the linear path gives stay in float32."""
    whole, _, _ = gradient_of("--sparse.bottleneck", "kl")
    cfg, state = state_of("--optim.grad_clip", "0", "--sparse.bottleneck", "kl", *mode)
    state.model.start_linear(sparse.sparse.patches(*patches_input(state.model, crops(2))))
    state.amp_dtype = torch.bfloat16
    result = train_step(cfg, state, [micro(crops(2))])
    found = gradients(state.model)
    assert result.updated and found.dtype == torch.float32 and not torch.equal(found, whole)
    assert torch.nn.functional.cosine_similarity(found, whole, 0) > .99
    with torch.autocast("cpu", torch.bfloat16):
        feats, tables = patches_input(state.model, crops(2))
        assert state.model(feats, tables).recon.dtype == torch.float32


def test_surface_dice_by_hand():
    plane = torch.zeros(8, 6, 6)
    plane[3], plane[4] = -.25, .25
    assert sparse.surface_dice(plane, plane) == 1
    assert sparse.surface_dice(plane, plane.roll(1, 0)) == 1    # within a voxel
    assert sparse.surface_dice(plane, plane.roll(2, 0)) == 0
    half = plane.clone()
    half[:, :3] = 0
    # 18 of 36 voxels are there; of the whole plane those and the row beside them are near: (18 + 24) / 54.
    assert sparse.surface_dice(plane, half) == pytest.approx((18 + 24) / 54)
    assert math.isnan(sparse.surface_dice(torch.zeros(3, 3, 3), torch.zeros(3, 3, 3)))


def test_figures_of_a_crop_by_hand():
    image = torch.zeros(1, 1, 8, 8, 8)
    image[0, 0, 2, 2, :4] = torch.tensor([-.5, .5, .25, 1.0])
    points = sparse.points_of(image, CPU)
    shift = points.feats * torch.tensor([[1.0], [1], [-1], [1]])
    # Decoded: two of the four, and one elsewhere.
    code = torch.cat([points.code[:2], points.code[-1:] + 300])
    values = torch.cat([points.feats[:2] + .1, torch.ones(1, 1)])
    found = sparse.compared(points, code, values, shift, 0 * shift)
    assert found["iou"] == pytest.approx(2 / 5) and found["sign"] == pytest.approx(3 / 4)
    flipped = 2 * points.feats[2].abs().item()
    assert found["l1"] == pytest.approx(flipped / 4)
    assert found["l1_decoded"] == pytest.approx(.1)
    assert found["l1_pca"] == pytest.approx((.5 + .5 + .25 + 1) / 4)
    median = .25
    assert found["l1_constant"] == pytest.approx((.75 + .25 + 0 + .75) / 4) and median == .25


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--sparse.codebooks", "1"], ["--sparse.bottleneck", "kl"],
                                   ["--sparse.bottleneck", "fsq", "--sparse.fsq_levels", "5,5,5"]])
def test_tokens_alone_decode_to_the_reconstruction_to_the_bit(tmp_path, folder, words):
    assert run(folder, tmp_path / "r", "--steps", "3", *words) == 0
    use = ["--checkpoint", str(tmp_path / "r"), "--device", "cpu"]
    source = ["--input", str(folder / "ball1.nii.gz")]
    assert predict.main(["reconstruct", *use, *source, "--output", str(tmp_path / "a")]) == 0
    assert predict.main(["encode", *use, *source, "--output", str(tmp_path / "z")]) == 0
    tokens = ["--input", str(tmp_path / "z")]
    assert predict.main(["decode", *use, *tokens, "--output", str(tmp_path / "b")]) == 0
    a, b = (tmp_path / name / "ball1.nii.gz" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    written, original = nib.load(a), nib.load(folder / "ball1.nii.gz")
    assert written.shape == original.shape and np.allclose(written.affine, original.affine)
    values = written.get_fdata()
    assert np.abs(values).max() <= 2.01                         # voxels; beyond the band its width

    # And the inside as a mask, of either.
    assert predict.main(["decode", *use, *tokens, "--output", str(tmp_path / "m"), "--mask"]) == 0
    assert predict.main(["reconstruct", *use, *source, "--output", str(tmp_path / "n"), "--mask"]) == 0
    mask, same = (nib.load(tmp_path / name / "ball1.nii.gz") for name in "mn")
    assert np.array_equal(mask.get_fdata(), values < 0) and np.array_equal(same.get_fdata(), values < 0)
    assert mask.get_data_dtype() == np.uint8 and np.allclose(mask.affine, original.affine)

    found = tmp_path / "e.json"
    assert predict.main(["evaluate", *use, "--data", str(folder / "ball1.nii.gz"), "--json", str(found)]) == 0
    row = json.loads(found.read_text())["volumes"][0]
    assert {"iou", "l1", "sign", "surface_dice", "bits_per_voxel", "points", "tokens"} <= row.keys()
    if "kl" not in words:
        tokens, each = row["tokens"], {0: 2 * 4, 2: 4}.get(len(words), math.log2(125))
        cells = 5 * 5 * 4
        where = math.log2(math.comb(cells, tokens))
        assert row["bits_per_voxel"] == pytest.approx((where + tokens * each) / (40 * 36 * 32))


@pytest.mark.slow
def test_two_surfaces_are_two_channels_from_the_file_to_the_masks(tmp_path, folder):
    two = ["--data.surface=-500,0", "--data.window", "none"]
    assert run(folder, tmp_path / "r", "--steps", "2", *two) == 0
    assert "in_channels: 2" in (tmp_path / "r" / "config.yaml").read_text()
    use = ["--checkpoint", str(tmp_path / "r"), "--device", "cpu"]
    source = ["--input", str(folder / "ball1.nii.gz")]
    assert predict.main(["reconstruct", *use, *source, "--output", str(tmp_path / "a")]) == 0
    assert predict.main(["encode", *use, *source, "--output", str(tmp_path / "z")]) == 0
    tokens = ["--input", str(tmp_path / "z"), "--output", str(tmp_path / "m"), "--mask"]
    assert predict.main(["decode", *use, *tokens]) == 0
    distance, mask = (nib.load(tmp_path / name / "ball1.nii.gz") for name in "am")
    assert distance.shape == mask.shape == (*nib.load(folder / "ball1.nii.gz").shape, 2)
    assert np.array_equal(mask.get_fdata(), distance.get_fdata() < 0)


def test_stage_1_trains_the_codebook_alone():
    cfg, state = state_of("--train.stage", "1", "--train.init", "x")
    assert not any(p.requires_grad for p in state.model.parameters())
    with pytest.raises(ValueError, match="sparse.bottleneck is kl; add --sparse.bottleneck vq"):
        state_of("--train.stage", "1", "--train.init", "x", "--sparse.bottleneck", "kl")


@pytest.mark.slow
def test_stages_go_on_from_one_another_as_the_docs_page_says(tmp_path, folder):
    """Without codes, then the codebook alone, then all: docs/SPARSE.md."""
    gaussian = ["--sparse.bottleneck", "kl"]
    assert run(folder, tmp_path / "a", "--steps", "2", *gaussian) == 0
    first = ["--init", str(tmp_path / "a"), "--train.stage", "1"]
    assert run(folder, tmp_path / "b", "--steps", "2", *first) == 0
    # --init takes the best weights.
    files = "a/best.pt", "b/last.pt"
    before, after = (torch.load(tmp_path / name, weights_only=True)["model"] for name in files)
    kept = [name for name in before.keys() & after.keys()]
    assert len(kept) > 40 and all(torch.equal(before[name], after[name]) for name in kept)
    second = ["--init", str(tmp_path / "b"), "--train.stage", "2"]
    assert run(folder, tmp_path / "c", "--steps", "2", *second) == 0
    final = torch.load(tmp_path / "c" / "last.pt", weights_only=True)["model"]
    assert not torch.equal(after["lin_in.weight"], final["lin_in.weight"])
