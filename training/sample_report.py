"""`predict.py evaluate --samples`: a folder of samples beside real volumes, as figures and as a page.

Real volumes are those of --data. Where a denoiser's checkpoint is named, its latents say which of them it was
trained on; the others are the new cases that samples are held against. Without it, each real volume is held
against all others. Samples and real volumes are prepared alike. Version 0.1 (2026-11).
"""
from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import pictures
from perceptual import FeatureNet3d
from training import checkpoints, jobs, report, sample_figures, views
from training.evaluation import finite
from training.ready import Ready
from training.sample_figures import MIDDLE, Traits
from volumes.config import DataConfig
from volumes.files import DataError, show, write_atomic
from volumes.find import Item
from volumes.loading import Loaded, load

PAIRS_SHOWN, SAMPLES_SHOWN = 4, 6
FEW = 10                                      # samples or new cases below which an AUC is mostly chance


def prepared_like(ready: Ready | None, changes: dict) -> DataConfig:
    """How both sets are prepared: in the intensities of the denoiser's training volumes, if it is known."""
    known = {}
    if ready is not None:
        cond = ready.cfg.cond
        known["modality"] = cond.modality
        if cond.modality == "ct":
            known["hu_range"] = cond.low[0], cond.high[0]
        if cond.modality == "voxel":
            known["voxel_scale"] = cond.high
    return dataclasses.replace(DataConfig(), **known | changes)


def features_of(path: str | None) -> tuple[FeatureNet3d, str]:
    """The network whose features KID compares, and its name. ValueError for a bad file."""
    if path is None:
        return FeatureNet3d(seed=0), "random features (seed 0)"
    found = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    content = checkpoints.load(found, "vae3d.features")
    return FeatureNet3d.from_checkpoint(content), f"features of {show(path)}"


# -------------------------------------------------------------------------------- the command

def evaluate_samples(options: argparse.Namespace, ready: Ready | None, cfg: DataConfig) -> bool:
    """Figures of --samples beside --data: printed, and on request JSON and a page."""
    network, named = features_of(options.features)
    # First what is kept of each volume.
    files = {"samples": jobs.list_inputs([options.samples]), "real": jobs.list_inputs([options.data])}
    failed: list[dict] = []
    found: dict[str, list[Traits]] = {name: [] for name in files}
    items: dict[str, list[Item]] = {name: [] for name in files}
    spacings, middle, intensity = set(), None, None
    for name, listed in files.items():
        for item in listed:
            with jobs.failures_in(failed, item.path):
                loaded = load(item, cfg)
                volume, intensity = loaded.volumes[0]
                middle = middle or tuple(min(n, MIDDLE) for n in volume.shape[1:])
                if found["samples"] and len(volume) != channels_in(found["samples"][0]):
                    raise DataError(f"{item.path}: {len(volume)} channels, the samples have "
                                    f"{channels_in(found['samples'][0])}")
                found[name].append(sample_figures.traits(item.known_as, volume, network, middle))
                items[name].append(item)
                spacings.add(tuple(round(mm, 3) for mm in loaded.spacing))
        if len(found[name]) < 2:
            raise DataError(f"{options.samples if name == 'samples' else options.data}: {len(found[name])} "
                            f"usable volumes; a comparison needs at least two")
    if len(spacings) > 1:
        print(f"spacings differ, {sorted(spacings)[:3]} mm among them; figures of texture compare better at "
              f"one (--data.spacing)")

    # Then which real ones were trained on, and the figures.
    is_trained = trained_on(ready, found["real"])
    result, close = figures_of(found, is_trained, intensity)
    result = {"features": named, **result, "failed": failed}
    for line in lines_of(result):
        print(line)
    if options.json:
        text = json.dumps(finite(result), indent=1) + "\n"
        write_atomic(Path(options.json), lambda file: file.write(text.encode()))
    if options.report:
        page = page_of(options, result, found, items, close, lambda item: load(item, cfg))
        write_atomic(Path(options.report), lambda file: file.write(page.encode()))
    return jobs.tell_failures(failed, sum(map(len, files.values())))


def channels_in(known: Traits) -> int:
    return known.middle.shape[1]


def trained_on(ready: Ready | None, real: Sequence[Traits]) -> np.ndarray:
    """(N,) bool: of which the denoiser saw latents. All of them where nothing is known."""
    if ready is None:
        return np.ones(len(real), dtype=bool)
    names = {file["name"] for file in ready.facts["data"].get("files", ())}
    bare = {name.rsplit("/", 1)[-1] for name in names}
    found = np.array([each.name in names or each.name.rsplit("/", 1)[-1] in bare for each in real])
    print(f"{ready.path}: trained on {found.sum()} of {len(real)} real volumes")
    return found


def figures_of(found: dict[str, list[Traits]], is_trained: np.ndarray,
               intensity) -> tuple[dict, sample_figures.Nearest]:
    """All figures; and of each sample the nearest training case."""
    samples, real = found["samples"], found["real"]
    features = {name: np.stack([each.features for each in some]) for name, some in found.items()}
    alike = {name: sample_figures.pairwise_ms_ssim([each.middle for each in some])
             for name, some in found.items()}

    # Distances to training cases: of samples, and of the real cases that are new.
    coarse = np.stack([each.coarse for each in real])
    alone = is_trained.sum() < 2 or (~is_trained).sum() < 2
    training = coarse if alone else coarse[is_trained]
    new = coarse if alone else coarse[~is_trained]
    near = sample_figures.nearest(np.stack([each.coarse for each in samples]), training)
    near_new = sample_figures.nearest(new, training, leave_one_out=alone)
    if not alone:
        near = near._replace(index=np.flatnonzero(is_trained)[near.index])
    copies = sample_figures.memorisation(near, near_new)
    copies["few"] = min(len(samples), len(new)) < FEW
    copies["new_cases"] = "each real volume against the others" if alone else f"{len(new)} held out"

    low, high = intensity.low[0], intensity.high[0]
    return {
        "samples": len(samples),
        "real": len(real),
        "kid": sample_figures.kid_beside_real(features["samples"], features["real"]),
        "frechet": sample_figures.frechet_beside_real(features["samples"], features["real"]),
        "diversity": {"ms_ssim_samples": alike["samples"], "ms_ssim_real": alike["real"],
                      "difference": alike["samples"] - alike["real"]},
        "memorisation": copies,
        "tissue": sample_figures.tissue(samples, real, low, high, intensity.modality == "ct"),
    }, near


