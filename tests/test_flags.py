"""training/flags.py and training/spellings.py: the short help, names from elsewhere, cubes, strides."""
import re

import pytest

import memtest
import predict
import train
from runs import ROOT, load_config
from tasks import TASKS
from training import spellings
from training.config import SECTIONS
from training.flags import EVERYDAY, build_parser

KNOWN = build_parser(TASKS)._option_string_actions


def error_of(*words):
    with pytest.raises(ValueError) as error:
        load_config(words)
    return str(error.value)


def test_help_is_one_screen_of_flags_that_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and 20 < len(lines) <= 50 and max(map(len, lines)) <= 110
    named = set(spellings.named_in(EVERYDAY)) - {"--nproc_per_node"}
    assert len(named) > 40 and named <= KNOWN.keys(), named - KNOWN.keys()
    assert all(name in EVERYDAY for name in ("--data", "--patch", "--fit", "--resume", "--help-all"))


@pytest.mark.parametrize("theirs, section, field, value", [
    ("--lr=1e-3", "optim", "lr", 1e-3), ("--learning-rate 1e-3", "optim", "lr", 1e-3),
    ("--batch_size 4", "train", "batch", 4), ("-b 4", "train", "batch", 4), ("-e 7", "train", "epochs", 7),
    ("--latent_channels 8", "vae", "z_channels", 8), ("--num_workers 2", "data", "workers", 2),
    ("--use_amp", "train", "amp", True), ("--gradient_accumulation_steps 3", "train", "accum", 3),
    ("--data_dir X", "data", "path", "X"), ("--ema_rate 0.9", "train", "ema", (0.9,))])
def test_names_that_mean_the_same_are_taken(theirs, section, field, value):
    assert getattr(getattr(load_config(theirs.split()), section), field) == value


@pytest.mark.parametrize("word, says", [
    ("--num_channels", "--vae.base_channels 64"), ("--spatial_dims", "always 3"),
    ("--gpu", "--device cuda:0"),
    ("--gpus", "torchrun"), ("--patch_size", "--patch D,H,W"), ("--kl_weight", "--loss.kl_weight; a mean"),
    ("--perceptual_weight", "did you mean --loss.perceptual_weight?"), ("--in_channels", "from the data"),
    ("--vae.latent_channels", "did you mean --vae.z_channels?"), ("--presett", "did you mean --preset?"),
    ("--attention_levels", "--vae.attention_levels or --unet.attention_levels"),
    ("--norm", "--vae.norm group")])
def test_other_names_get_ours(word, says):
    assert says in error_of(word, "3")


@pytest.mark.parametrize("word", ["--xyzzy", "--profile", "--local_files_only"])
def test_where_nothing_is_near_there_is_no_hint(word):
    said = error_of(word, "3")
    assert said == f"unknown flag {word}; --help has the everyday flags, --help-all the others"


def test_tables_name_flags_that_there_are_and_each_name_once():
    for flag in [*spellings.SAME, *(name for text in spellings.INSTEAD for name in spellings.named_in(text))]:
        assert flag in KNOWN or flag == "--nproc_per_node", flag
    names = [name for table in (spellings.SAME, spellings.INSTEAD) for names in table.values()
             for name in names.split()]
    assert len(names) == len(set(names))


def test_every_training_option_of_coming_from_is_answered():
    """Their flags that the page maps to one of ours get it, or a hint: none is called unknown and left."""
    page = (ROOT / "docs/COMING_FROM.md").read_text()
    asked = 0
    for theirs, ours in re.findall(r"^\| ([^|]+) \| ([^|]+) \|", page, re.M):
        if "`--" not in ours or "predict.py" in ours:
            continue
        for flag in re.findall(r"`(--[\w-]+)`", theirs):
            asked += 1
            found = spellings.spelled([flag], KNOWN) != [flag] or flag in KNOWN
            assert found or "--help has" not in spellings.advice(flag, KNOWN), flag
    assert asked > 15


def test_one_number_is_a_cube(tmp_path):
    cfg = load_config(["--patch", "96", "--data.spacing", "1", "--vae.strides", "2;1,2,2",
                       "--memory.tile", "64"])
    assert cfg.data.patch == (96, 96, 96) and cfg.data.spacing_mm() == (1, 1, 1)
    assert cfg.vae.strides == ((2, 2, 2), (1, 2, 2)) and cfg.memory.tile == (64, 64, 64)
    (tmp_path / "c.yaml").write_text("data: {patch: 32, spacing: 2}\nvae: {unshuffle: 2}\n")
    cfg = load_config(["--config", str(tmp_path / "c.yaml")])
    assert cfg.data.patch == (32, 32, 32) and cfg.data.spacing_mm() == (2, 2, 2)
    assert cfg.vae.unshuffle == (2, 2, 2)
    assert "needs 3 values" in error_of("--patch", "8,8") and "2 values" in error_of("--data.zoom", "1")
    assert memtest.asked_for(["--resolution", "48", "--batch_size", "3"]).cfg.data.patch == (48, 48, 48)
    assert memtest.asked_for(["--resolution", "48", "--batch_size", "3"]).cfg.train.batch == 3
    assert memtest.asked_for(["--resolution", "48"]).cfg.train.batch == 1


