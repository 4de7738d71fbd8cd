"""training/stages.py: what a stage may override, which config and which crops a step has."""
import dataclasses
import json

import pytest
import yaml

import data
from runs import STAGED, load_config
from tasks import TASKS
from training.config import changed
from training.order import crops_of_step
from training.stages import Stage, open_stages, planned, stage_configs, with_dial
from training.task import of
from volumes.files import DataError


def fresh(stage):
    """Not two names of one object, which YAML would write as an alias."""
    return json.loads(json.dumps(stage))


def with_stages(tmp_path, *stages, words=(), **sections):
    """The config of a file with these stages."""
    path = tmp_path / "stages.yaml"
    train = {"batch": 1, "stages": list(map(fresh, stages))}
    sections = {"data": {"patch": "4,8,8"}, "train": train} | sections
    path.write_text(yaml.safe_dump(sections))
    return load_config([*STAGED, "--config", str(path), *words])


# ------------------------------------------------------------------------------------------- the configs

def test_later_stages_keep_what_earlier_ones_override(tmp_path):
    cfg = with_stages(
        tmp_path,
        {"name": "low", "steps": 5, "loss": {"kl_weight": 0.5}, "optim": {"lr": 1e-2}},
        {"epochs": 2, "optim": {"lr": "1e-3"}, "train": {"accum": 3}},
        {"name": "fine", "steps": 7, "epochs": 9, "loss": {"adv_weight": 0.1}})
    found = stage_configs(cfg)
    assert list(found) == ["low", "2", "fine"]
    said = [(each.loss.kl_weight, each.loss.adv_weight, each.optim.lr, each.train.accum, each.train.steps,
             each.train.epochs) for each in found.values()]
    assert said == [(0.5, 0, 1e-2, 1, 5, None), (0.5, 0, 1e-3, 3, None, 2), (0.5, 0.1, 1e-3, 3, 7, 9)]
    alone = changed(cfg, train={"stages": ()})
    assert stage_configs(alone) == {"": alone}


def test_until_plateau_waits_as_the_rate_does_and_is_not_kept(tmp_path):
    cfg = with_stages(tmp_path, {"steps": 5, "until": "plateau"},
                      {"steps": 5, "until": "plateau", "train": {"patience": 2}},
                      {"steps": 5, "until": "end"}, optim={"plateau_patience": 3})
    assert [each.train.patience for each in stage_configs(cfg).values()] == [3, 2, 2]


