"""All that needs a card, in one command: is it right, does it fit, how fast, how good.

    python bench/gpu.py --train FOLDER --test FOLDER        # every part; bench/results/gpu_CARD.json
    python bench/gpu.py --only peaks                        # one part; may be repeated
    python bench/gpu.py --device cpu --tiny                 # every part, small, on a machine without a card

correctness  outputs and gradients in float32 against float64 on the CPU: VAE3D in every memory mode, sparse
             convolution, quantiser
peaks        predicted against measured peak of a step
times        milliseconds of a step of `fast` beside MONAI's networks by MONAI and by us
race         `fast` and MONAI's AutoencoderKL after equal seconds of steps: whole volumes of --test
recovery     a step out of memory that is repeated; a killed run that goes on, compared by its bytes
repeat       two equal runs, compared by their bytes
whole        one volume, exact tiles beside MONAI's sliding window
sparse       one submanifold convolution, forward and backward
diffusion    a denoiser's step, and a sample of a latent

Each row is printed, and written where there is a file to write, as soon as it is known. A part that cannot
run here is one row that says why (`skipped`), a row that failed has `error`. Exit codes: 0 every row is
right; 1 a row has an error or `right` false; 2 nothing could be started. Version 0.2 (2026-11).
"""
from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import peaks  # noqa: E402
import quantize  # noqa: E402
import sparse_conv  # noqa: E402
import tiles  # noqa: E402
import vae3d  # noqa: E402
from tasks import TASKS  # noqa: E402
from training import config, devices, fit  # noqa: E402
from training.flags import load_config  # noqa: E402
from training.task import of  # noqa: E402

Rows = Iterator[dict]
# Predicted over measured peak may be so far from 1; float32 so far from float64, of the largest norm.
TOLERANCE, ROUNDING = 0.1, 1e-3


def settings(options: argparse.Namespace, **flags: object) -> config.TrainConfig:
    """The config of these flags; `_` stands for the dot: memory_mode is --memory.mode."""
    words = {name.replace("_", ".", 1): value for name, value in flags.items()}
    words.setdefault("amp", str(options.cuda).lower())
    return load_config([word for name, value in words.items() for word in (f"--{name}", str(value))], TASKS)


@functools.cache
def race_room() -> ModuleType | str:
    """bench/vs_monai.py, or why there is none: it ends where MONAI is not installed."""
    try:
        import vs_monai
    except (SystemExit, ImportError) as error:
        return str(error)
    return vs_monai


def peak_gib(found: peaks.Measured) -> float:
    return round(found.allocated / peaks.GIB, 4)


# ----------------------------------------------------------------------------------------------- is it right

def correctness(options: argparse.Namespace) -> Rows:
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield from networks_right(options)
        yield sparse_right(options)
        yield quantizer_right(options)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def off(found: Tensor, true: Tensor) -> float:
    """|found - true| / |true|, Euclidean norms over all elements, in float64 on the CPU."""
    true = true.detach().cpu().double()
    return float((found.detach().cpu().double() - true).norm() / true.norm())


def judged(**errors: float) -> dict:
    return errors | {"right": all(error <= ROUNDING for error in errors.values())}


def networks_right(options: argparse.Namespace) -> Rows:
    """The reconstruction from the latent's mean, and gradients of parameters and volume, of one loss."""
    size = (16, 32, 32) if options.tiny else (32, 64, 64)
    cases = {
        "fast": vae3d.PRESETS["fast"],
        "ultra_lightweight": vae3d.PRESETS["ultra_lightweight"],
        "group norm": vae3d.VAEConfig(norm="group", norm_groups=8),
        "group norm, attention": vae3d.VAEConfig(norm="group", norm_groups=8, attention=True),
    }
    for name, cfg in cases.items():
        torch.manual_seed(0)
        true, x = vae3d.VAE3D(cfg).double(), torch.randn(2, 1, *size, dtype=torch.float64)
        towards = torch.randn_like(x)
        expected = through(true, x, towards)
        for mode in vae3d.MEMORY_MODES:
            network = vae3d.VAE3D(cfg)
            network.load_state_dict(true.state_dict())
            network = devices.on_device(network, options.device)
            network.memory(mode, (16, 16, 16)) if mode == "tile" else network.memory(mode)
            found = through(network, *(devices.to_device(v.float(), options.device) for v in (x, towards)))
            yield {"what": name, "mode": mode, "size": size} | judged(
                output=off(found[0], expected[0]), gradients=off(found[1], expected[1]),
                input_gradient=off(found[2], expected[2]))


