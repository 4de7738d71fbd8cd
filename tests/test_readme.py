"""Every command in the README and on the pages of docs/ runs, with steps and sizes cut; every file that they
link exists; the Python examples work. The rows of docs/COMING_FROM.md are looked up; docs/LOG.md is history.
"""
import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
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
ELSEWHERE = "COMING_FROM.md", "LOG.md", "DIFFUSION.md"           # the last: tests/test_diffusion_page.py
PAGES = {"README.md": TEXT} | {
    path.name: path.read_text()
    for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in ELSEWHERE
}
COMMANDS = [                                                     # page and command, in the order of the page
    (page, line.split("  #")[0].strip())
    for page, text in PAGES.items()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    for line in block.splitlines()
]
SMALL = ["--vae.base_channels", "4", "--patch", "8,24,24", "--accum", "1", "--steps", "1", "--device", "cpu",
         "--data.synthetic_size", "8,24,24", "--data.synthetic_count", "3", "--train.val_crops", "1"]
SPARSE = ["--preset", "sparse_light", "--sparse.model_channels", "32", "--sparse.head_channels", "8",
          "--sparse.num_blocks", "1", "--sparse.z_channels", "4", "--sparse.num_codes", "16", "--patch", "24",
          "--train.latent_crops", "1", "--data.smooth", "0", "--data.synthetic_size", "24"]


