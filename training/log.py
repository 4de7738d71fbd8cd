"""log.jsonl, the console, and on request TensorBoard and Weights & Biases. Version 0.3 (2026-11)."""
from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

from torch import Tensor

import losses
from training import checkpoints, ranks
from training.config import TrainConfig, config_dict
from training.console import shown, tell
from training.state import State

VAL_SHOWN = ("psnr", "ssim", "l1", "iou", "sharpness", "dice", "explained", "loss")
TERMS_SHOWN = (
    "loss",
    *losses.RECONSTRUCTION,
    "kl",
    "vq",
    "structure",
    "perceptual",
    "adv",
    "disc",
    "ce",
    "dice_loss",
    "explained",
    "codebook_usage",
    "perplexity",
)


class Log:
    """log.jsonl, the console and, on request, TensorBoard and Weights & Biases; on other ranks than the
    first, nothing.
    """
    def __init__(self, cfg: TrainConfig, out: Path, total: int, start: int, sinks: list, validated: int = -1):
        self.cfg, self.path, self.total, self.start, self.started = (
            cfg,
            out / "log.jsonl",
            total,
            start,
            time.monotonic(),
        )
        self.live, self.sinks = sys.stdout.isatty(), sinks
        # Rows after the checkpoint belong to steps that are taken again.
        if self.path.exists() and ranks.first():
            rows = [line for line in self.path.read_text().splitlines() if is_before(line, start, validated)]
            checkpoints.write_atomic(
                self.path, lambda file: file.write("".join(row + "\n" for row in rows).encode())
            )
        self.file = open(self.path if ranks.first() else os.devnull, "a", encoding="utf-8")

    def write(self, row: dict) -> None:
        """Append to log.jsonl alone."""
        with checkpoints.naming(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def row(self, row: dict) -> None:
        """Append to log.jsonl (non-finite numbers as null) and to the sinks, and print."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.write(row)
        for sink in self.sinks:
            sink.scalars(
                {
                    f"{row['split']}/{k}": v
                    for k, v in row.items()
                    if isinstance(v, (int, float)) and k != "step"
                },
                row["step"],
            )
        step = row["step"]
        if row["split"] == "val":
            self.say(f"step {step}/{self.total}  validation  " + "  ".join(
                f"{name} {shown(row[name])}{' dB' * (name == 'psnr')}" for name in VAL_SHOWN if name in row))
        elif self.live or step % self.cfg.log.every == 0 or step == self.total or "skipped" in row:
            left = (time.monotonic() - self.started) / max(1, step - self.start) * (self.total - step)
            terms = "  ".join(f"{k} {shown(row[k])}" for k in TERMS_SHOWN if k in row)
            line = (f"step {step}/{self.total}  {terms}  lr {row['lr']:.1e}  {row['voxels_per_second']:.2g} "
                    f"voxels/s  {row['peak_gib']:.2f} GiB  {int(left // 60)}:{int(left % 60):02d} left")
            tell(f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n")

    def say(self, text: str) -> None:
        tell(f"\r\x1b[K{text}" if self.live else text)

    def close(self) -> None:
        try:
            # What a full disk did not take is tried once more.
            with checkpoints.naming(self.path):
                self.file.close()
        finally:
            for sink in self.sinks:
                sink.close()


def is_before(line: str, step: int, validated: int) -> bool:
    try:
        row = json.loads(line)
        return row["step"] <= (validated if row.get("split") == "val" else step)
    # The last line of a killed run may be cut short.
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def open_sinks(cfg: TrainConfig, out: Path) -> list:
    """TensorBoard and W&B when asked for, on the first rank. Raises ValueError with the pip command when one
    is not installed.
    """
    sinks = []
    if not ranks.first():
        return sinks
    if cfg.log.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("log.tensorboard: TensorBoard is not installed; python -m pip install "
                             "tensorboard") from None
        sinks.append(TensorBoardSink(SummaryWriter(str(out / "tensorboard"))))
    if cfg.log.wandb:
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "log.wandb: Weights & Biases is not installed; python -m pip install wandb"
            ) from None
        sinks.append(
            WandbSink(
                wandb,
                wandb.init(
                    project=cfg.log.wandb_project, dir=str(out), config=config_dict(cfg), name=out.name
                ),
            )
        )
    return sinks


class TensorBoardSink:
    def __init__(self, writer):
        self.writer = writer

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self.writer.add_image(name, image, step, dataformats="HWC")

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self.writer.add_histogram(name, values, step)

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    def __init__(self, wandb, run):
        self.wandb, self.run = wandb, run

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self.run.log({name: self.wandb.Image(image.numpy())}, step=step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self.run.log({name: self.wandb.Histogram(values.numpy())}, step=step)

    def close(self) -> None:
        self.run.finish()


def log_histograms(log: Log, state: State) -> None:
    """Weights and their last gradients, to the sinks that take them."""
    for sink in log.sinks:
        for name, parameter in state.model.named_parameters():
            sink.histogram(f"weights/{name}", parameter.detach().float().cpu(), state.step)
            if parameter.grad is not None:
                sink.histogram(f"gradients/{name}", parameter.grad.float().cpu(), state.step)


def codebook_use(usage: Tensor) -> dict[str, float]:
    """Share of the codes chosen at least once, and perplexity exp(entropy) of the choices: 1 to K."""
    share = usage.double() / usage.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return {"codebook_usage": float((usage > 0).double().mean()), "perplexity": float(entropy.exp())}
