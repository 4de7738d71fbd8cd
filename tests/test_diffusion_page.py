"""The commands of docs/DIFFUSION.md run in their order, with sizes and steps cut; its links exist."""
import inspect
import json
import re
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import predict
import train
from volumes.synthetic import synthetic_volume

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/DIFFUSION.md").read_text()
GUIDE = (ROOT / "docs/COMING_FROM.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
            for line in block.splitlines()]
COMMON = ["--steps", "1", "--device", "cpu", "--accum", "1", "--train.val_crops", "1"]
VOLUMES = [*COMMON, "--vae.base_channels", "4", "--patch", "8,16,16", "--data.synthetic_size", "8,16,16",
           "--data.synthetic_count", "3"]
LATENTS = [*COMMON, "--unet.channels", "8,16", "--unet.time_channels", "16", "--batch", "1",
           "--diffusion.steps", "2"]


def test_links_lead_somewhere_and_commands_are_ours():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
    assert len(COMMANDS) == 10 and {command.split()[1] for command in COMMANDS} == {"train.py", "predict.py"}


def test_every_option_of_monais_diffusion_is_answered():
    """By name in docs/COMING_FROM.md, as the installed MONAI spells it."""
    networks = pytest.importorskip("monai.networks.nets", reason="reads MONAI's signatures")
    import monai.inferers as inferers
    from monai.networks import schedulers
    table = [networks.DiffusionModelUNet, networks.ControlNet, schedulers.DDPMScheduler,
             schedulers.DDIMScheduler, schedulers.PNDMScheduler, schedulers.RFlowScheduler,
             inferers.DiffusionInferer, inferers.LatentDiffusionInferer,
             inferers.ControlNetDiffusionInferer, inferers.ControlNetLatentDiffusionInferer]
    general = {"self", "args", "kwargs", "spatial_dims"}
    lacking, asked = [], 0
    for each in table:
        methods = [each.__init__]
        if each.__name__.endswith("Inferer"):
            methods += [each.__call__, each.sample, each.get_likelihood]
        for method in methods:
            names = set(inspect.signature(method).parameters) - general
            asked += len(names)
            lacking += [f"{method.__qualname__}: {name}" for name in names if f"`{name}`" not in GUIDE]
    assert asked > 100 and not lacking, lacking


@pytest.mark.slow
def test_the_commands_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "config").symlink_to(ROOT / "config")
    for number in range(3):
        trunk = synthetic_volume("ct", 0, number, (8, 16, 16))
        Path("DATA").mkdir(exist_ok=True)
        image = nib.Nifti1Image(trunk.array[0].T.astype(np.int16), trunk.affine)
        nib.save(image, f"DATA/trunk{number}.nii.gz")
        scene = synthetic_volume("radar", 0, number, (8, 16, 16)).array
        for folder, share in (("DENSE", 1.0), ("SPARSE", 0.5)):
            Path(folder).mkdir(exist_ok=True)
            kept = np.random.default_rng(number).random(scene.shape[1:]) < share
            np.save(f"{folder}/scene{number}.npy", (scene * kept).transpose(0, 3, 2, 1))
    for command in COMMANDS:
        script, *flags = shlex.split(command)[1:]
        if script == "train.py":
            cut = LATENTS if "ldm" in command else VOLUMES
            assert train.main([*flags, *cut]) == 0, command
            continue
        tile = ["--count", "2"] if "sample" in flags[0] and "--count" in flags else []
        device = [] if "--samples" in flags else ["--device", "cpu"]
        assert predict.main([*flags, *tile, *device]) == 0, command
    assert len(list(Path("samples").glob("*.nii.gz"))) == 2
    assert json.loads(Path("samples.json").read_text())["kid"]["subset"] == 1
    sample = nib.load("dense_samples/sample_0000.nii.gz")
    assert sample.shape == (16, 16, 8, 4) and sample.get_data_dtype() == np.float32
