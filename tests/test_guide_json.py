"""training/guide_json.py: the guide's four scenarios and every key of it, said and effective."""
import json

import pytest

from runs import load_config, make_step
from tasks import TASKS
from training import flags, guide_json

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