def lines_of(result: dict) -> list[str]:
    """The figures as lines of text."""
    kid, diversity, copies = result["kid"], result["diversity"], result["memorisation"]
    lines = [f"{result['samples']} samples, {result['real']} real volumes; {result['features']}",
             f"KID {kid['value']:.4g}"]
    for name, what in (("samples", "samples against real"), ("real", "real against real")):
        if name in kid:
            part = kid[name]
            lines.append(f"KID of {kid['subset']}, {what}: {part['mean']:.4g} ({part['low']:.4g} to "
                         f"{part['high']:.4g})")
    if "value" in result["frechet"]:
        halves = result["frechet"].get("real")
        beside = "" if halves is None else f"; halves of the real ones {halves:.4g}"
        lines.append(f"Frechet distance {result['frechet']['value']:.4g}{beside}")
    lines.append(f"MS-SSIM of pairs: samples {diversity['ms_ssim_samples']:.3f}, real "
                 f"{diversity['ms_ssim_real']:.3f}; more than real: less diverse")
    lines.append(f"copies: AUC {copies['auc']:.3f} (.5: as far from training cases as new ones, 1: copies), "
                 f"suspicious {copies['suspicious']:.1%}; new: {copies['new_cases']}"
                 f"{'; too few to judge by' if copies['few'] else ''}")
    unit = " HU" if "tissues" in result["tissue"] else ""
    lines.append(f"intensities: W1 {result['tissue']['histogram_w1']:.4g}{unit}, gradient energy "
                 f"{result['tissue']['gradient_energy']:.3f} of the real")
    for name, part in result["tissue"].get("tissues", {}).items():
        lines.append(f"  {name}: samples {part['samples']:.1%}, real {part['real']:.1%}")
    return lines


# -------------------------------------------------------------------------------- the page

def page_of(options: argparse.Namespace, result: dict, found: dict[str, list[Traits]],
            items: dict[str, list[Item]], near: sample_figures.Nearest,
            read: Callable[[Item], Loaded]) -> str:
    """Cards and tables of the figures, the samples nearest to a training case beside it, and some samples."""
    kid, copies = result["kid"], result["memorisation"]
    cards = [(f"{kid['value']:.3g}", "KID, samples against real")]
    if "real" in kid:
        cards.append((f"{kid['real']['mean']:.3g}", f"KID, real against real ({kid['subset']} each)"))
    cards += [(f"{copies['auc']:.2f}", "AUC of copies (.5: none)"),
              (f"{result['diversity']['difference']:+.3f}", "MS-SSIM of pairs, samples - real"),
              (f"{result['tissue']['histogram_w1']:.3g}", "W1 of intensities")]

    # First the pairs, then samples beside real volumes, then the figures as lines.
    body = ["<h2>Samples nearest to a training case</h2>"]
    for number in np.argsort(near.distance)[:PAIRS_SHOWN]:
        case = int(near.index[number])
        columns = {"Sample": slices(read(items["samples"][number])),
                   "Nearest training case": slices(read(items["real"][case]))}
        names = f"{found['samples'][number].name} and {found['real'][case].name}"
        further = 1 / max(near.ratio[number], 1e-9)
        body.append(f'<section><p class="file">{report.text(names)}</p><p>distance '
                    f"{near.distance[number]:.4g}, the second nearest {further:.2f} times as far</p>"
                    f"{slices_table(columns)}</section>")
    for name, title in (("samples", "Samples"), ("real", "Real volumes")):
        chosen = items[name][:SAMPLES_SHOWN]
        columns = {report.text(item.known_as): slices(read(item)) for item in chosen}
        body.append(f"<h2>{title}</h2><section>{slices_table(columns)}</section>")
    rows = [[report.text(line)] for line in lines_of(result)]
    body.append("<h2>Figures</h2>" + report.table(["figure"], rows))
    if "tissues" in result["tissue"]:
        rows = [[name, f"{part['samples']:.1%}", f"{part['real']:.1%}"]
                for name, part in result["tissue"]["tissues"].items()]
        body.append("<h2>Tissue, share of voxels</h2>" + report.table(["tissue", "samples", "real"], rows))
    notes = [f"<p>Samples: {report.text(options.samples)}; real: {report.text(options.data)}</p>"]
    notes += [f'<p class="bad">{report.text(row["error"])}</p>' for row in result["failed"]]
    return report.page("Samples: evaluation", f"{result['samples']} samples", notes, cards, "\n".join(body))


def slices_table(columns: dict[str, list[torch.Tensor]]) -> str:
    """Slices beside one another, whose rows are the axes."""
    count = max(len(images) for images in columns.values())
    return report.slices_table(columns, views.row_names(count, 0, 1))


def slices(loaded: Loaded) -> list[torch.Tensor]:
    """Three slices of the first channel, through the middle of what is not background."""
    volume, intensity = loaded.volumes[0]
    x = torch.from_numpy(volume)[0]
    weight = (x - intensity.background).abs()
    return pictures.slices([x], weight, loaded.spacing, pictures.grey)
