"""A race against MONAI's 3D autoencoders: step time, peak memory, PSNR and SSIM.

    python bench/vs_monai.py --quick --json out.json                       # one table, 3 minutes on 2 cores
    python bench/vs_monai.py --data FOLDER --json out.json --png out.png   # and quality

Data, crops, seed, loss and precision are the same for both sides. They take turns in one run, so that a
machine whose speed drifts does not matter: a time ratio is the
median over pairs of steps that follow each other. Ours is `training.step.train_step` with all that it does
(clipping, finite check); MONAI's is the plain loop that its tutorials have, without GradScaler: zero_grad,
forward, L1 + KL, backward, clip, AdamW (fused). Ours runs in channels_last_3d, as always; MONAI's as it
comes. Peak memory is the most bytes of live tensors of a step, predicted by memtest.py in the same way for
both (what kernels take inside is in neither), on a GPU torch.cuda.max_memory_allocated. Networks: MONAI's
of 16,32,64 channels and one block a level, 740,593 parameters; ours, the preset `fast`, has 640,057. `same
network` is MONAI's own, converted by weights.py and run by us.

Quality: both train on the same crops with the same schedule; then ours trains again, anew, for as many
steps as MONAI's seconds pay for. Held-out crops are reconstructed from the mean.
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import training.config  # noqa: E402
import training.devices  # noqa: E402
import training.order  # noqa: E402
import training.step  # noqa: E402
from tasks import TASKS  # noqa: E402
from training.flags import load_config  # noqa: E402
from training.memory import begin  # noqa: E402
from training.task import of  # noqa: E402

try:
    import monai  # noqa: E402
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi  # noqa: E402
    from monai.networks.nets import AutoencoderKL  # noqa: E402
except ModuleNotFoundError:
    sys.exit("vs_monai.py: MONAI is not installed; python -m pip install monai==1.6.1")

import data  # noqa: E402
import losses  # noqa: E402
import muon  # noqa: E402
import peaks  # noqa: E402
import pictures  # noqa: E402
import vae3d  # noqa: E402
import weights  # noqa: E402

COMMON = dict(
    spatial_dims=3,
    in_channels=1,
    out_channels=1,
    attention_levels=(False,) * 3,
    latent_channels=4,
    norm_num_groups=8,
    with_encoder_nonlocal_attn=False,
    with_decoder_nonlocal_attn=False,
)
THEIRS = {
    "AutoencoderKL": lambda: AutoencoderKL(channels=(16, 32, 64), num_res_blocks=1, **COMMON),
    "MAISI": lambda: AutoencoderKlMaisi(
        num_channels=(16, 32, 64), num_res_blocks=(1,) * 3, norm_float16=False, num_splits=1, **COMMON
    ),
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
Step = Callable[[], object]


def config(
    size: tuple[int, int, int], batch: int, mode: str = "none", steps: int = 300, **more: str
) -> training.config.TrainConfig:
    flags = {
        "preset": "fast",
        "patch": ",".join(map(str, size)),
        "batch": str(batch),
        "steps": str(steps),
        "memory.mode": mode,
        **more,
    }
    return load_config([word for name, value in flags.items() for word in (f"--{name}", value)], TASKS)


def our_step(
    cfg: training.config.TrainConfig, dtype: torch.dtype | None, vae_config: vae3d.VAEConfig | None = None
) -> peaks.MakeStep:
    """training.fit.make_step; dtype: of autocast, whatever `--amp` would choose on this machine.

    vae_config: in place of the preset.
    """
    if vae_config is not None:
        cfg = dataclasses.replace(cfg, vae=vae_config)

    def make(device: torch.device) -> Step:
        state = begin(cfg, of(TASKS, cfg), device)
        state.amp_dtype = dtype
        batch = training.order.MicroBatch(
            training.devices.to_device(torch.randn(cfg.train.batch, 1, *cfg.data.patch), device),
            [0] * cfg.train.batch,
            [0],
        )
        return lambda: training.step.train_step(cfg, state, [batch])
    return make


class Theirs:
    """A MONAI network, its optimizer and the loop around them; loss weights and clipping are those of
    `cfg`. Its optimizer is AdamW, or with `by_muon` ours."""

    def __init__(
        self, name: str, cfg: training.config.TrainConfig, device: torch.device, dtype: torch.dtype | None,
        by_muon: bool = False
    ):
        torch.manual_seed(cfg.train.seed)
        self.network, self.cfg, self.dtype = THEIRS[name]().to(device), cfg, dtype
        decay = cfg.optim.weight_decay
        if by_muon:
            self.optimizer = muon.Muon(muon.groups_of(self.network), cfg.optim.lr, decay)
        else:
            self.optimizer = torch.optim.AdamW(
                self.network.parameters(), cfg.optim.lr, weight_decay=decay, fused=True)

    def step(self, image: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(image.device.type, self.dtype, enabled=self.dtype is not None):
            recon, mu, sigma = self.network(image)
        kl = losses.kl_loss(mu.float(), 2 * sigma.float().log())
        (losses.reconstruction_loss(recon, image, "l1") + self.cfg.loss.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.cfg.optim.grad_clip)
        self.optimizer.step()


def their_step(name: str, cfg: training.config.TrainConfig, dtype: torch.dtype | None) -> peaks.MakeStep:
    def make(device: torch.device) -> Step:
        theirs, image = (
            Theirs(name, cfg, device, dtype),
            torch.randn(cfg.train.batch, 1, *cfg.data.patch, device=device),
        )
        return lambda: theirs.step(image)
    return make


def seconds(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def paired(steps: dict[str, Step], device: torch.device, pairs: int) -> dict[str, list[float]]:
    """Seconds of each, `pairs` times in turn, after two rounds to warm up; fewer where that takes over
    100 seconds, but at least three."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for number in range(2 + pairs):
        if number >= 5 and time.perf_counter() - start > 100:
            break
        for name, step in list(steps.items())[::1 if number % 2 else -1]:
            found[name].append(seconds(step, device))
    return {name: values[2:] for name, values in found.items()}


def ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs)), 3)


def peak(make: peaks.MakeStep, device: torch.device) -> int:
    if device.type != "cuda":
        return peaks.predict(make, device).bytes
    step = make(device)
    for _ in range(2):
        step()
        torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


def compare(
    name: str,
    size: tuple[int, int, int],
    batch: int,
    precision: str,
    device: torch.device,
    pairs: int,
    same: bool,
) -> dict:
    """Step times and peaks of one setting: MONAI's network, our preset in three memory modes, and MONAI's
    own network run by us."""
    dtype, cfg = PRECISIONS[precision], config(size, batch)
    makes = {"theirs": their_step(name, cfg, dtype), "ours": our_step(cfg, dtype)}
    if same:
        converted, _ = weights.convert(THEIRS[name]().state_dict(), norm_num_groups=8)
        makes["same network"] = our_step(cfg, dtype, converted)
    times = paired({side: make(device) for side, make in makes.items()}, device, pairs)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    bytes_theirs = peak(makes["theirs"], device)
    row = {
        "theirs": name,
        "size": size,
        "batch": batch,
        "precision": precision,
        "pairs": len(times["ours"]),
        "theirs_seconds": round(statistics.median(times["theirs"]), 4),
        "ours_seconds": round(statistics.median(times["ours"]), 4),
        "step_time_ratio": ratio(times["ours"], times["theirs"]),
        "theirs_gib": round(bytes_theirs / peaks.GIB, 4),
    }
    if same:
        row["same_network_step_time_ratio"] = ratio(times["same network"], times["theirs"])
        row["same_network_peak_ratio"] = round(peak(makes["same network"], device) / bytes_theirs, 3)
    for mode, key in (
        ("none", "peak_ratio"),
        ("checkpoint", "peak_ratio_checkpoint"),
        ("tile", "peak_ratio_tile"),
    ):
        row[key] = round(peak(our_step(config(size, batch, mode), dtype), device) / bytes_theirs, 3)
    return row


# ---------------------------------------------------------------------------------------------------- quality

@torch.no_grad()
def reconstructions(
    network: torch.nn.Module, held_out: list[Tensor], dtype: torch.dtype | None
) -> list[Tensor]:
    """Of each (C, D, H, W), from the latent's mean, float32."""
    network.eval()
    found = []
    for image in held_out:
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            recon = (
                network(image[None]).recon
                if isinstance(network, vae3d.VAE3D)
                else network.reconstruct(image[None])
            )
        found.append(recon[0].float())
    network.train()
    return found


def scores(network: torch.nn.Module, held_out: list[Tensor], dtype: torch.dtype | None) -> dict[str, float]:
    pairs = [
        (recon[None], image[None])
        for recon, image in zip(reconstructions(network, held_out, dtype), held_out)
    ]
    return {
        name: round(statistics.mean(float(f(a, b)) for a, b in pairs), 4)
        for name, f in (("psnr", losses.psnr), ("ssim", losses.ssim))
    }


def batches(
    cfg: training.config.TrainConfig, crops: data.Crops, steps: int, device: torch.device
) -> Iterator[tuple[int, training.order.MicroBatch]]:
    for step, micro_batches in training.order.step_batches(cfg, crops, range(steps), device, cfg.train.batch):
        yield step, micro_batches[0]


