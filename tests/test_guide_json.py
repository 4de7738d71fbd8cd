"""training/guide_json.py: the guide's four scenarios and every key of it, said and effective."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from runs import flat, load_config, make_step, new_state
from tasks import TASKS, sparse
from training import fit, flags, guide_json
from training.config import changed
from training.order import MicroBatch, learning_rate
from training.step import train_step
from training.task import of
from volume_files import save
from volumes.files import DataError

# The guide's scenarios, cut to this machine by flags below.
NETWORK = {"resolution": 64, "model_channels": 512, "latent_channels": 16, "num_blocks": 8}
SCENARIOS = {
    "stage 1": {
        "models": {"vqvae": {"args": {**NETWORK, "use_checkpoint": False, "chunk_size": 1}}},
        "trainer": {"args": {"training_stage": 1, "batch_size_per_gpu": 2, "batch_split": 2,
                             "loss_type": "l1", "lr": 5e-3,
                             "lr_scheduler": {"name": "CosineAnnealingLR",
                                              "args": {"T_max": 100000, "eta_min": 5e-5}}}}},
    "stage 2": {
        "models": {"vqvae": {"args": {**NETWORK, "use_checkpoint": True, "chunk_size": 1}}},
        "trainer": {"args": {"training_stage": 2, "batch_size_per_gpu": 2, "batch_split": 2,
                             "loss_type": "l1_l2", "lr": 1e-4,
                             "lr_scheduler": {"name": "ExponentialLR", "args": {"gamma": 0.999}}}}},
    "short of memory": {
        "models": {"vqvae": {"args": {**NETWORK, "model_channels": 256, "num_blocks": 4,
                                      "use_checkpoint": True, "chunk_size": 4}}},
        "dataset": {"args": {"max_points": 50000}},
        "trainer": {"args": {"training_stage": 2, "batch_size_per_gpu": 1, "batch_split": 4,
                             "loss_type": "l1_l2"}}},
    "1024": {
        "models": {"vqvae": {"args": {"resolution": 128, "model_channels": 512, "use_checkpoint": True,
                                      "chunk_size": 8}}},
        "dataset": {"args": {"resolution": 1024, "max_points": 200000}},
        "trainer": {"args": {"batch_size_per_gpu": 1, "batch_split": 8}}},
}


def read(tmp_path, values, *words):
    path, said = tmp_path / "guide.json", []
    path.write_text(json.dumps(values))
    return flags.load_config(["--config", str(path), *words], TASKS, None, said.append), said


def test_the_scenarios_become_configs(tmp_path):
    cfg, _ = read(tmp_path, SCENARIOS["stage 1"])
    assert cfg.task == "sparse" and cfg.sparse.model_channels == 512 and cfg.sparse.codebooks == 1
    assert (cfg.train.batch, cfg.train.accum, cfg.loss.recon, cfg.optim.lr) == (1, 2, "l1", 5e-3)
    assert (cfg.optim.schedule, cfg.optim.lr_min, cfg.memory.mode) == ("cosine", 5e-5, "none")
    cfg, _ = read(tmp_path, SCENARIOS["stage 2"])
    assert cfg.memory.mode == "checkpoint" and cfg.loss.recon == "l1_l2"
    assert cfg.optim.schedule == "exponential" and cfg.optim.gamma == pytest.approx(.999 ** 100000, rel=1e-6)
    cfg, said = read(tmp_path, SCENARIOS["short of memory"])
    assert (cfg.memory.mode, cfg.memory.tile) == ("tile", (128, 128, 128)) and cfg.data.max_points == 50000
    assert (cfg.train.batch, cfg.train.accum) == (1, 1)
    assert any("cannot be split in 4" in line for line in said)
    cfg, _ = read(tmp_path, SCENARIOS["1024"])
    assert cfg.memory.tile == (128, 128, 128) and cfg.data.patch == (1024, 1024, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_scenarios_take_a_step(tmp_path, name):
    cut = ["--sparse.model_channels", "64", "--sparse.num_blocks", "1", "--sparse.num_codes", "16",
           "--patch", "32,32,32", "--data.max_points", "1500"]
    cfg, _ = read(tmp_path, SCENARIOS[name], *cut)
    assert make_step(cfg, "cpu")().updated


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_scenarios_run_from_the_file_to_a_checkpoint(tmp_path, name):
    """Cut: the sizes of the network and of the crops, and two steps."""
    grid = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1)
    for number, radius in enumerate((9, 12)):
        inside = np.linalg.norm(grid - 19.5, axis=-1) < radius
        save(tmp_path / "in" / f"ball{number}.nii.gz", np.where(inside, 40, -1000).astype(np.int16))
    (tmp_path / "guide.json").write_text(json.dumps(SCENARIOS[name]))
    cut = ["--sparse.model_channels", "64", "--sparse.num_blocks", "1", "--sparse.num_codes", "16",
           "--patch", "32,32,32", "--data.max_points", "1500", "--steps", "2", "--train.latent_crops", "2",
           "--train.val_crops", "1", "--log.sample_every", "0", "--device", "cpu"]
    assert train.main(["--config", str(tmp_path / "guide.json"), "--data", str(tmp_path / "in"),
                       "--data.cache_dir", str(tmp_path / "cache"), *cut, "--out", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r" / "best.pt").exists()


CHANGES = {
    "models": {"model_channels": 256, "latent_channels": 8, "num_blocks": 4, "num_embeddings": 1024,
               "num_heads": 4, "num_head_channels": 32, "mlp_ratio": 2.0, "attn_mode": "full",
               "window_size": 4, "pe_mode": "rope", "use_fp16": True, "use_checkpoint": True, "chunk_size": 4,
               "qk_rms_norm": True},
    "dataset": {"resolution": 256, "window_type": "bone", "min_points": 50, "max_points": 9000},
    "trainer": {"max_steps": 500, "max_epoch": 3, "batch_size_per_gpu": 4, "num_workers": 2,
                "loss_type": "mse", "lambda_vq": 0.5, "lambda_commitment": 0.5, "fp16_mode": "inflat_all",
                "ema_rate": [0.999], "i_print": 77, "i_sample": 78, "i_save": 79, "i_ddpcheck": 80,
                "disable_snapshot": True, "optimizer": {"name": "SGD", "args": {"lr": 0.1}},
                "lr": 0.2, "lr_scheduler": {"name": "StepLR"}, "grad_clip": 0.3},
}
NAMED = {"models": ["resolution", "representation_config"], "dataset": ["cache_data", "precompute_sparse"],
         "trainer": ["fp16_scale_growth", "i_log"]}


def guide_of(part, key, value):
    args = {"args": {key: value}}
    return {"models": {"vqvae": args}} if part == "models" else {part: args}


@pytest.mark.parametrize("part, key", [(part, key) for part, keys in CHANGES.items() for key in keys])
def test_every_key_with_a_meaning_changes_the_config_and_says_what_it_became(tmp_path, part, key):
    before, _ = read(tmp_path, {"trainer": {"args": {}}})
    after, said = read(tmp_path, guide_of(part, key, CHANGES[part][key]))
    assert after != before
    assert any(f"{part}.{key}" in line and "->" in line for line in said), said


@pytest.mark.parametrize("part, key", [(part, key) for part, keys in NAMED.items() for key in keys])
def test_a_key_without_a_meaning_is_named_with_the_reason(tmp_path, part, key):
    before, _ = read(tmp_path, {"trainer": {"args": {}}})
    after, said = read(tmp_path, guide_of(part, key, 0.5))
    line = next(line for line in said if f"{part}.{key}: no meaning here" in line)
    assert after == before and len(line.split("no meaning here, ")[1]) > 15


# -------------------------------------------------------------------------------- what each key does

SMALL = {
    "models": {"model_channels": 64, "latent_channels": 4, "num_blocks": 2, "num_embeddings": 16,
               "num_head_channels": 16, "window_size": 2},
    "dataset": {"resolution": 24, "min_points": 1},
    "trainer": {"max_steps": 20, "batch_size_per_gpu": 2, "batch_split": 2},
}
# Where each key shows: in the weights after some steps (output), in the predicted bytes of a step (memory),
# in the crops (data), or in what a run does, which tests of the named files look at.
OUTPUT = {
    "models": {"model_channels": 32, "latent_channels": 6, "num_blocks": 1, "num_embeddings": 8,
               "num_heads": 2, "num_head_channels": 32, "mlp_ratio": 2.0, "attn_mode": "shift_sequence",
               "window_size": 4, "pe_mode": "rope", "qk_rms_norm": True},
    "trainer": {"loss_type": "mse", "lambda_vq": 0.5, "lambda_commitment": 0.5, "fp16_mode": "inflat_all",
                "ema_rate": [0.9], "lr": 0.01, "optimizer": {"name": "SGD"}, "max_steps": 40,
                "lr_scheduler": {"name": "StepLR"}, "grad_clip": 0.01},
}
MEMORY = {
    "models": {"use_fp16": True, "use_checkpoint": True, "chunk_size": 2},
    "trainer": {"batch_size_per_gpu": 4, "batch_split": 1, "fp16_mode": "amp"},
}
DATA = {"dataset": {"resolution": 16, "window_type": "bone", "min_points": 500_000, "max_points": 300}}
OF_RUNS = {
    "training_stage": ("test_sparse_task.py", "test_stage_1_trains_the_codebook_alone"),
    "pretrained_vae_path": ("test_sparse_task.py", "test_stages_go_on_from_one_another"),
    "max_epoch": ("test_order.py", '"--epochs"'), "num_workers": ("test_data.py", "num_workers=workers"),
    "i_print": ("test_distributed.py", '"--log.every", "1"'),
    "i_sample": ("test_diffusion_task.py", '"--log.sample_every", "8"'),
    "disable_snapshot": ("runs.py", '"--log.sample_every", "0"'),
    "i_save": ("test_folder.py", '"--train.save_every", "1"'),
    "i_ddpcheck": ("test_distributed.py", '"--log.ddp_check", "1"'),
}


def config_of(tmp_path, part, change):
    values = {name: dict(args) for name, args in SMALL.items()}
    values[part].update(change)
    models = {"vqvae": {"args": values["models"]}}
    parts = {"models": models} | {name: {"args": values[name]} for name in ("dataset", "trainer")}
    return read(tmp_path, parts, "--device", "cpu")[0]


def keys_of(table):
    return [(part, key) for part, keys in table.items() for key in keys]


def weights_after_steps(cfg):
    """Three steps on a ball's surface, beyond the warm-up -> weights of the network and its averages."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(24)] * 3, indexing="ij"), -1).float()
    distance = ((grid - 11).norm(dim=-1) - 8) / 2
    image = torch.where(distance.abs() <= 1, distance, 0.0)[None, None]
    state = new_state(cfg)
    state.step = 12
    points = sparse.points_of(image, "cpu")
    tables = state.model.tables(points.code, points.size)
    state.model.start_linear(sparse.sparse.patches(points.feats, tables))
    for number in range(3):
        rate = learning_rate(cfg.optim, state.step, cfg.train.steps)
        train.set_rates(cfg, state, rate)
        train_step(cfg, state, [MicroBatch(image * (1 + number / 4), [number], [0])])
        state.step += 1
    return torch.cat([flat(module).float() for module in (state.model, *state.emas)])