@pytest.mark.parametrize("mult, strides", [
    ("1,2,4", ((1, 2, 2), (2, 2, 2))), ("1,2", ((1, 2, 2),)), ("1,2,4,4,8", ((1, 2, 2), *[(2, 2, 2)] * 3)),
    ("1", ())])
def test_strides_follow_channel_mult(mult, strides, tmp_path):
    assert load_config(["--vae.channel_mult", mult]).vae.strides == strides
    (tmp_path / "c.yaml").write_text(f"vae: {{channel_mult: [{mult}]}}\n")
    assert load_config(["--config", str(tmp_path / "c.yaml")]).vae.strides == strides
    # a single level has none to go on with
    assert load_config(["--preset", "fast", "--vae.channel_mult", mult]).vae.strides[:1] in ((), ((2, 2, 2),))


def test_strides_that_are_given_stay(tmp_path):
    said = error_of("--vae.channel_mult", "1,2", "--vae.strides", "2;2;2")
    assert "one D,H,W triple between levels" in said
    (tmp_path / "c.yaml").write_text("vae: {strides: [[1, 2, 2], [2, 2, 2]]}\n")
    assert "one D,H,W triple" in error_of("--config", str(tmp_path / "c.yaml"), "--vae.channel_mult", "1,2")
    seg = load_config(["--task", "seg", "--preset", "unet3d", "--unet.channels", "4,8"])
    assert seg.unet.channels == (4, 8)


def test_predict_knows_its_own_flags_alone(capsys):
    assert predict.main(["segment", "--checkpoint", "x", "--input", "y", "--num_channels", "3"]) == 2
    assert "base_channels" not in capsys.readouterr().err


# -------------------------------------------------------------------------------- keys of a config file

@pytest.mark.parametrize("text, says", [
    ("learning_rate: 1e-3", "unknown key learning_rate; did you mean optim.lr?"),
    ("batch_size: 4", "did you mean train.batch?"), ("data_dir: X", "did you mean data.path?"),
    ("vae: {latent_channels: 8}", "unknown key vae.latent_channels; did you mean vae.z_channels?"),
    ("optim: {learning-rate: 1}", "did you mean optim.lr?"), ("train: {lr: 1}", "did you mean optim.lr?"),
    ("epochs: 3", "did you mean train.epochs?"), ("train: {patch: 32}", "did you mean data.patch?"),
    ("vae: {spatial_dims: 3}", "here: always 3; 2D, by slices: task: seg, preset: unet2d"),
    ("vae: {num_channels: 3}", "here: vae.base_channels: 64, vae.channel_mult: 1,2,4 is their"),
    ("train: {gpu: 0}", "here: train.device: cuda:0"), ("data: {roi_size: 96}", "here: data.patch: D,H,W"),
    ("train: {checkpoint: X}", "here: --resume RUN"), ("optim: {lrr: 1}", "did you mean optim.lr?"),
    ("xyzzy: 1", "known: task, preset, "), ("memory: {xyzzy: 1}", "known: mode, "),
    ("train: {stages: [{steps: 3, lr: 1}]}", "did you mean optim.lr?"),
    ("train: {stages: [{steps: 3, batch_size: 1}]}", "did you mean train.batch?")])
def test_wrong_keys_of_a_file_are_answered_as_flags_are(text, says, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    said = error_of("--config", str(path))
    assert "unknown key" in said and says in said and "\n" not in said, said


def test_keys_that_hints_name_are_there():
    sections = {f.name: f.default_factory().__dataclass_fields__ for f in SECTIONS}
    for text in spellings.INSTEAD:
        for key in re.findall(r"\b([a-z]+)\.([a-z_]+)", spellings.in_file(text)):
            assert key == ("train", "py") or key[1] in sections[key[0]], key


@pytest.mark.parametrize("text", ["preset: [base]", "preset: {base: 1}", "task: [vae]", "task: {vae: 1}"])
def test_a_preset_or_task_that_is_no_name_is_a_line(text, tmp_path):
    """A list once was a TypeError."""
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=text.split(":")[0]):
        load_config(["--config", str(path)])
