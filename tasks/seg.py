"""Task `seg`: a U-Net on image/label pairs (nnU-Net's recipe in short, doi:10.1038/s41592-020-01008-z).

loss = cross-entropy and Dice, at the full resolution and, with deep supervision, at lower ones. Two classes
may have one logit, whose sigmoid is the probability of class 1. What training/task.py asks of a task stands
here; a name that is not here is filled in there.

Shapes: B batch, C channels, K classes, D H W depth height width; labels (B, D, H, W) int64.
Version 0.3 (2026-11).
"""
from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import losses
import unet
import vae3d
import windows
from metrics import SurfaceScores, surface_scores
from training import views
from training.cases import Case, label_of
from training.config import TrainConfig, changed
from training.forward import forward
from training.order import MicroBatch
from training.ready import Ready, run_network
from training.state import State
from training.task import Objective, Picture, Scored, nothing
from unet import UNet, UNetConfig
from volumes.config import DataConfig
from volumes.grids import resample

PRESETS = unet.PRESETS
METRICS = {"dice": True, "loss": False}
LABELS = True
# Share of crops that are placed to hold a class, as in nnU-Net.
FOREGROUND = 0.33


# -------------------------------------------------------------------------------- the config

def sections(preset: UNetConfig) -> dict:
    return {"unet": preset, "data": DataConfig(foreground=FOREGROUND)}


def check(cfg: TrainConfig) -> None:
    if cfg.train.precision == "master16":
        raise ValueError("train.precision=master16 is for --task vae, without --amp: its weights have 16 "
                         "bits already")


def resolve(cfg: TrainConfig, dataset: data.Data) -> TrainConfig:
    """Channels and classes from the data. ValueError where the config asks for others."""
    # One logit is enough for two classes; the default stands for "as the data say".
    has_one_logit = cfg.unet.out_channels == 1 and dataset.classes == 2
    known = (UNetConfig.out_channels, dataset.classes)
    if cfg.unet.out_channels not in known and not has_one_logit:
        raise ValueError(f"unet.out_channels={cfg.unet.out_channels}, but the data has {dataset.classes} "
                         f"classes; leave it out, or set data.classes")
    if cfg.loss.class_weights is not None and len(cfg.loss.class_weights) != dataset.classes:
        raise ValueError(f"loss.class_weights has {len(cfg.loss.class_weights)} factors, the data has "
                         f"{dataset.classes} classes; give one for each")
    logits = 1 if has_one_logit else dataset.classes
    return changed(cfg, unet={"in_channels": dataset.channels, "out_channels": logits})


def channels(cfg: TrainConfig) -> int:
    return cfg.unet.in_channels


def build(cfg: TrainConfig) -> UNet:
    return UNet(cfg.unet)


# -------------------------------------------------------------------------------- training and validation

def given(*_) -> tuple[Tensor, ...]:
    """Nothing is drawn."""
    return ()


def objective(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
) -> Objective:
    """What a training step lowers, of the crops of one micro-batch."""
    out = forward(state, network, micro.image)
    return Objective(out, segmentation_terms(cfg, out, micro.label.to(out.logits.device)))


def criterion(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
) -> Objective:
    """The same terms, also of a whole volume."""
    out = output(cfg, state, network, micro.image)
    return Objective(out, segmentation_terms(cfg, out, micro.label.to(out.logits.device)))


def output(cfg: TrainConfig, state: State, network: Callable, image: Tensor) -> unet.UNetOutput:
    """A crop in one pass, a whole volume in windows of the crop's size.

    The windows are those of predict.py. Their logits are on the CPU, and there are none of lower levels.
    """
    if tuple(image.shape[2:]) == tuple(cfg.data.patch):
        return forward(state, network, image)

    def logits_of(x: Tensor) -> Tensor:
        return forward(state, network, x).logits
    slabs = windows.window_logits(logits_of, image, cfg.data.patch, background=cfg.loss.background)
    return unet.UNetOutput(torch.cat(list(slabs), 1)[None], ())


def segmentation_terms(cfg: TrainConfig, out: unet.UNetOutput, label: Tensor) -> dict[str, Tensor]:
    """Cross-entropy and Dice; with deep supervision also at the lower levels (nnU-Net).

    Level l, with 0 the full resolution, has the weight w_l = 2^-l, and loss = sum w_l loss_l / sum w_l.
    `ce` and `dice_loss` are those of the full resolution.
    """
    options = cfg.loss.dice_share, cfg.loss.class_weights, cfg.data.ignore_label
    loss, ce, dice_loss = losses.segmentation_loss(out.logits, label, *options)
    weights = [0.5 ** (level + 1) for level in range(len(out.deep))]

    # Where an axis is shorter than the network's stride, the U-Net repeats the border of the image. The
    # label gets the same border, so that the two cover the same voxels at the lower levels.
    if out.deep:
        multiple = [s if n < s else 1 for n, s in zip(label.shape[1:], cfg.unet.total_stride)]
        label = vae3d.pad_to_multiple(label[:, None].float(), multiple)[:, 0]
    for logits, weight in zip(out.deep, weights):
        small = F.interpolate(label[:, None].float(), logits.shape[2:], mode="nearest")[:, 0].long()
        loss = loss + weight * losses.segmentation_loss(logits, small, *options).loss
    return {"loss": loss / (1 + sum(weights)), "ce": ce, "dice_loss": dice_loss}