@pytest.mark.slow
@pytest.mark.parametrize("part, key", keys_of(OUTPUT))
def test_the_key_changes_the_output(tmp_path, part, key):
    before = weights_after_steps(config_of(tmp_path, part, {}))
    after = weights_after_steps(config_of(tmp_path, part, {key: OUTPUT[part][key]}))
    assert len(before) != len(after) or not torch.equal(before, after)


@pytest.mark.slow
def test_the_keys_change_the_memory(tmp_path):
    def predicted(part, change):
        cfg = config_of(tmp_path, part, change)
        tile = cfg.memory.tile and (32, 32, 32)                   # of the 24 voxels of `resolution`
        cfg = changed(cfg, data={"patch": (64, 64, 64), "max_points": 20_000}, memory={"tile": tile})
        return fit.predicted(cfg, of(TASKS, cfg), "cuda").bytes
    before = predicted("models", {})
    for part, key in keys_of(MEMORY):
        after = predicted(part, {key: MEMORY[part][key]})
        assert after > before if key.startswith("batch") else after < before, (key, after, before)


@pytest.mark.parametrize("part, key", keys_of(DATA))
def test_the_key_changes_the_data(tmp_path, part, key):
    grid = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1)
    hu = 900 - 100 * np.linalg.norm(grid - 19.5, axis=-1)         # -500 at 14 voxels, 300 at 6
    save(tmp_path / "in" / "ball.nii.gz", hu.clip(-1000, 900).astype(np.int16))

    def crops(change):
        cfg = config_of(tmp_path, part, change).data
        cfg = dataclasses.replace(cfg, path=str(tmp_path / "in"), cache_dir=str(tmp_path / "cache"),
                                  points=True, modality="ct")
        dataset = data.open_data(cfg, 0, lambda text: None)
        return [data.Crops(dataset, 0)[number][0] for number in range(4)]
    before = crops({})
    try:
        after = crops({key: DATA[part][key]})
    except DataError as error:
        assert key == "min_points" and "data.min_points is 500000" in str(error)
        return
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after))