def through(network: vae3d.VAE3D, x: Tensor, towards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction, gradients of all parameters in one row, gradient of x."""
    x = x.clone().requires_grad_()
    recon = network.decode(network.encode(x).mu, x.shape[2:])
    (recon * towards).sum().backward()
    rows = [p.grad.cpu().flatten() for p in network.parameters() if p.grad is not None]
    return recon, torch.cat(rows), x.grad


def points(edge: int, count: int) -> Tensor:
    """Codes of `count` voxels of a cube, ascending, the same each time."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(edge**3, generator=generator)[:count]
    coords = torch.stack(torch.unravel_index(chosen, (edge,) * 3), 1)
    return sparse_conv.encode_coords(coords, 0, sparse_conv.bits_for(edge)).sort().values


def sparse_right(options: argparse.Namespace) -> dict:
    """Against the dense convolution of PyTorch in float64, at the points that there are."""
    edge = 16
    code, bits = points(edge, edge**3 // 3), sparse_conv.bits_for(edge)
    d, h, w = sparse_conv.coords_of(code, bits).unbind(1)
    torch.manual_seed(0)
    conv = sparse_conv.SubMConv3d(16, 16)
    x, towards = torch.randn(len(code), 16), torch.randn(len(code), 16)
    dense = nn.Conv3d(16, 16, 3, padding=1).double()
    dense.load_state_dict(conv.state_dict())
    true = x.double().requires_grad_()
    grid = torch.zeros(16, edge, edge, edge, dtype=torch.float64).index_put(
        (torch.arange(16)[:, None], d, h, w), true.T)
    expected = dense(grid[None])[0][:, d, h, w].T
    (expected * towards).sum().backward()

    conv, code = conv.to(options.device), code.to(options.device)
    table = sparse_conv.neighbours(code, bits)
    x = x.to(options.device).requires_grad_()
    found = conv(x, table)
    (found * towards.to(options.device)).sum().backward()
    return {"what": "sparse_conv", "points": len(code)} | judged(
        output=off(found, expected), gradients=off(conv.weight.grad, dense.weight.grad),
        input_gradient=off(x.grad, true.grad))


def quantizer_right(options: argparse.Namespace) -> dict:
    """The nearest codes and the loss, against all distances in float64."""
    torch.manual_seed(0)
    quantizer = quantize.VectorQuantizer(256, 4).eval()
    nn.init.normal_(quantizer.codebook)
    rows = torch.randn(4096, 4)
    distance = torch.cdist(rows.double(), quantizer.codebook.double(),
                           compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.min(1)
    loss = 0.25 * nearest.values.square().mean() / 4
    found = quantizer.to(options.device)(rows.to(options.device))
    # Of two codes as near as rounding either is right, so the distances are compared, not the numbers.
    chosen = distance.gather(1, found.index.cpu()[:, None])[:, 0]
    same = (found.index.cpu() == nearest.indices).float().mean()
    return {"what": "quantizer", "same_codes": float(same)} | judged(
        distance=off(chosen, nearest.values), loss=off(found.vq_loss, loss))


# ----------------------------------------------------------------------------------------------- does it fit

def peaks_of_steps(options: argparse.Namespace) -> Rows:
    """Rows by size, so that what a short loan of a card leaves out is the largest."""
    if options.tiny:
        table = [("fast", "16,32,32", mode) for mode in vae3d.MEMORY_MODES]
        table += [("ultra_lightweight", "8,32,32", "none")]
    else:
        table = [(preset, "64,256,256", mode) for preset in ("fast", "ultra_lightweight", "high_res")
                 for mode in vae3d.MEMORY_MODES]
        table += [("standard", "64,128,128", "none"), ("fast", "512,512,512", "none"),
                  ("fast", "512,512,512", "tile"), ("fast", "1024,1024,1024", "tile")]
    for preset, size, mode in table:
        for amp in ("true", "false") if options.cuda and mode == "none" else (str(options.cuda).lower(),):
            yield one_peak(options, preset, size, mode, amp)


def one_peak(options: argparse.Namespace, preset: str, size: str, mode: str, amp: str) -> dict:
    cfg = settings(options, preset=preset, patch=size, batch=1, memory_mode=mode, amp=amp)
    row = {"preset": preset, "size": size, "mode": mode, "amp": amp}
    predicted = fit.predicted(cfg, of(TASKS, cfg), options.device).bytes
    row["predicted_gib"] = round(predicted / peaks.GIB, 4)
    if options.cuda and predicted > torch.cuda.mem_get_info()[0] * (1 - peaks.SPARE):
        return row | {"skipped": "predicted to take more than this card has free"}
    found = peaks.measure(lambda device: fit.make_step(cfg, of(TASKS, cfg), device), options.device, 2)
    ratio = predicted / found.allocated
    reserved = found.reserved and round(found.reserved / peaks.GIB, 4)
    return row | {"measured_gib": peak_gib(found), "reserved_gib": reserved, "ratio": round(ratio, 3),
                  "ms": round(1000 * found.seconds, 2), "right": abs(ratio - 1) <= TOLERANCE}


# PARTS
PARTS = {"correctness": correctness, "peaks": peaks_of_steps}


# ----------------------------------------------------------------------------------------------- the command

def rows_of(part: str, options: argparse.Namespace) -> Rows:
    """The rows of a part; an exception is its last one."""
    try:
        yield from PARTS[part](options)
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        what = "out of memory: " if tiles.is_out_of_memory(error) else ""
        yield {"error": f"{what}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def facts(options: argparse.Namespace) -> dict:
    room = race_room()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "card": torch.cuda.get_device_name() if options.cuda else None,
        "torch": torch.__version__, "cuda": torch.version.cuda if options.cuda else None,
        "cudnn": torch.backends.cudnn.version() if options.cuda else None,
        "monai": None if isinstance(room, str) else room.monai.__version__,
        "python": platform.python_version(), "tiny": options.tiny,
        "warnings": peaks.environment_warnings() if options.cuda else [],
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(PARTS), help="a part; may be repeated [all]")
    parser.add_argument("--device", default="cuda", help="cuda or cpu [cuda]")
    parser.add_argument("--tiny", action="store_true", help="small sizes: whether the parts run")
    parser.add_argument("--train", help="folder of volumes that the race trains on")
    parser.add_argument("--test", help="folder of volumes that it is judged by")
    parser.add_argument("--seconds", type=float, default=12.0, help="of steps of each side of the race [12]")
    parser.add_argument("--json", type=Path, help="file for the rows [bench/results/gpu_CARD.json on a card]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    try:
        options.device = devices.pick_device(options.device)
        if (options.train is None) != (options.test is None):
            raise ValueError("the race needs both --train FOLDER and --test FOLDER")
    except ValueError as error:
        print(f"gpu.py: {error}; without a card: --device cpu --tiny", file=sys.stderr)
        return 2
    options.cuda = options.device.type == "cuda"
    if options.json is None and options.cuda and not options.tiny:
        card = torch.cuda.get_device_name().replace(" ", "_")
        options.json = ROOT / "bench" / "results" / f"gpu_{card}.json"
    found, failed = {"facts": facts(options)}, False
    print(json.dumps(found["facts"]), flush=True)
    for part in options.only or PARTS:
        found[part] = []
        for row in rows_of(part, options):
            found[part].append(row)
            failed |= "error" in row or row.get("right") is False
            told = "  ".join(f"{name} {shown(value)}" for name, value in row.items())
            print(f"{part}  {told}", flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(found, indent=1) + "\n")
            gc.collect()
            if options.cuda:
                torch.cuda.empty_cache()
    return int(failed)


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
