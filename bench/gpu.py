"""All that needs a card, in one command: is it right, does it fit, how fast, how good.

    python bench/gpu.py --train FOLDER --test FOLDER        # every part; bench/results/gpu_CARD.json
    python bench/gpu.py --only peaks                        # one part; may be repeated
    python bench/gpu.py --device cpu --tiny                 # every part, small, on a machine without a card

correctness  outputs and gradients in float32 against float64 on the CPU: VAE3D in every memory mode, sparse
             convolution, quantiser
peaks        predicted against measured peak of a step
times        milliseconds of a step of `fast` beside MONAI's networks by MONAI and by us
graphs       milliseconds of a step with train.cuda_graph and without, and whether they agree (gpu_graphs.py)
race         `fast` and MONAI's AutoencoderKL after equal seconds of steps: whole volumes of --test
recovery     a step out of memory that is repeated; a killed run that goes on, compared by its bytes
repeat       two equal runs, compared by their bytes
whole        one volume, exact tiles beside MONAI's sliding window
sparse       one submanifold convolution, forward and backward; steps of the sparse autoencoder, with their
             predicted peaks
diffusion    a denoiser's step; a volume of 512^3 sampled, decoded and written (gpu_sample.py)

Each row is printed, and written where there is a file to write, as soon as it is known. A part that cannot
run here is one row that says why (`skipped`), a row that failed has `error`. Exit codes: 0 every row is
right; 1 a row has an error or `right` false; 2 nothing could be started. Version 0.2 (2026-11).
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]

import gpu_sparse  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import peaks  # noqa: E402
import quantize  # noqa: E402
import sparse_conv  # noqa: E402
import tiles  # noqa: E402
import train  # noqa: E402
import vae3d  # noqa: E402
from bench import gpu_graphs, gpu_sample  # noqa: E402
from runs import RunsOut  # noqa: E402
from tasks import TASKS  # noqa: E402
from training import config, devices, fit, plan  # noqa: E402
from training.console import line_of  # noqa: E402
from training.flags import load_config  # noqa: E402
from training.jobs import list_inputs  # noqa: E402
from training.memory import begin, with_recovery  # noqa: E402
from training.order import MicroBatch  # noqa: E402
from training.step import train_step  # noqa: E402
from training.task import of  # noqa: E402
from volumes.loading import load as load_file  # noqa: E402

Rows = Iterator[dict]
# Predicted over measured peak may be so far from 1; float32 so far from float64, of the largest norm.
TOLERANCE, ROUNDING = 0.1, 1e-3


def settings(options: argparse.Namespace, **flags: object) -> config.TrainConfig:
    return load_config(words_of({"amp": str(options.cuda).lower()} | dotted(flags)), TASKS)


def dotted(flags: dict) -> dict:
    """memory_mode is --memory.mode."""
    return {name.replace("_", ".", 1): value for name, value in flags.items()}


def words_of(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


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
    size = (8, 16, 32) if options.tiny else (32, 64, 64)
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
            network.memory(mode, (16, 16, 16) if mode == "tile" else None)
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
    grid = true.new_zeros(16, edge, edge, edge).index_put((torch.arange(16)[:, None], d, h, w), true.T)
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
    distance = (rows[:, None].double() - quantizer.codebook.double()).norm(dim=2)
    nearest = distance.min(1)
    loss = 0.25 * nearest.values.square().mean() / 4
    found = quantizer.to(options.device)(rows.to(options.device))
    # Of two codes as near as rounding either is right, so the distances are compared, not the numbers.
    chosen = distance.gather(1, found.index.cpu()[:, None])[:, 0]
    return {"what": "quantizer", "codes_differ": int((found.index.cpu() != nearest.indices).sum())} | judged(
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
            try:
                yield one_peak(options, preset, size, mode, amp)
            except RuntimeError as error:        # of this row alone; the next has the memory back
                yield {"preset": preset, "size": size, "mode": mode, "amp": amp, "error": line_of(error)}


def one_peak(options: argparse.Namespace, preset: str, size: str, mode: str, amp: str) -> dict:
    cfg = settings(options, preset=preset, patch=size, batch=1, memory_mode=mode, amp=amp)
    row = {"preset": preset, "size": size, "mode": mode, "amp": amp}
    known, key = vars(options).setdefault("known", {}), tuple(row.values())
    if key in known:                             # `times` has rows of `peaks`
        return known[key]
    cfg, _ = plan.settled_config(cfg, of(TASKS, cfg), options.device)
    row["tile"] = cfg.memory.tile
    predicted = fit.predicted(cfg, of(TASKS, cfg), options.device).bytes
    row["predicted_gib"] = round(predicted / peaks.GIB, 4)
    if options.cuda and predicted > torch.cuda.mem_get_info()[0] * (1 - peaks.SPARE):
        return row | {"skipped": "predicted to take more than this card has free"}
    found = peaks.measure(lambda device: fit.make_step(cfg, of(TASKS, cfg), device), options.device, 2)
    ratio = predicted / found.allocated
    reserved = found.reserved and round(found.reserved / peaks.GIB, 4)
    known[key] = row | {"measured_gib": peak_gib(found), "reserved_gib": reserved, "ratio": round(ratio, 3),
                        "ms": round(1000 * found.seconds, 2), "right": abs(ratio - 1) <= TOLERANCE}
    return known[key]


# ----------------------------------------------------------------------------------------------- how fast

def step_times(options: argparse.Namespace) -> Rows:
    """`fast`, MONAI's networks, and these run by us, in turn; the two large sizes are ours alone."""
    room, precision = race_room(), "bf16" if options.cuda else "fp32"
    if isinstance(room, str):
        yield {"skipped": f"no comparison: {room}"}
    else:
        for size in [(16, 16, 16)] if options.tiny else [(32, 64, 64), (64, 256, 256)]:
            for name in ("AutoencoderKL",) if options.tiny else room.THEIRS:
                yield {"against": name, "size": size, "precision": precision} | beside(
                    options, room, name, size, room.PRECISIONS[precision])
    for size, mode in [("16,32,32", "tile")] if options.tiny else [("512,512,512", "none"),
                                                                   ("1024,1024,1024", "tile")]:
        row = one_peak(options, "fast", size, mode, str(options.cuda).lower())
        yield {"against": None} | {name: value for name, value in row.items() if name != "right"}