def predicted_classes(logits: Tensor) -> Tensor:
    """(B, K, D, H, W) -> (B, D, H, W) int64; one logit: foreground where its sigmoid is above 1/2."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).long()
    return logits.argmax(1)


def counts(
    cfg: TrainConfig, out: unet.UNetOutput, micro: MicroBatch, dataset: data.Data
) -> dict[str, Tensor]:
    """Of one crop: what Dice is made of, (2, K), and in which classes its label has voxels, (K,)."""
    found, label = predicted_classes(out.logits).cpu(), micro.label.cpu()
    scores = torch.stack(losses.dice_scores(found, label, dataset.classes, cfg.data.ignore_label))

    # Of the values in the label, those that are classes: not the ignored one, nor any beyond the classes.
    present = label.unique()
    present = present[(present >= 0) & (present < dataset.classes) & (present != cfg.data.ignore_label)]
    labelled = torch.zeros(dataset.classes, dtype=torch.int64)
    labelled[present] = 1
    return {"dice": scores, "labelled": labelled}


def figures(sums: dict[str, Tensor]) -> dict[str, float]:
    """From the voxels of all held-out crops together: dice_1, dice_2 ..., and their mean, dice.

    Class 0, and classes that no held-out label has, are left out; without any other, dice is nan.
    """
    scores, labelled = losses.dice(*sums["dice"]), sums["labelled"] > 0
    labelled[0] = False
    row = {"dice": float(scores[labelled].mean())}
    for k in labelled.nonzero()[:, 0].tolist():
        row[f"dice_{k}"] = float(scores[k])
    return row


def class_text(k: int, stored: tuple[int, ...] | None) -> str:
    """A class by its number, and by the value that it has in the files where that is another.

    stored: the values of class 0, 1, ...; None: the numbers themselves.
    """
    return f"class {k}" if stored is None or stored[k] == k else f"class {k} (value {stored[k]})"


def picture(cfg: TrainConfig, crop: data.Crop, out: unet.UNetOutput) -> Picture:
    """Slices of the crop with contours of its label and of the classes found, and Dice in this crop."""
    found = predicted_classes(out.logits).cpu().to(torch.int16)
    label = crop.label
    if cfg.data.ignore_label is not None:
        label = torch.where(label == cfg.data.ignore_label, 0, label)
    intensity = crop.entry.intensity
    is_picture = intensity.modality == "picture" and crop.image.shape[1] == 1
    window = views.window_limits(cfg.log.window, cfg.data.window, intensity)

    # Dice of the classes that occur in the label or were found, for the legend.
    pair = found.long(), crop.label[None]
    scores = dice_row(torch.stack(losses.dice_scores(*pair, classes(cfg), cfg.data.ignore_label)))
    names = {k: f"{class_text(k, crop.entry.label_values)}: Dice {scores[f'dice_{k}']:.3f}"
             for k in range(1, classes(cfg))}
    shown = views.of_labels(crop.image, {"Label": label, "Found": found[0]}, crop.entry.spacing, intensity,
                            window, is_picture, names)
    figures = f"mean Dice {scores['dice']:.4f}"
    return Picture(shown.sheet(), found.numpy(), "pred", shown.note() | {"figures": figures})


# -------------------------------------------------------------------------------- use of a checkpoint

def classes(cfg: TrainConfig) -> int:
    """How many `segment` tells apart: two by one logit."""
    return max(2, cfg.unet.out_channels)


def describe(cfg: TrainConfig) -> str:
    return f"U-Net of {classes(cfg)} classes"


def prepare(ready: Ready, options: argparse.Namespace, cfg: DataConfig) -> None:
    """Raises ValueError for flags that do not fit the network's classes."""
    count = classes(ready.cfg)
    if options.mask_threshold is not None:
        check_two_classes(count)
    if cfg.label_values is not None and len(cfg.label_values) != count:
        raise ValueError(f"--data.label_values: {len(cfg.label_values)} values, the network has {count} "
                         f"classes; give one for each")


def check_two_classes(count: int) -> None:
    if count != 2:
        raise ValueError(f"--mask-threshold: the network has {count} classes, a threshold decides between "
                         f"two; leave the flag out")