class Place:
    """The folder of one page, in which its commands find their inputs and leave their outputs."""

    def __init__(self, path: Path):
        self.path, self.done = path, set()

    def ready(self, page, text):
        """Runs what makes those inputs of `text`, a command or a Python block, that are not there yet."""
        own_first = sorted(COMMANDS, key=lambda found: found[0] != page)
        for _, command in own_first:
            words = shlex.split(command)
            for flag in ("--out", "--output"):
                made = words[words.index(flag) + 1].rstrip("/") if flag in words else None
                if made is None or command == text or (self.path / made).exists():
                    continue
                if re.search(rf"(?<!--out )(?<!--output )(?<![\w/.-]){made}(?![\w.-])", text):
                    self.run(page, command)

    def run(self, page, command):
        if command not in self.done:                             # a command before it may have asked for it
            self.done.add(command)
            self.ready(page, command)
            run(command, self.path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Page -> its Place, made when it is first asked for."""
    found = {}

    def place(page):
        if page not in found:
            found[page] = Place(tmp_path_factory.mktemp("readme"))
            fill(found[page].path)
        return found[page]
    return place


def fill(path):
    rng = np.random.default_rng(0)
    (path / "DATA").mkdir()
    for n in range(3):
        values = rng.random((28, 26, 24)) * 100 - 1000           # a ball of tissue in air
        from_centre = np.indices(values.shape).T - 12
        values[(from_centre ** 2).sum(-1).T < (8 + n) ** 2] += 1000
        nib.save(nib.Nifti1Image(values.astype(np.int16), np.eye(4)), path / "DATA" / f"scan{n}.nii.gz")
    for kind, high in (("images", 2000), ("labels", 3)):
        (path / "PAIRS" / kind).mkdir(parents=True)
        for n in range(3):
            values = (rng.random((24, 24, 8)) * high).astype(np.int16)
            nib.save(nib.Nifti1Image(values, np.eye(4)), path / "PAIRS" / kind / f"scan{n}.nii.gz")
    shutil.copytree(ROOT / "config", path / "config")
    staged = path / "config/ct_vae_staged.yaml"
    staged.write_text(re.sub(r"steps: \d+", "steps: 1", staged.read_text()))
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


def test_the_two_commands_come_first_and_ci_runs_them():
    install = "python -m pip install -r"
    commands = [command for page, command in COMMANDS if page == "README.md"]
    assert commands[0] == (
        f"{install} requirements.txt && python train.py --preset ultra_lightweight --amp --accum 8")
    assert commands[1] == f"{install} requirements-dev.txt && python -m pytest"
    assert TEXT.index(commands[1]) < 1500                        # the first screen
    assert "grep '^python -m pip install -r requirements' README.md" in (ROOT / ".ci/run").read_text()


def run(command, folder):
    """The command in `folder`, small; the test fails where it does."""
    words = shlex.split(command.split(" && ")[-1])
    if words[0] == "sbatch":                                     # tests/test_distributed.py runs the script
        assert (folder / words[words.index("config/slurm.sh")]).is_file()
        words = ["python", "train.py", *words[words.index("config/slurm.sh") + 1:]]
    if words[0] == "torchrun":                                   # on one process; there on several
        words = ["python", *words[words.index("train.py"):]]
    script, *flags = words[1:]
    if script == "train.py" and "--help-all" not in flags:
        assert train.main([*flags, *small(command)]) == 0
    elif script == "memtest.py":
        cut = ["--budget", "0.01"] if "--budget" in flags else []
        cut += ["--vae.base_channels", "4", "--vae.num_res_blocks", "0", "--resolution", "16,32,32"]
        assert memtest.main([*flags, *cut]) == 0
    elif script in ("predict.py", "data.py"):
        assert {"predict.py": predict, "data.py": data}[script].main(flags) == 0
    else:                                                        # bench/ and what --help-all prints
        words = [sys.executable, str(ROOT / script), *flags]
        if script.startswith("bench"):
            words.append("--help")
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def small(command):
    """Flags of train.py that cut the command's sizes and steps."""
    if "--resume" in command:
        return []
    if "sparse" in command:
        return [*SMALL[4:], *SPARSE]
    if "autoencoder.pt" in command:                              # its widths are its own
        return SMALL[2:]
    if "seg_2d" in command:                                      # 31 M parameters otherwise
        return [*SMALL, "--unet.channels", "4,8,8,8,8"]
    if "staged" in command:                                      # one step a stage, by its file
        return [*SMALL[:6], *SMALL[8:], "--batch", "1"]
    return SMALL


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), [pair for pair in COMMANDS if "pytest" not in pair[1]])
def test_command_runs(page, command, places, monkeypatch):
    if "PICTURES" in command:
        pytest.importorskip("PIL")
    place = places(page)
    monkeypatch.chdir(place.path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.path / "cache"))
    place.run(page, command)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_python_examples_run(page, places, monkeypatch):
    place, names = places(page), {}
    monkeypatch.chdir(place.path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.path / "cache"))
    for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.S):
        if "monai" in block:
            pytest.importorskip("monai")
        place.ready(page, block)
        exec(block, names)                                       # noqa: S102
    if page == "LIBRARY.md":
        assert names["recon"].shape == (1, 1, 30, 64, 50) and names["index"].shape == (1, 15, 16, 13)
    if page == "WEIGHTS.md":
        assert names["arguments"]["num_channels"] == (32, 64)
        theirs = torch.load("autoencoder.pt", weights_only=True)
        shapes = [{name: value.shape for name, value in state.items()} for state in (names["state"], theirs)]
        assert shapes[0] == shapes[1]


def test_the_examples_stand_on_their_pages():
    """The README is one screen after another of what matters; what else is tested stands on the pages."""
    assert len(TEXT.splitlines()) < 150
    assert {page for page, text in PAGES.items() if "```python" in text} >= {"LIBRARY.md", "WEIGHTS.md"}
    assert len(COMMANDS) > 40


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_our_names_for_options_of_elsewhere_are_flags(monkeypatch):
    """In our columns train.py takes `--flag value`; the flags of `predict.py COMMAND --flag` and of
    `memtest.py --flag` exist.
    """
    spans = set(re.findall(r"^python train\.py (.*)$", GUIDE, re.M))
    for row in re.findall(r"^\| .*\|.*\|$", GUIDE, re.M):
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