def beside(options: argparse.Namespace, room: ModuleType, name: str, size: tuple[int, int, int],
           dtype: torch.dtype | None) -> dict:
    cfg = room.config(size, 1)
    converted, _ = room.weights.convert(room.THEIRS[name]().state_dict(), norm_num_groups=8)
    makes = {"ours": room.our_step(cfg, dtype), "theirs": room.their_step(name, cfg, dtype),
             "same_network": room.our_step(cfg, dtype, converted)}
    steps = {side: make(options.device) for side, make in makes.items()}
    times = room.paired(steps, options.device, 3 if options.tiny else 10)
    row = {f"{side}_ms": round(1000 * statistics.median(values), 2) for side, values in times.items()}
    return row | {"ratio": room.ratio(times["ours"], times["theirs"]),
                  "same_network_ratio": room.ratio(times["same_network"], times["theirs"])}


def replayed(options: argparse.Namespace) -> Rows:
    for row in gpu_graphs.rows(options.device, options.tiny, functools.partial(settings, options)):
        errors = {name: row.pop(name) for name in ("weights", "norm")}
        yield row | judged(**errors)


# ----------------------------------------------------------------------------------------------- how good

def race(options: argparse.Namespace) -> Rows:
    """Each side trains for --seconds of steps on the same crops, its schedule as long as that; then the whole
    volumes of --test. Without folders, tiny: synthetic volumes and their held-out crops."""
    room = race_room()
    if isinstance(room, str) or (options.train is None and not options.tiny):
        yield {"skipped": room if isinstance(room, str) else "needs --train FOLDER and --test FOLDER"}
        return
    size, batch = ((16, 32, 32), 1) if options.tiny else ((16, 96, 96), 8)
    more = {"data": options.train} if options.train else {
        "data.synthetic_count": "4", "data.synthetic_size": "16,32,32"}
    cfg, dtype = room.config(size, batch, **more), room.PRECISIONS["bf16" if options.cuda else "fp32"]
    opened = room.data.open_data(cfg.data, cfg.train.seed, lambda line: None)
    crops = room.data.Crops(opened, cfg.train.seed)
    if options.test:
        volumes = [(item.known_as, image) for item in list_inputs([options.test])
                   for image, _ in load_file(item, cfg.data).volumes]
    else:
        volumes = [(crop.entry.name, crop.image) for crop in room.data.val_crops(opened, cfg.train.seed, 2)]
    for side in ("theirs", "ours"):
        network, row = trained(options, room, side, cfg, dtype, crops)
        scores = [room.scores(network, [whole(image, options)], dtype) for _, image in volumes]
        mean = {name: round(statistics.mean(score[name] for score in scores), 4) for name in scores[0]}
        yield {"side": side, "size": size, "batch": batch, **row, "test_volumes": len(volumes), **mean}


