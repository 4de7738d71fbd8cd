"""Small runs and states, for the tests of training: a network of 4 channels on crops of 4x8x8 voxels."""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from tasks import TASKS
from training import checkpoints, fit, flags, memory
from training.config import TrainConfig
from training.order import MicroBatch
from training.state import State
from training.task import of

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = ["--vae.base_channels", "4", "--data.synthetic_count", "4", "--data.synthetic_size", "8,16,16",
        "--patch", "4,8,8", "--data.crops_per_volume", "3", "--train.val_crops", "2",
        "--train.latent_crops", "2", "--device", "cpu", "--log.sample_every", "0", "--batch", "1"]
# The same for stages, which override crops and batch: flags would beat them.
STAGED = [word for flag, value in zip(TINY[::2], TINY[1::2]) if flag not in ("--patch", "--batch")
          for word in (flag, value)]
SEG = ["--task", "seg", "--unet.channels", "4,8", "--patch", "8,16,16", "--optim.lr", "1e-2"]
CODES = ["--vae.bottleneck", "vq", "--vae.num_codes", "16"]

# As fields of the config, section__field. All terms and all that follows an update at once.
GAN = {"loss__adv_weight": 0.3, "loss__disc_channels": 4, "loss__disc_layers": 1,
       "loss__disc_strides": "1,2,2"}
EVERYTHING = {
    **GAN, "loss__perceptual_weight": 0.1, "loss__structure_weight": 0.1, "loss__lecam_weight": 0.1,
    "loss__r1_weight": 1.0, "loss__feature_matching_weight": 0.5, "loss__crop": "4,7,6",
    "train__ema": "0.9,0.99", "optim__clip_percentile": 90, "optim__clip_window": 3,
    "vae__bottleneck": "vq", "vae__num_codes": 16,
}
TIMES = ("seconds", "voxels_per_second", "peak_gib")             # of a row of log.jsonl: never the same twice


# ------------------------------------------------------------------------------------ configs and states

def load_config(argv: Sequence[str], base: TrainConfig | None = None) -> TrainConfig:
    return flags.load_config(argv, TASKS, base)


def new_state(cfg: TrainConfig, device: torch.device = CPU, features: dict | None = None) -> State:
    """As at step 0, with the dial of the config."""
    return memory.begin(cfg, of(TASKS, cfg), device, features)


def make_step(cfg: TrainConfig, device: torch.device, rehearsal: bool = False):
    return fit.make_step(cfg, of(TASKS, cfg), device, rehearsal)


def build_network(cfg: TrainConfig) -> nn.Module:
    return of(TASKS, cfg).build(cfg)


def flags_of(fields: dict) -> list[str]:
    """{"loss__adv_weight": 0.3} -> ["--loss.adv_weight", "0.3"]."""
    return [part for key, value in fields.items() for part in (f"--{key.replace('__', '.')}", str(value))]


def tiny_state(**fields) -> tuple[TrainConfig, State]:
    cfg = load_config([*TINY, *flags_of(fields)])
    return cfg, new_state(cfg)


def micro_batches(
    sizes: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0, size: Sequence[int] = (4, 8, 8)
) -> list[MicroBatch]:
    """The same crops, with the same noise, however they are split into micro-batches."""
    generator, result, place = torch.Generator().manual_seed(seed), [], 0
    for n in sizes:
        seeds = [100 + place + i for i in range(n)]
        image = torch.rand(n, 1, *size, generator=generator, dtype=dtype) * 2 - 1
        result.append(MicroBatch(image, seeds, [0] * n))
        place += n
    return result


def doubled(state: State) -> State:
    """The whole state in float64."""
    for module in (state.model, state.disc, state.perceptual, state.lecam, *state.emas):
        if module is not None:
            module.double()
    for optimizer in filter(None, (state.optimizer, state.disc_optimizer)):
        for moments in optimizer.state.values():
            moments.update({name: value.double() for name, value in moments.items() if name != "step"})
    return state


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


class RunsOut(TorchDispatchMode):
    """Raises OutOfMemoryError at the n-th operation, once for each entry of `at`."""
    def __init__(self, at: Sequence[int]):
        super().__init__()
        self.at, self.count = list(at), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.at and self.count == self.at[0]:
            self.at.pop(0)
            self.count = 0
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------- whole runs

def run(*words: str, out: Path) -> int:
    """A new run in this process -> its exit code."""
    return train.main([*TINY, *words, "--out", str(out)])


def resume(path: Path, *words: str) -> int:
    return train.main(["--resume", str(path), *words])


def command(*words: str) -> list[str]:
    """The same as a command for a process of its own."""
    return [sys.executable, str(ROOT / "train.py"), *TINY, *words]


def rows(out: Path, split: str | None = None) -> list[dict]:
    parsed = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in parsed if split in (None, row["split"])]


def timeless(out: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows(out)]


def load(path: Path) -> dict:
    return checkpoints.load(path, "vae3d.train", "vae3d.weights")


def weights(out: Path, name: str = "last.pt") -> dict[str, Tensor]:
    return torch.load(out / name, weights_only=True)["model"]


def assert_equal_runs(a: Path, b: Path, names: Sequence[str] = ("last.pt", "best.pt")) -> None:
    """To the bit, but for the times in the log."""
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert timeless(a) == timeless(b)
