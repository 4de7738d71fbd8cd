"""A volume from noise to a file: what sampling, decoding and writing take. A part of bench/gpu.py.

    python bench/gpu_sample.py                   # 512,512,512: peaks predicted for CUDA, no card is needed
    python bench/gpu_sample.py --size 256,512,512 --guidance 2 --steps 50

The denoiser is preset `denoiser` (25.5 M), its latent a quarter of the volume along each axis, by 30 steps
of Euler in bf16, as MAISI samples; the autoencoder is `fast`, in exact tiles. Both are new, which changes
neither seconds nor bytes. For comparison, MAISI (NV-Generate-CT) states 48 s and 22.8 GB for 512^3 on an
A100, its own networks, decoded by overlapping windows.

Shapes: Z latent channels, d h w of the latent, D H W of the volume. Version 0.1 (2026-11).
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import diffusion  # noqa: E402
import peaks  # noqa: E402
import unet  # noqa: E402
import vae3d  # noqa: E402
from diffusion import DiffusionConfig  # noqa: E402
from training import devices  # noqa: E402
from training.config import convert  # noqa: E402
from training.fit import size_text  # noqa: E402
from training.plan import for_volumes  # noqa: E402
from volumes.format_nibabel import write_nifti  # noqa: E402

Size = tuple[int, int, int]
MAISI = {"what": "MAISI's own words: 512^3 on an A100", "seconds": 48.0, "peak_gb": 22.8}


class Networks:
    """What a sample needs, new, on a device. tiny: as small as they run at all."""
    def __init__(self, device: torch.device, tiny: bool):
        torch.manual_seed(0)
        self.device = device
        cfg = unet.DENOISERS["denoiser"]
        if tiny:
            cfg = unet.UNetConfig(4, 4, (16, 16), residual=True, time_channels=16)
        self.denoiser = self.placed(unet.UNet(cfg))
        self.vae = for_volumes(self.placed(vae3d.VAE3D.from_preset("fast")))

    def placed(self, network: nn.Module) -> nn.Module:
        return devices.on_device(network.eval().requires_grad_(False), self.device)

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def noise(self, size: Size) -> Tensor:
        shape = (1, self.vae.cfg.z_channels, *self.vae.latent_size(size))
        return devices.to_device(torch.randn(shape), self.device)

    @torch.no_grad()
    def sample(self, cfg: DiffusionConfig, noise: Tensor) -> Tensor:
        """(1, Z, d, h, w) -> the same. With guidance the network is asked twice a step, as for conditions."""
        def ask(x: Tensor, t: Tensor) -> Tensor:
            return self.denoiser(x, t).logits
        with self.precision():
            return diffusion.sample(cfg, ask, noise, {}, {})

    @torch.no_grad()
    def decode(self, z: Tensor, size: Size) -> Tensor:
        """(1, Z, d, h, w) -> (1, 1, D, H, W)."""
        with self.precision():
            return self.vae.decode(z, size)


def makers(cfg: DiffusionConfig, size: Size, tiny: bool) -> dict[str, peaks.MakeStep]:
    """Name of a part -> how peaks.py begins it on a device, simulated or not."""
    def sampling(device: torch.device) -> Callable[[], None]:
        networks = Networks(device, tiny)
        noise = networks.noise(size)
        return lambda: networks.sample(cfg, noise)

    def decoding(device: torch.device) -> Callable[[], None]:
        networks = Networks(device, tiny)
        z = networks.noise(size)
        return lambda: networks.decode(z, size)
    return {"sampled": sampling, "decoded": decoding}


def predicted(size: Size, steps: int, guidance: float = 1.0, tiny: bool = False,
              device: str = "cuda") -> dict[str, float]:
    """Peaks in GiB of sampling and of decoding `size`; the steps change nothing, so two are taken."""
    cfg = DiffusionConfig(solver="euler", steps=min(steps, 2), guidance=guidance)
    return {name: peaks.predict(make, device).bytes / peaks.GIB
            for name, make in makers(cfg, size, tiny).items()}


def rows(device: torch.device, tiny: bool, size: Size | None = None, steps: int = 30) -> Iterator[dict]:
    """Of bench/gpu.py: seconds and peak of each part and of all three, predicted beside measured."""
    size, steps = size or ((16, 32, 32) if tiny else (512, 512, 512)), 2 if tiny else steps
    on_card = device.type == "cuda"
    cfg, known = DiffusionConfig(solver="euler", steps=steps), predicted(size, steps, 1.0, tiny, device.type)
    networks = Networks(device, tiny)
    noise, seconds = networks.noise(size), []

    def timed(what: str, work: Callable[[], object]) -> tuple[object, dict]:
        if on_card:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        found = work()
        row = {"what": what, "size": size}
        if on_card:
            torch.cuda.synchronize(device)
            row["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / peaks.GIB, 4)
        if what in known:
            row["predicted_gib"] = round(known[what], 4)
        seconds.append(time.perf_counter() - start)
        return found, row | {"seconds": round(seconds[-1], 3)}

    # Kernels are chosen before anything is timed.
    networks.sample(DiffusionConfig(solver="euler", steps=1), noise)
    networks.decode(noise, size)
    z, row = timed("sampled", lambda: networks.sample(cfg, noise))
    yield row | {"latent": tuple(noise.shape[1:]), "steps": steps}
    volume, row = timed("decoded", lambda: networks.decode(z, size).float().cpu().numpy()[0])
    yield row
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.nii.gz"

        def written() -> None:
            write_nifti(path, np.rint(1000 * volume).astype(np.int16), np.eye(4))
        _, row = timed("written", written)
        yield row | {"mb": round(path.stat().st_size / 1e6, 1)}
    yield {"what": "all three", "size": size, "seconds": round(sum(seconds), 3)}
    yield MAISI


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="512,512,512", help="voxels D,H,W [512,512,512]")
    parser.add_argument("--steps", type=int, default=30, help="of Euler [30]")
    parser.add_argument("--guidance", type=float, default=1.0, help="1: none [1]")
    options = parser.parse_args(argv)
    size = convert(options.size, Size, "--size")
    for name, gib in predicted(size, options.steps, options.guidance).items():
        print(f"{size_text(size)} {name}: {gib:.2f} GiB predicted for CUDA, bf16")
    print(peaks.LEFT_OUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