def whole(image: object, options: argparse.Namespace) -> Tensor:
    """(C, D, H, W) on the device, padded as MONAI's network needs it; tiny: its first voxels."""
    x = torch.as_tensor(image)
    if options.tiny:
        x = x[:, :16, :64, :64]
    return devices.to_device(vae3d.pad_to_multiple(x[None], (4, 4, 4)), options.device)[0]


def trained(options: argparse.Namespace, room: ModuleType, side: str, cfg: config.TrainConfig,
            dtype: torch.dtype | None, crops: object) -> tuple[nn.Module, dict]:
    """The first four steps, of a network that is thrown away, say how many the seconds pay for."""
    longest = 2.0 if options.tiny else options.seconds
    _, first = some_steps(options, room, side, cfg, dtype, crops, 4)
    total = max(4, round(longest / statistics.median(first[1:])))
    network, spent = some_steps(options, room, side, cfg, dtype, crops, total)
    return network, {"steps": total, "seconds": round(sum(spent), 2),
                     "ms": round(1000 * statistics.median(spent), 2)}


def some_steps(options: argparse.Namespace, room: ModuleType, side: str, cfg: config.TrainConfig,
               dtype: torch.dtype | None, crops: object, total: int) -> tuple[nn.Module, list[float]]:
    """The network after `total` steps, and the seconds of each."""
    if side == "theirs":
        theirs = room.Theirs("AutoencoderKL", cfg, options.device, dtype)
        network, optimizer = theirs.network, theirs.optimizer
    else:
        state = begin(cfg, of(TASKS, cfg), options.device)
        state.amp_dtype, network, optimizer = dtype, state.model, state.optimizer
    spent = []
    for step, micro in room.batches(cfg, crops, total, options.device):
        room.set_rate(optimizer, cfg, step, total)
        if side == "theirs":
            spent.append(room.seconds(functools.partial(theirs.step, micro.image), options.device))
        else:
            state.step = step
            spent.append(room.seconds(functools.partial(train_step, cfg, state, [micro]), options.device))
    return network, spent


# ------------------------------------------------------------------------------------------ does it go on

def recovery(options: argparse.Namespace) -> Rows:
    yield out_of_memory(options)
    yield killed(options)