def set_rate(
    optimizer: torch.optim.Optimizer,
    cfg: training.config.TrainConfig,
    step: int,
    total: int,
    factor: float = 1.0,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = factor * training.order.learning_rate(cfg.optim, step, total)


def race(
    name: str,
    folder: str,
    size: tuple[int, int, int],
    batch: int,
    steps: int,
    precision: str,
    device: torch.device,
    png: Path | None,
    seed: int,
    val_crops: int,
    their_lr: float,
    their_muon: bool,
) -> dict:
    """Train both for `steps`, then ours anew for MONAI's seconds; figures on held-out crops after each,
    and every quarter of the first. their_muon: MONAI's network by our optimizer and rate beside them."""
    cfg, dtype = config(size, batch, data=folder, seed=str(seed)), PRECISIONS[precision]
    dataset = data.open_data(cfg.data, cfg.train.seed, lambda line: None)
    crops = data.Crops(dataset, cfg.train.seed)
    held_out = [
        training.devices.to_device(crop.image[None], device)[0]
        for crop in data.val_crops(dataset, cfg.train.seed, val_crops)
    ]
    theirs, ours = Theirs(name, cfg, device, dtype), begin(cfg, of(TASKS, cfg), device)
    mixed = Theirs(name, cfg, device, dtype, by_muon=True) if their_muon else None
    ours.amp_dtype = dtype
    spent, curve = {"theirs": [], "ours": []}, []
    for step, micro in batches(cfg, crops, steps, device):
        set_rate(theirs.optimizer, cfg, step, steps, their_lr / cfg.optim.lr)
        set_rate(ours.optimizer, cfg, step, steps)
        spent["theirs"].append(seconds(lambda micro=micro: theirs.step(micro.image), device))
        spent["ours"].append(
            seconds(lambda micro=micro: training.step.train_step(cfg, ours, [micro]), device)
        )
        ours.step = step + 1
        if mixed is not None:
            set_rate(mixed.optimizer, cfg, step, steps)
            mixed.step(micro.image)
        if (step + 1) % max(1, steps // 4) == 0:
            curve.append(
                {
                    "step": step + 1,
                    "theirs": scores(theirs.network, held_out, dtype),
                    "ours": scores(ours.model, held_out, dtype),
                }
            )
            print(
                f"{name}, {Path(folder).name}: step {step + 1}  "
                f"PSNR {curve[-1]['theirs']['psnr']:.2f} (MONAI)  "
                f"{curve[-1]['ours']['psnr']:.2f} (ours)",
                flush=True,
            )
    time_ratio = ratio(spent["ours"][2:], spent["theirs"][2:])
    longer, equal, spent["equal"] = round(steps / time_ratio), begin(cfg, of(TASKS, cfg), device), []
    equal.amp_dtype = dtype
    for step, micro in batches(cfg, crops, longer, device):
        set_rate(equal.optimizer, cfg, step, longer)
        spent["equal"].append(
            seconds(lambda micro=micro: training.step.train_step(cfg, equal, [micro]), device)
        )
        equal.step = step + 1
    after = scores(equal.model, held_out, dtype)
    print(
        f"{name}, {Path(folder).name}: MONAI's {steps} steps pay for {longer} of ours: "
        f"PSNR {after['psnr']:.2f}",
        flush=True,
    )
    beside = {} if mixed is None else {"theirs_by_muon": scores(mixed.network, held_out, dtype)}
    if beside:
        print(f"{name} by Muon: PSNR {beside['theirs_by_muon']['psnr']:.2f}", flush=True)
    if png is not None:
        png.write_bytes(pictures.png(picture(held_out[0], theirs.network, equal.model, dtype, dataset)))
    return {
        "theirs": name,
        "data": Path(folder).name,
        "size": size,
        "batch": batch,
        "steps": steps,
        "seed": seed,
        "precision": precision,
        "lr": {"theirs": their_lr, "ours": cfg.optim.lr},
        "seconds_of_steps": {side: round(sum(values), 1) for side, values in spent.items()},
        "held_out_crops": len(held_out),
        "step_time_ratio": time_ratio,
        "steps_of_equal_seconds": longer,
        "curve": curve,
        "equal_steps": {side: curve[-1][side] for side in ("theirs", "ours")} | beside,
        "equal_seconds": {"theirs": curve[-1]["theirs"], "ours": after},
        "gain_equal_steps_db": round(curve[-1]["ours"]["psnr"] - curve[-1]["theirs"]["psnr"], 2),
        "gain_equal_seconds_db": round(after["psnr"] - curve[-1]["theirs"]["psnr"], 2),
    }


def picture(
    image: Tensor,
    theirs: torch.nn.Module,
    ours: torch.nn.Module,
    dtype: torch.dtype | None,
    dataset: data.Data,
) -> Tensor:
    """An axial slice; columns: input, MONAI, its error, ours, its error (after the same seconds)."""
    x, a, b = (
        volume.cpu()
        for volume in (image, *(reconstructions(network, [image], dtype)[0] for network in (theirs, ours)))
    )
    weight, columns = (x - dataset.background).abs()[0], [([x], pictures.grey)]
    for recon in (a, b):
        columns += [([recon], pictures.grey), ([recon, x], pictures.error)]
    return pictures.sheet(
        [
            pictures.slices([v[0] for v in volumes], weight, (1.0, 1.0, 1.0), colour)[:1]
            for volumes, colour in columns
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="32,64,64 in fp32 alone, against AutoencoderKL; no quality"
    )
    parser.add_argument("--size", action="append", help="D,H,W; may be repeated [32,64,64 and 96,96,96]")
    parser.add_argument("--batch", type=int, default=1, help="crops a step [1]")
    parser.add_argument(
        "--pairs", type=int, default=10, help="pairs of steps a time ratio is the median of [10]"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument(
        "--data", action="append", default=[], help="folder of volumes to race on; may be repeated"
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of the race, 4 at least [300]")
    parser.add_argument("--seed", type=int, default=0, help="of the race [0]")
    parser.add_argument(
        "--their-lr",
        type=float,
        default=5e-4,
        help="MONAI's highest learning rate, of the same schedule [5e-4]",
    )
    parser.add_argument("--their-muon", action="store_true",
                        help="race MONAI's network by our optimizer and rate too")
    parser.add_argument("--race-size", default="32,64,64", help="its crops [32,64,64]")
    parser.add_argument("--race-precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--val-crops", type=int, default=16, help="held-out crops [16]")
    parser.add_argument("--no-times", action="store_true", help="the race alone")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--png", type=Path, help="file for the first race's picture")
    args = parser.parse_args()
    rows, races = [], []
    try:
        device = training.devices.pick_device(args.device)
        sizes = [training.config.convert(size, tuple[int, int, int], "--size")
                 for size in args.size or (["32,64,64"] if args.quick else ["32,64,64", "96,96,96"])]
        if args.steps < 4 or args.pairs < 3 or args.batch < 1:
            raise ValueError("--steps must be at least 4, --pairs 3, --batch 1")
        race_size = training.config.convert(args.race_size, tuple[int, int, int], "--race-size")
        for folder in args.data:
            data.open_data(config(race_size, args.batch, data=folder).data, args.seed, lambda line: None)
    except ValueError as error:
        print(f"vs_monai.py: {error}", file=sys.stderr)
        return 2
    wrong = None
    if device.type == "cpu":
        # The convolution that most of either network is made of.
        wrong = training.devices.what_is_wrong_with_bf16((
            (32, 32, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),))
    if wrong is not None and (args.race_precision == "bf16" if args.no_times else not args.quick):
        print(
            f"note: {wrong}; the lowest level here is size / 4 deep"
        )
    if not args.no_times:
        print(
            "| against | D,H,W | precision | step time ours / theirs | same network "
            "| peak none | checkpoint | tile | theirs, s | GiB |\n"
            "|---|---|---|---|---|---|---|---|---|---|"
        )
    for name in () if args.no_times else (("AutoencoderKL",) if args.quick else THEIRS):
        for size in sizes:
            for precision in ("fp32",) if args.quick else PRECISIONS:
                row = compare(name, size, args.batch, precision, device, args.pairs, same=not args.quick)
                rows.append(row)
                print(
                    f"| {name} | {','.join(map(str, size))} | {precision} | {row['step_time_ratio']} "
                    f"| {row.get('same_network_step_time_ratio', '-')} "
                    f"| {row['peak_ratio']} | {row['peak_ratio_checkpoint']} "
                    f"| {row['peak_ratio_tile']} | {row['theirs_seconds']} | {row['theirs_gib']} |",
                    flush=True,
                )
    for folder in args.data:
        png = args.png if args.png and not races else None
        races.append(race("AutoencoderKL", folder, race_size, args.batch, args.steps, args.race_precision,
                          device, png, args.seed, args.val_crops, args.their_lr, args.their_muon))
    if args.json:
        facts = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "torch": torch.__version__,
            "monai": monai.__version__,
            "python": platform.python_version(),
            "bf16_on_this_cpu": wrong or "right",
        }
        # ours / MONAI, fp32, mode none
        first = {key: rows[0][key] for key in ("step_time_ratio", "peak_ratio")} if rows else {}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({**first, "facts": facts, "rows": rows, "races": races}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
