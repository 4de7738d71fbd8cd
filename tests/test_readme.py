"""Every command in the README runs, with steps and sizes cut; every file that it links exists; the Python
example works.
"""
import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import memtest
import predict
import runs
import train
import training.flags
import weights
from tasks import TASKS
from vae3d import VAE3D, VAEConfig

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs/COMING_FROM.md").read_text()              # options of other projects beside ours
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
SMALL = ["--vae.base_channels", "4", "--patch", "8,24,24", "--accum", "1", "--steps", "1", "--device", "cpu",
         "--data.synthetic_size", "8,24,24", "--data.synthetic_count", "3", "--train.val_crops", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    (path / "DATA").mkdir()
    for n in range(3):
        values = (rng.random((16, 12, 8)) * 2000 - 1000).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.eye(4)), path / "DATA" / f"scan{n}.nii.gz")
    for kind, high in (("images", 2000), ("labels", 3)):
        (path / "PAIRS" / kind).mkdir(parents=True)
        for n in range(3):
            values = (rng.random((24, 24, 8)) * high).astype(np.int16)
            nib.save(nib.Nifti1Image(values, np.eye(4)), path / "PAIRS" / kind / f"scan{n}.nii.gz")
    (path / "config").symlink_to(ROOT / "config")
    maisi = VAEConfig(
        base_channels=32, channel_mult=(1, 2), strides=((2, 2, 2),), norm="group", decoder_extra_blocks=0,
        head_act=False, encoder_middle="none", decoder_middle="none", down_padding="end",
        upsample="trilinear", quant_conv="split")
    state, arguments = weights.export(VAE3D(maisi), layout="maisi")
    torch.save(state, path / "autoencoder.pt")
    (path / "config_maisi.json").write_text(json.dumps({"autoencoder_def": arguments}))
    with contextlib.suppress(ImportError):
        from PIL import Image
        for kind, high in (("imgs", 255), ("masks", 2)):
            (path / "PICTURES" / kind).mkdir(parents=True)
            for n in range(3):
                values = (rng.random((48, 48)) * high).astype(np.uint8) * (255 if kind == "masks" else 1)
                Image.fromarray(values).save(path / "PICTURES" / kind / f"photo{n}.png")
    return path


def test_the_two_commands_come_first_and_ci_runs_them():
    install = "python -m pip install -r"
    assert COMMANDS[0] == (
        f"{install} requirements.txt && python train.py --preset ultra_lightweight --amp --accum 8")
    assert COMMANDS[1] == f"{install} requirements-dev.txt && python -m pytest"
    assert TEXT.index(COMMANDS[1]) < 1500                        # the first screen
    assert "grep '^python -m pip install -r requirements' README.md" in (ROOT / ".ci/run").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c.split(" && ")[-1] for c in COMMANDS if "pytest" not in c])
def test_command_runs(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    words = shlex.split(command)
    if words[0] == "sbatch":                                     # tests/test_distributed.py runs the script
        assert (folder / words[words.index("config/slurm.sh")]).is_file()
        words = ["python", "train.py", *words[words.index("config/slurm.sh") + 1:]]
    if words[0] == "torchrun":                                   # on one process; there on several
        words = ["python", *words[words.index("train.py"):]]
    script, *flags = words[1:]
    if "PICTURES" in flags:
        pytest.importorskip("PIL")
    if script == "train.py":
        small = SMALL[2:] if "autoencoder.pt" in flags else SMALL    # whose widths are its own
        assert train.main([*flags, *([] if "--resume" in flags else small)]) == 0
    elif script == "memtest.py":
        cut = ["--budget", "0.01"] if "--budget" in flags else []
        assert memtest.main([*flags, *cut, "--vae.base_channels", "4", "--resolution", "16,32,32"]) == 0
    else:
        words = [sys.executable, str(ROOT / script), *flags]
        if script.startswith("bench"):
            words.append("--help")
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_python_examples_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    if not Path("runs/tuned").exists():                          # this test alone
        tune = next(shlex.split(command)[2:] for command in COMMANDS if "runs/tuned" in command)
        assert train.main([*tune, *SMALL[2:]]) == 0
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, names)                                       # noqa: S102
    assert names["recon"].shape == (1, 1, 30, 64, 50) and names["index"].shape == (1, 15, 16, 13)
    assert names["arguments"]["num_channels"] == (32, 64)
    theirs = torch.load("autoencoder.pt", weights_only=True)
    shapes = [{name: value.shape for name, value in state.items()} for state in (names["state"], theirs)]
    assert shapes[0] == shapes[1]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_our_names_for_options_of_elsewhere_are_flags(monkeypatch):
    """In our columns train.py takes `--flag value`; the flags of `predict.py COMMAND --flag` and of
    `memtest.py --flag` exist.
    """
    section = TEXT.partition("## Coming from elsewhere")[2].partition("## ")[0]
    spans = set(re.findall(r"^python train\.py (.*)$", GUIDE, re.M))
    for row in re.findall(r"^\| .*\|.*\|$", section + GUIDE, re.M):
        for cell in row.split("|")[2:]:
            spans |= {span for span in re.findall(r"`([^`]+)`", cell) if "--" in span}
    assert len(spans) > 120
    parser = training.flags.build_parser(TASKS)
    monkeypatch.setattr(training.flags, "build_parser", lambda tasks: parser)   # built once: 0.1 s each
    others = {"memtest.py": memtest.build_parser(training.flags.Parser),
              **predict.build_parser()._subparsers._group_actions[0].choices}
    for span in sorted(spans):
        first, *words = shlex.split(span.removeprefix("predict.py "))
        known = others.get(first, parser)._option_string_actions
        named = [word for word in (first, *words) if word.startswith("--")]
        unknown = [word for word in named if word.partition("=")[0] not in known]
        assert not unknown, f"`{span}`: {unknown}"
        if first.startswith("--") and "FILE" not in words:
            runs.load_config([first, *words])                   # ValueError for a value that cannot be meant
