"""training/config.py and training/flags.py: defaults, preset, YAML, flags; every field is read and told."""
import ast
import dataclasses
import json
import sys
import typing

import pytest

import train
from runs import CPU, ROOT, TINY, load_config, make_step
from tasks import TASKS
from test_imports import files
from training.adversary import disc_rate
from training.config import SECTIONS, TrainConfig, convert, to_yaml
from training.flags import field_comments
from training.task import named


def test_later_beats_earlier(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "preset: base\nvae: {num_res_blocks: 3}\noptim: {lr: 1e-4, weight_decay: 2e-2}\n"
        "data: {patch: [8, 16, 24]}\n")
    cfg = load_config(["--config", str(tmp_path / "c.yaml"), "--optim.lr", "5e-4",
                       "--vae.strides", "1,1,2;2,2,1", "--amp", "--accum=8"])
    assert cfg.vae.base_channels == 32 and cfg.vae.num_res_blocks == 3
    assert cfg.vae.strides == ((1, 1, 2), (2, 2, 1))
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.data.patch) == (5e-4, 2e-2, (8, 16, 24))
    assert (cfg.train.amp, cfg.train.accum) == (True, 8)
    (tmp_path / "again.yaml").write_text(to_yaml(cfg))
    assert load_config(["--config", str(tmp_path / "again.yaml")]) == cfg


@pytest.mark.parametrize("flags,says", [
    (["--presett", "base"], "did you mean --preset?"),
    (["--preset", "huge"], "got 'huge'"),
    (["--steps", "x"], "must be a whole"),
    (["--optim.learning_rate", "1"], "unknown flag --optim.learning_rate"),
    (["--steps", "1.5"], "'1.5'"),
    (["--patch", "8,8"], "D,H,W"),
    (["--vae.norm", "batch"], "none, group, layer"),
    (["--vae.strides", "2,2,2"], "one D,H,W triple between levels"),
    (["--config", "absent.yaml"], "absent.yaml"),
    (["--device", "tpu"], "tpu"),
    (["--data", "absent/folder"], "absent/folder"),
    (["--train.ema", "1"], "decays below 1"),
    (["--steps", "0"], "at least 1"),
    (["--log.tensorboard"], "pip install tensorboard"),
    (["--optim.lr", "nan"], "got nan"),
    (["--loss.channel_weights", "1,2"], "2 factors, the data has 1"),
    (["stray"], "stray"),
])
def test_bad_usage_is_one_line_and_exit_2(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.main([*TINY, *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("text,says", [
    ("optim: {lrr: 1}", "did you mean optim.lr?"),
    ("optm: {lr: 1}", "did you mean optim?"),
    ("- 1", "sections"),
    ("train: 5", "field: value"),
    ("train: {amp: maybe}", "true or false"),
    ("a: [", "YAML"),
    ("train: {steps: [1, 2]}", "whole number"),
])
def test_bad_yaml_is_one_line(text, says, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=None) as error:
        load_config(["--config", str(tmp_path / "c.yaml")])
    assert says in str(error.value)


@pytest.mark.slow
def test_every_config_and_preset_loads_builds_and_takes_a_step():
    """Sizes are cut, the networks are as they are. AdamW moves those of presets, since Muon takes seconds for
    the widest. All is in float32: of bf16 a process tries each network for seconds (tests/test_devices.py),
    and predictions take their steps in it.
    """
    experiments = sorted((ROOT / "config").glob("*.yaml"))
    assert experiments
    words = [["--config", str(path)] for path in experiments]
    words += [["--task", task, "--preset", name, "--optim.optimizer", "adamw"]
              for task in TASKS for name in named(TASKS, task).PRESETS]
    small = ["--patch", "8,24,24", "--batch", "1", "--accum", "1", "--device", "cpu", "--amp", "false"]
    for argv in words:
        assert make_step(load_config([*argv, *small]), CPU)().updated, argv


def test_every_field_is_read_somewhere():
    """A field nobody reads is a bug: several once were."""
    nodes = [node for path in files() for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for section in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(section.default_factory):
            for f in dataclasses.fields(section.default_factory):
                assert f.name in read, f"{section.name}.{f.name} is read nowhere"


def test_every_flag_has_a_comment_for_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help-all"])
    assert stop.value.code == 0 and "--optim.clip_window" in capsys.readouterr().out
    for section in SECTIONS:
        comments = field_comments(section.default_factory)
        names = [f.name for f in dataclasses.fields(section.default_factory)]
        missing = [name for name in names if not comments.get(name)]
        assert not missing, f"{section.name}: {missing} have no comment beside them"


@dataclasses.dataclass
class Commented:
    """Its help text is what stands beside the fields.

    short: not this # nor this
    """
    # of the first two
    short: int = 1                            # in one line
    long: int = 2                             # begins here,
                                              # goes on: here
                                              # and ends here
    # of the others
    below: str = "a value that leaves little place beside it"
                                              # stands below
    bare: int = 3

    def __post_init__(self):
        short: int = self.short               # no field
        self.bare = short                     # nor is this


def test_a_comment_goes_on_in_the_lines_below_its_field():
    assert field_comments(Commented) == {
        "short": "in one line", "long": "begins here, goes on: here and ends here", "below": "stands below",
        "bare": ""}


def test_every_flag_value_round_trips_through_its_type():
    """convert() accepts what str() of a default gives, for every field of every section."""
    for section in SECTIONS:
        hints = typing.get_type_hints(section.default_factory)
        for f in dataclasses.fields(section.default_factory):
            default = getattr(section.default_factory(), f.name)
            assert convert(json.loads(json.dumps(default)), hints[f.name], f.name) == default


def test_what_the_optimizer_is_where_nobody_says(tmp_path):
    """Muon for new autoencoders; AdamW for weights that are there, and for other tasks; each has its rate."""
    def of(*words: str) -> tuple[str, float]:
        optim = load_config(words).optim
        return optim.optimizer, optim.lr
    assert of() == ("muon", 1e-3)
    assert of("--optim.optimizer", "adamw") == of("--train.init", str(tmp_path)) == ("adamw", 5e-4)
    assert of("--task", "seg") == of("--task", "features") == ("adamw", 5e-4)
    assert of("--task", "seg", "--optim.optimizer", "muon") == ("muon", 1e-3)
    assert of("--optim.lr", "3e-4") == ("muon", 3e-4)
    # The discriminator's Adam has 5e-4 beside both.
    for name in ("muon", "adamw"):
        assert disc_rate(load_config(["--optim.optimizer", name, "--loss.adv_weight", "1"])) == 5e-4
