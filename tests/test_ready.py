"""A checkpoint ready to use: which file, which weights, how its volumes are prepared."""
import torch

import train
from predictions import TINY
from tasks import TASKS
from training.config import changed
from training.ready import data_config, load


def test_last_checkpoint_and_averages_load(tmp_path, runs):
    """last.pt serves too, with the weights that would ship."""
    out = tmp_path / "run"
    assert train.main([*TINY, "--vae.base_channels", "4", "--train.ema", "0.5", "--out", str(out)]) == 0
    last = torch.load(out / "last.pt", weights_only=True)
    model = load(out / "last.pt", TASKS, device="cpu").model
    assert all(torch.equal(value, last["ema"][0][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, last["model"][name]) for name, value in model.state_dict().items())
    (out / "best.pt").unlink()
    assert load(out, TASKS, device="cpu").path.name == "last.pt"


def test_preparation_follows_the_checkpoint(runs):
    """Modality, window, grid and channels are those of the run; a random zoom is none."""
    ready = load(runs("kl"), TASKS, device="cpu")
    assert data_config(ready).modality == "ct"
    prepared = changed(ready.cfg, data={"window": "lung", "spacing": "random"})
    cfg = data_config(ready._replace(cfg=prepared), nan="zero", max_gib=None)
    assert (cfg.window, cfg.spacing, cfg.nan, cfg.max_gib) == ("lung", "original", "zero", 8.0)
    assert data_config(load(runs("radar"), TASKS, device="cpu")).modality == "voxel"
    assert data_config(load(runs("radar") / "last.pt", TASKS, device="cpu")).modality == "voxel"
