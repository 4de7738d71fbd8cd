"""What a run tells: log.jsonl, the console, and on request TensorBoard and Weights & Biases.

A row is a dict of plain values, one for each optimizer step and each validation. log.jsonl gets every row;
the console a line of some of them. A sink is what TensorBoard and W&B have in common: scalars, pictures,
histograms, and an end. Only the first rank writes. Version 0.3 (2026-11).
"""
from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

import losses
from training import ranks
from training.config import TrainConfig, config_dict
from training.console import shown, tell, unit_of
from training.state import State
from volumes.files import naming, write_atomic

# What the console shows of a row, in this order, where the row has it.
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
# Codes of a terminal: back to the line's start, and clear what is behind.
START, CLEAR = "\r", "\x1b[K"


class Log:
    """log.jsonl, the console and the sinks; on other ranks than the first, nothing.

    total: steps of the run. start: the step that this process begins at. validated: the last step whose
    validation counts. memory_of: whose memory a step's figure is, where that is not the card's. behind,
    ahead: names of the stages before and after the one at hand.

    On a terminal the line of a step is written over the one before it, but those of every log.every stay.
    """
    def __init__(self, cfg: TrainConfig, out: Path, total: int, start: int, sinks: list, validated: int = -1,
                 memory_of: str = "", behind: Collection[str] = (), ahead: Collection[str] = ()):
        self.memory_of, self.last_validation = memory_of, ""
        self.cfg, self.path, self.sinks = cfg, out / "log.jsonl", sinks
        self.total, self.start = total, start
        # Every row of a run with stages has the name of its own.
        self.stage = ""
        self.started = time.monotonic()
        self.live = sys.stdout.isatty()

        # Rows after the checkpoint belong to steps that are taken again, so they go.
        if self.path.exists() and ranks.first():
            lines = self.path.read_text().splitlines()
            rows = [line for line in lines if is_before(line, start, validated, behind, ahead)]
            content = "".join(row + "\n" for row in rows).encode()
            write_atomic(self.path, lambda file: file.write(content))
        path = self.path if ranks.first() else os.devnull
        self.file = open(path, "a", encoding="utf-8")

    def write(self, row: dict) -> None:
        """Append to log.jsonl alone."""
        if self.stage:
            row = row | {"stage": self.stage}
        with naming(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def row(self, row: dict) -> None:
        """Append to log.jsonl (non-finite numbers as null) and to the sinks, and print."""
        row = {name: None if is_nan_or_infinite(value) else value for name, value in row.items()}
        self.write(row)

        # The sinks get the numbers, under the name of the split: train/loss.
        split, step = row["split"], row["step"]
        numbers = {}
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                numbers[f"{split}/{name}"] = value
        for sink in self.sinks:
            sink.scalars(numbers, step)

        # The console gets every validation, and the steps that are due, the last, or failed.
        if split == "val":
            self.say(self.val_text(row))
        elif self.live or step % self.cfg.log.every == 0 or step == self.total or "skipped" in row:
            if not self.live:
                tell(self.step_text(row))
                return
            # A line that is wider than the terminal would go on below and could not be written over.
            line = fitted(self.step_parts(row), shutil.get_terminal_size().columns - 1)
            stays = step % self.cfg.log.every == 0 or step == self.total or "skipped" in row
            tell(f"{START}{line}{CLEAR}", end="\n" if stays else "")

    def val_text(self, row: dict) -> str:
        figures = []
        for name in VAL_SHOWN:
            if name in row:
                figures.append(f"{name} {shown(row[name])}{unit_of(name)}")
        self.last_validation = f"validation {figures[0]}" if figures else ""
        return f"step {row['step']}/{self.total}  validation  {'  '.join(figures)}"

    def step_parts(self, row: dict) -> list[tuple[int, str]]:
        """The parts of a step's line from left to right, each with its rank: those of rank 0 are dropped last
        where there is no room. They keep their width from step to step.

        The time that is left is that of the steps so far, times the steps to come.
        """
        step = row["step"]
        per_step = (time.monotonic() - self.started) / max(1, step - self.start)
        left = per_step * (self.total - step)
        terms = [f"{name} {shown(row[name]):<9}" for name in TERMS_SHOWN if name in row]
        width = len(str(self.total)) if self.live else 0
        parts = [(0, f"step {step:>{width}}/{self.total}"), (2, f"epoch {row['epoch']}")]
        parts += [(0 if term.startswith("loss") else 4, term) for term in terms]
        parts += [(3, f"lr {row['lr']:.1e}"), (3, f"{row['voxels_per_second']:.2g} voxels/s")]
        parts += [(2, f"{row['peak_gib']:.2f} GiB{self.memory_of}")]
        parts += [(0, f"{int(left // 60)}:{int(left % 60):02d} left")]
        if self.live and self.last_validation:
            parts.append((1, self.last_validation))
        return parts

    def step_text(self, row: dict) -> str:
        return "  ".join(text.rstrip() for _, text in self.step_parts(row))

    def say(self, text: str) -> None:
        """A line that stays."""
        tell(f"{START}{CLEAR}{text}" if self.live else text)

    def close(self) -> None:
        try:
            # Closing writes once more what a full disk did not take.
            with naming(self.path):
                self.file.close()
        finally:
            for sink in self.sinks:
                sink.close()


def fitted(parts: list[tuple[int, str]], width: int) -> str:
    """The parts as a line of at most `width` characters: those of the highest rank go first, from the right.
    What is left is cut where even that is too long.
    """
    parts = list(parts)
    while len(parts) > 1 and len("  ".join(text for _, text in parts)) > width:
        worst = max(rank for rank, _ in parts)
        if worst == 0:
            break
        last = max(place for place, (rank, _) in enumerate(parts) if rank == worst)
        del parts[last]
    return "  ".join(text for _, text in parts)[:max(0, width)]


def is_nan_or_infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def is_before(line: str, step: int, validated: int, behind: Collection[str], ahead: Collection[str]) -> bool:
    """Whether a line of log.jsonl is of a step up to `step`, or of a validation up to `validated`.

    A stage that is behind ended with the validation at its last step, which is the first step of the next.
    """
    try:
        row = json.loads(line)
        if row.get("stage") in ahead:
            return False
        if row.get("stage") in behind:
            return row["step"] <= step
        last = validated if row.get("split") == "val" else step
        return row["step"] <= last
    # The last line of a killed run may be cut short.
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


# -------------------------------------------------------------------------------- the sinks

def open_sinks(cfg: TrainConfig, out: Path) -> list:
    """TensorBoard and W&B when asked for, on the first rank.

    Raises ValueError with the pip command when one is not installed.
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
            raise ValueError("log.wandb: Weights & Biases is not installed; python -m pip install "
                             "wandb") from None
        run = wandb.init(project=cfg.log.wandb_project, dir=str(out), config=config_dict(cfg), name=out.name)
        sinks.append(WandbSink(wandb, run))
    return sinks


class TensorBoardSink:
    """Pictures are (height, width, 3) uint8."""
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
    """The module is passed in, since it is imported only when it is asked for."""
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


# -------------------------------------------------------------------------------- figures

def log_histograms(log: Log, state: State) -> None:
    """Weights and their last gradients, to every sink.

    Of the finite ones: after a step without update gradients are not, for which TensorBoard raises.
    """
    for name, parameter in state.model.named_parameters():
        tensors = {f"weights/{name}": parameter.detach()}
        if parameter.grad is not None:
            tensors[f"gradients/{name}"] = parameter.grad
        for title, tensor in tensors.items():
            values = tensor.float().cpu()
            values = values[values.isfinite()]
            if values.numel():
                for sink in log.sinks:
                    sink.histogram(title, values, state.step)


def codebook_use(usage: Tensor) -> dict[str, float]:
    """Share of the codes chosen at least once, and perplexity of the choices: 1 to K.

    usage: (K,), how often each code was chosen.
    """
    # perplexity = exp(-sum p log p), with p the share of the choices that a code has. On the CPU, since
    # MPS has no float64.
    usage = usage.cpu()
    share = usage.double() / usage.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return {"codebook_usage": float((usage > 0).double().mean()), "perplexity": float(entropy.exp())}