@pytest.mark.parametrize("stage,says", [
    ({"vae": {"base_channels": 8}}, "stage s: vae cannot change between stages"),
    ({"task": "seg"}, "task cannot change"),
    ({"preset": "base"}, "preset cannot change"),
    ({"optim": {"optimizer": "sgd"}}, "optim.optimizer cannot change"),
    ({"train": {"seed": 1}}, "train.seed cannot change"),
    ({"train": {"ema": 0.9}}, "train.ema cannot change"),
    ({"train": {"precision": "master16"}}, "train.precision cannot change"),
    ({"train": {"stages": []}}, "train.stages cannot change"),
    ({"train": {"steps": 3}}, "write steps beside the stage's name"),
    ({"data": {"path": "x"}}, "data.path cannot change"),
    ({"data": {"val_fraction": 0.5}}, "data.val_fraction cannot change"),
    ({"data": {"window": "lung"}}, "data.window cannot change"),
    ({"data": {"split_seed": 3}}, "data.split_seed cannot change"),
    ({"loss": {"disc_channels": 8}}, "loss.disc_channels cannot change"),
    ({"loss": {"perceptual_features": "x"}}, "loss.perceptual_features cannot change"),
    ({"memory": {"tile_parallel": True}}, "memory.tile_parallel cannot change"),
    ({"log": {"wandb": True}}, "log.wandb cannot change"),
    ({"data": {"patchh": "8,8,8"}}, "did you mean data.patch?"),
    ({"dataa": {}}, "did you mean data?"),
    ({"data": 5}, "section data must hold"),
    ({"optim": {"lr": "fast"}}, "stage s: optim.lr must be a number, got 'fast'"),
    ({"train": {"batch": 0}}, "train.batch must be at least 1"),
    ({"steps": 0}, "needs steps or epochs"),
    ({"steps": None}, "needs steps or epochs"),
    ({"steps": -3}, "train.steps must be at least 1"),
    ({"until": "tired"}, "until must be end or plateau, got 'tired'"),
    ({"name": "a/b"}, "letters, digits and -"),
    ({"name": "first"}, "a name that no other stage has"),
    ({"train": {"stage": 1}}, "train.stage 1 trains the codebook alone, before all else"),
    ({"train": {"metric": "beauty"}}, "train.metric must be one of"),
])
def test_what_cannot_change_is_one_line_that_names_it(stage, says, tmp_path):
    with pytest.raises(ValueError) as error:
        with_stages(tmp_path, {"name": "first", "steps": 1}, {"name": "s", "steps": 2} | stage)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stages,words,says", [
    ([5], [], "holds stages such as"),
    ([{"steps": 1}], ["--train.stages", "low"], "in a YAML file"),
    ([{"steps": 1}], ["--epochs", "2"], "each stage has epochs of its own"),
])
def test_stages_that_are_none(stages, words, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        with_stages(tmp_path, *stages, words=words)


def test_flags_beat_stages_and_say_so(tmp_path, capsys):
    cfg = with_stages(tmp_path, {"steps": 1, "optim": {"lr": 1, "gamma": 0.5}},
                      {"steps": 1, "optim": {"lr": 2}}, words=["--optim.lr", "0.25", "--steps", "9"])
    found = stage_configs(cfg).values()
    assert [(each.optim.lr, each.optim.gamma) for each in found] == [(0.25, 0.5)] * 2
    assert "optim.lr: as the command line says, in every stage" in capsys.readouterr().out


def test_no_stages_by_flag(tmp_path):
    assert list(stage_configs(with_stages(tmp_path, {"steps": 1}, words=["--train.stages", ""]))) == [""]


# ------------------------------------------------------------------------------------------- the plan

def places(tmp_path, *stages, edges=(), words=()):
    cfg = with_stages(tmp_path, *stages, words=words)
    cfg, opened = open_stages(cfg, of(TASKS, cfg), lambda text: None)
    return planned(cfg, opened, cfg.train.batch * cfg.train.accum, edges)


def test_crops_are_numbered_through_the_run(tmp_path):
    """By hand: an epoch is 9 crops. Steps of 2 end within it, steps of 4 go on with the next crop."""
    first, second = places(tmp_path, {"steps": 4}, {"epochs": 2, "train": {"batch": 2}, "optim": {"lr": 1}})
    assert (first.epoch_length, first.global_batch, second.global_batch) == (9, 1, 2)
    assert [list(first.crops_of(step)) for step in range(4)] == [[0], [1], [2], [3]]
    assert (second.first, second.first_crop, second.steps, second.end) == (4, 4, 10, 14)
    assert [list(second.crops_of(step)) for step in range(4, 10)] == [
        [4, 5], [6, 7], [8], [9, 10], [11, 12], [13, 14]]
    assert [second.epoch_of(step) for step in (3, 4, 6, 7, 11, 12)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("length,batch,start", [(9, 4, 0), (9, 4, 5), (8, 4, 16), (5, 7, 3), (1, 2, 4)])
def test_a_start_within_an_epoch_leaves_no_crop_out(length, batch, start):
    taken = [crop for step in range(30, 60) for crop in crops_of_step(step, length, batch, (30, start))]
    assert taken == list(range(start, start + len(taken)))
    whole = [list(crops_of_step(step, length, batch)) for step in range(30)]
    assert [list(crops_of_step(step + 30, length, batch, (30, 0))) for step in range(30)] == whole


def test_a_stage_that_ended_early_moves_the_later_ones(tmp_path):
    stages = {"steps": 6}, {"steps": 6, "optim": {"lr": 1}}
    assert [(s.first, s.steps, s.end) for s in places(tmp_path, *stages)] == [(0, 6, 6), (6, 6, 12)]
    assert [(s.first, s.steps, s.end) for s in places(tmp_path, *stages, edges=[2])] == [(0, 6, 2), (2, 6, 8)]
    # train.steps ends the run, and leaves the schedules as they are.
    for most, wanted in ((8, [(0, 6, 6), (6, 6, 8)]), (6, [(0, 6, 6)]), (3, [(0, 6, 3)])):
        found = places(tmp_path, *stages, words=["--steps", str(most)])
        assert [(s.first, s.steps, s.end) for s in found] == wanted


def test_a_term_counts_its_start_from_the_stage_that_weighs_it_first(tmp_path):
    on = {"loss": {"adv_weight": 0.1, "disc_start": 2}}
    stages = places(tmp_path, {"steps": 5}, {"steps": 5} | on, {"steps": 5, "optim": {"lr": 1}},
                    {"steps": 5, "loss": {"adv_weight": 0}}, {"steps": 5} | on)
    assert [s.cfg.loss.disc_start for s in stages] == [0, 7, 7, 2, 22]


def test_stages_of_other_crops_share_the_volumes(tmp_path):
    first, second, third = places(tmp_path, {"steps": 1}, {"steps": 1, "data": {"patch": "8,16,16"}},
                                  {"steps": 1, "data": {"foreground": 0.5}})
    assert second.dataset.train is first.dataset.train and second.dataset.patch == (8, 16, 16)
    assert third.dataset.train is not first.dataset.train and third.dataset.patch == (8, 16, 16)
    assert data.Crops(second.dataset, 0)[0][0].shape == (1, 8, 16, 16)


def test_synthetic_volumes_have_no_other_grid(tmp_path):
    with pytest.raises(DataError, match="stage 1: data.scale has no effect on synthetic volumes"):
        places(tmp_path, {"steps": 1, "data": {"scale": 0.5}})


def test_the_dial_of_a_stage_is_kept_with_it_alone(tmp_path):
    cfg = with_stages(tmp_path, {"steps": 1}, {"steps": 1, "optim": {"lr": 1}},
                      {"steps": 1, "memory": {"mode": "checkpoint"}})
    opened = [Stage(name, each, None) for name, each in stage_configs(cfg).items()]
    dial = dataclasses.replace(cfg.memory, mode="tile", tile=(2, 4, 4))
    found = stage_configs(with_dial(cfg, opened, 1, dial)).values()
    assert [(each.memory.mode, each.memory.tile) for each in found] == [
        ("none", None), ("tile", (2, 4, 4)), ("checkpoint", None)]
    assert with_dial(cfg, opened, 1, opened[1].cfg.memory) == cfg