def out_of_memory(options: argparse.Namespace) -> dict:
    """A step with less memory than mode none takes, and the same step with enough: equal to rounding.

    On a card the allocator is given 70 % of what the step took; on the CPU an operation fails once."""
    patch = "8,32,32" if options.tiny else "64,256,256"
    cfg = settings(options, preset="fast", patch=patch, batch=1, memory_mode="none")
    notes, weights, taken, image = [], [], 0, torch.randn(1, 1, *cfg.data.patch)
    for short in (False, True):
        state = begin(cfg, of(TASKS, cfg), options.device)
        micro = MicroBatch(devices.to_device(image, options.device), [0], [0])
        work = functools.partial(train_step, cfg, state, [micro])
        with contextlib.ExitStack() as stack:
            if short and options.cuda:
                stack.callback(torch.cuda.set_per_process_memory_fraction, 1.0)
                torch.cuda.empty_cache()
                card = torch.cuda.get_device_properties(options.device).total_memory
                torch.cuda.set_per_process_memory_fraction(0.7 * taken / card)
            elif short:
                stack.enter_context(RunsOut([200]))
            with_recovery(cfg, state, image.shape, notes.append, work)
            if options.cuda:
                taken = torch.cuda.memory_reserved()
        weights.append(torch.cat([p.detach().cpu().flatten() for p in state.model.parameters()]))
        del state, micro, work
        gc.collect()
    row = {"what": "out of memory" if options.cuda else "out of memory, simulated", "said": notes}
    found = judged(weights=off(weights[1], weights[0]))
    return row | found | {"right": found["right"] and bool(notes)}


def run_of(options: argparse.Namespace, out: Path, **flags: object) -> list[str]:
    """Words of a short run of train.py on synthetic volumes."""
    size = "8,16,16" if options.tiny else "32,64,64"
    words = {"data.synthetic_count": 4, "data.synthetic_size": size, "patch": size, "batch": 1,
             "data.crops_per_volume": 4, "train.val_crops": 1, "train.latent_crops": 1, "log.sample_every": 0,
             "train.save_every": 2, "steps": 6 if options.tiny else 30, "device": options.device,
             "amp": str(options.cuda).lower(), "vae.base_channels": 8 if options.tiny else 16, "out": out}
    return words_of(words | dotted(flags))