def test_every_key_of_the_guide_shows_somewhere():
    shown = {(part, key) for table in (OUTPUT, MEMORY, DATA) for part, key in keys_of(table)}
    shown |= {("trainer", key) for key in OF_RUNS}
    known = {(part, key) for part, keys in CHANGES.items() for key in keys}
    assert known <= shown
    folder = Path(__file__).parent
    for file, text in OF_RUNS.values():
        assert text in (folder / file).read_text(encoding="utf-8"), (file, text)


def test_what_the_guide_does_not_have_is_named_and_a_wrong_form_refused(tmp_path):
    _, said = read(tmp_path, {"trainer": {"args": {"fancy": 3}}, "notes": "x"})
    assert any("trainer.fancy: no meaning here, the guide does not have it" in line for line in said)
    assert any("notes: no meaning here" in line for line in said)
    with pytest.raises(ValueError, match="trainer must hold `args`"):
        read(tmp_path, {"trainer": [1]})
    with pytest.raises(ValueError, match="sparse.attention=fancy; choose one of"):
        read(tmp_path, guide_of("models", "attn_mode", "fancy"))


def test_weights_that_are_not_there_are_said_and_those_that_are_begin_the_stage(tmp_path):
    missing = {"trainer": {"args": {"training_stage": 1, "pretrained_vae_path": "./weights/none.pth"}}}
    cfg, said = read(tmp_path, missing)
    assert cfg.train.stage == 0 and cfg.train.init is None
    assert any("there is no ./weights/none.pth" in line for line in said)
    run = tmp_path / "run"
    run.mkdir()
    missing["trainer"]["args"]["pretrained_vae_path"] = str(run)
    found = guide_json.translated(missing, "x.json", said.append)
    assert found["train"]["stage"] == 1 and found["train"]["init"] == str(run)


def test_flags_beat_the_file(tmp_path):
    cfg, _ = read(tmp_path, SCENARIOS["stage 1"], "--sparse.model_channels", "128")
    assert cfg.sparse.model_channels == 128
    assert load_config(["--task", "sparse"]).sparse.codebooks == 4