def segment(ready: Ready, array: np.ndarray, window: Sequence[int] | None = None, overlap: float = 0.5,
            background: float = -1.0, threshold: float | None = None, size: Sequence[int] | None = None,
            tick: Callable = nothing) -> np.ndarray:
    """(C, D, H, W) normalised -> classes (D, H, W) int16, by windows that overlap (windows.window_logits).

    window: D, H, W; None: the size of the run's crops. background: the volume's. threshold: see
    `class_scores`. size: of a grid over the same field of view that the classes are wanted on.
    """
    slabs = window_logits(ready, array, window or ready.cfg.data.patch, overlap, background, tick)
    scores = (class_scores(slab, threshold) for slab in slabs)
    if size is None or tuple(size) == array.shape[1:]:
        return np.concatenate([slab.argmax(0).to(torch.int16).numpy() for slab in scores])
    return classes_on(torch.cat(list(scores), 1), size)


def window_logits(ready: Ready, array: np.ndarray, window: Sequence[int], overlap: float = 0.5,
                  background: float = -1.0, tick: Callable = nothing) -> Iterator[Tensor]:
    """windows.window_logits in the checkpoint's precision: (K, slab, H, W) float32 on the CPU, along D."""
    def network(x: Tensor) -> Tensor:
        return run_network(ready, lambda y: ready.model(y).logits, x[0])
    return windows.window_logits(network, torch.from_numpy(array)[None], window, overlap, background, tick)


def class_scores(logits: Tensor, threshold: float | None) -> Tensor:
    """Logits (K, ...) -> scores whose argmax is the class.

    With a threshold, which is for two classes, class 1 is where its probability lies above that.
    """
    if len(logits) == 1:
        logits = torch.cat([torch.zeros_like(logits), logits])
    if threshold is None:
        return logits
    check_two_classes(len(logits))

    # The probability of class 1 is sigmoid(b - a), of the logits a and b. It is above t where
    # b > a + log(t / (1 - t)).
    return torch.stack([logits[0] + math.log(threshold / (1 - threshold)), logits[1]])


def classes_on(scores: Tensor, size: Sequence[int]) -> np.ndarray:
    """Scores (K, d, h, w) -> classes (D, H, W) int16 of another grid, by linear interpolation of the scores.

    One class at a time: the other grid is often the finer one.
    """
    best, found = None, np.zeros(size, dtype=np.int16)
    for k in range(len(scores)):
        score = resample(scores[k:k + 1].numpy(), np.eye(4), tuple(size))[0][0]
        if best is None:                                         # class 0, which `found` holds already
            best = score
            continue
        better = score > best
        found[better] = k
        best = np.where(better, score, best)
    return found


def evaluate(ready: Ready, case: Case, number: int, options: argparse.Namespace, tick: Callable) -> Scored:
    """Of one whole volume, on the network's grid: Dice of each class but 0 that occurs, and how far the
    surfaces lie apart (metrics.py); a picture's millimetres are pixels."""
    volume, intensity = case.volumes[number]
    label = label_of(case, number)
    started = time.monotonic()
    found = segment(ready, volume, options.window, options.overlap, intensity.background,
                    options.mask_threshold, tick=tick)
    seconds = time.monotonic() - started
    found_classes, true_classes = torch.from_numpy(found)[None].long(), torch.from_numpy(label)[None]
    counts = torch.stack(losses.dice_scores(found_classes, true_classes, classes(ready.cfg),
                                            ready.cfg.data.ignore_label))
    surfaces = surface_scores(found_classes[0], true_classes[0], classes(ready.cfg), case.spacing,
                              options.tolerance, ready.cfg.data.ignore_label)
    sums = {"dice": counts, "surfaces": torch.stack([surfaces.within, surfaces.total])}
    return Scored(dice_row(counts) | surface_row(surfaces), found, seconds, sums)


def pooled(sums: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Dice and surface Dice from the voxels of all volumes together."""
    if "dice" not in sums:
        return {}
    within, total = sums["surfaces"]
    return {"pooled": dice_row(sums["dice"]) | per_class("surface_dice", within.cpu().double() / total)}


def dice_row(counts: Tensor) -> dict[str, float]:
    """counts (2, K), see losses.dice_scores -> Dice of each class but 0, and the mean of those that occur."""
    return per_class("dice", losses.dice(*counts))


def surface_row(scores: SurfaceScores) -> dict[str, float]:
    """surface_dice and hd95 of each class but 0, and their means.

    HD95 of a class that only one of the two has is infinite, which no mean counts: `missed` says how many
    such classes there are, and their surface Dice is 0.
    """
    is_missed = scores.hd95.isinf()
    hd95 = torch.where(is_missed, math.nan, scores.hd95)
    row = per_class("surface_dice", scores.surface_dice) | per_class("hd95", hd95)
    return row | {"missed": float(is_missed.sum())}


def per_class(name: str, scores: Tensor) -> dict[str, float]:
    """scores (K,), nan for a class that does not occur -> NAME, the mean but for class 0, and NAME_1 ..."""
    row = {name: float(scores[1:].nanmean())}
    for k, score in enumerate(scores[1:].tolist(), 1):
        row[f"{name}_{k}"] = score
    return row