def run(words: list[str]) -> None:
    """train.py in this process, without what it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = train.main(words)
    if code:
        raise RuntimeError(f"train.py ended with {code}: {said.getvalue().strip().splitlines()[-1]}")


def killed(options: argparse.Namespace) -> dict:
    """Killed in the middle, then --resume: last.pt has the bytes of the run that was left alone."""
    with tempfile.TemporaryDirectory() as folder:
        alone, cut = Path(folder) / "alone", Path(folder) / "cut"
        run(run_of(options, alone, log_every=1))
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *run_of(
            options, cut, log_every=1)], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step 4/"):
                process.kill()
                break
        process.wait()
        at = torch.load(cut / "last.pt", weights_only=True)["step"]
        run(["--resume", str(cut)])
        same = (alone / "last.pt").read_bytes() == (cut / "last.pt").read_bytes()
    return {"what": "killed and resumed", "goes_on_from_step": at, "exit_code": process.returncode,
            "right": same and process.returncode < 0}


def repeat(options: argparse.Namespace) -> Rows:
    """Twice the same command: last.pt has the same bytes."""
    cases = {"fast": {"preset": "fast"}, "trilinear": {"vae_upsample": "trilinear"},
             "attention": {"vae_attention": "true"}}
    for name, flags in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            for side in "ab":
                run(run_of(options, Path(folder) / side, **flags))
            a, b = ((Path(folder) / side / "last.pt").read_bytes() for side in "ab")
        yield {"what": name, "right": a == b}


# ------------------------------------------------------------------------------------- volumes and points

def whole_volume(options: argparse.Namespace) -> Rows:
    """Exact tiles of `fast` and windows of MONAI's network, both new; how far each is from its network run on
    the volume in one piece, where that fits. On the CPU the peak is of live tensors."""
    size = (16, 32, 64) if options.tiny else (128, 512, 512)
    torch.manual_seed(0)
    image, vae = torch.rand(1, 1, *size) * 2 - 1, vae3d.VAE3D.from_preset("fast").eval()
    vae = devices.on_device(vae, options.device)
    tiled = plan.for_volumes(copy.deepcopy(vae), (16, 16, 16) if options.tiny else "auto")
    ours = [lambda x, network=network: network.decode(network.encode(x).mu, x.shape[2:])
            for network in (tiled, vae)]
    yield {"what": "exact tiles, fast", "size": size} | reconstructed(options, image, *ours)
    room = race_room()
    if isinstance(room, str):
        yield {"what": "sliding window", "skipped": room}
        return
    from monai.inferers import SlidingWindowInferer

    theirs = room.THEIRS["AutoencoderKL"]().to(options.device).eval().reconstruct
    window = (16, 32, 32) if options.tiny else (64, 128, 128)
    inferer = SlidingWindowInferer(window, overlap=0.25, mode="gaussian")
    yield {"what": "MONAI, sliding window", "size": size, "window": window} | reconstructed(
        options, image, lambda x: inferer(x, theirs), theirs)


@torch.no_grad()
def reconstructed(options: argparse.Namespace, image: Tensor, in_parts: Callable[[Tensor], Tensor],
                  in_one_piece: Callable[[Tensor], Tensor]) -> dict:
    dtype = torch.bfloat16 if options.cuda else None
    def make(device: torch.device, work: Callable[[Tensor], Tensor] = in_parts) -> Callable[[], Tensor]:
        x = devices.to_device(image, device)

        def once() -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                return work(x)
        return once
    found = peaks.measure(make, options.device, 1)
    row = {"seconds": round(found.seconds, 3), "peak_gib": peak_gib(found)}
    recon = make(options.device)().cpu()
    try:
        return row | {"off_one_piece": off(recon, make(options.device, in_one_piece)().cpu())}
    except RuntimeError as error:
        if not tiles.is_out_of_memory(error):
            raise
        return row | {"off_one_piece": "in one piece it runs out of memory"}


def sparse(options: argparse.Namespace) -> Rows:
    yield from gpu_sparse.rows(options, points, settings, timed)


def timed(options: argparse.Namespace, make: peaks.MakeStep) -> dict:
    found = peaks.measure(make, options.device, 3 if options.tiny else 10)
    return {"ms": round(1000 * found.seconds, 2), "peak_gib": peak_gib(found)}


def denoiser(options: argparse.Namespace) -> Rows:
    size = (4, 8, 8) if options.tiny else (32, 64, 64)
    small = {"unet_channels": "32,32", "diffusion_steps": 2} if options.tiny else {}
    cfg = settings(options, task="diffusion", preset="denoiser_light", patch=",".join(map(str, size)),
                   batch=1, **small)
    task = of(TASKS, cfg)
    row = {"latent": (cfg.unet.in_channels, *size)}
    yield {"what": "a step"} | row | timed(options, lambda device: fit.make_step(cfg, task, device))
    yield from gpu_sample.rows(options.device, options.tiny)


PARTS = {"correctness": correctness, "peaks": peaks_of_steps, "times": step_times, "graphs": replayed,
         "race": race, "recovery": recovery, "repeat": repeat, "whole": whole_volume, "sparse": sparse,
         "diffusion": denoiser}


# ----------------------------------------------------------------------------------------------- the command

def rows_of(part: str, options: argparse.Namespace) -> Rows:
    """The rows of a part; an exception is its last one."""
    try:
        yield from PARTS[part](options)
    except Exception as error:       # whatever it is, the parts behind it are still worth their time
        yield {"error": f"{type(error).__name__}: {line_of(error)}"}


def facts(options: argparse.Namespace) -> dict:
    room = race_room()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "card": torch.cuda.get_device_name() if options.cuda else None,
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
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
            print("  ".join([part, *(f"{name} {shown(value)}" for name, value in row.items())]), flush=True)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(found, indent=1) + "\n")
            gc.collect()
            if options.cuda:
                torch.cuda.empty_cache()
    return int(failed)


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else fit.size_text(value)


if __name__ == "__main__":
    sys.exit(main())
