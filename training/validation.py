"""Validation: figures of held-out crops or whole volumes, the best weights so far, and pictures.

The task says what is measured of a crop (`criterion`, `metrics`), what is added up over all of them
(`counts`, `figures`), and how one looks (`picture`). The ranks share the crops, and every validation draws
the same noise, so that validations compare. Version 0.3 (2026-11).
"""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator

import torch

import data
import losses
import pictures
from training import checkpoints, ranks
from training.config import TrainConfig
from training.console import line_of
from training.devices import peak_gib
from training.facts import facts_of
from training.forward import forward
from training.log import shown
from training.order import MicroBatch, placed, seed_of
from training.resume import full_weights, shared_config
from training.run import Run, dial_of_training_kept, recovered, stop_if_signalled
from training.state import State
from training.task import metric_of
from volumes.files import cut, naming, unique_name, write_atomic
from volumes.format_nibabel import write_nifti


def validation(run: Run, epoch: int) -> None:
    """A `val` row; best.pt when it is the best so far."""
    started, state = time.monotonic(), run.state
    with dial_of_training_kept(run):
        metrics, voxels = validate(run)
    seconds = time.monotonic() - started
    row = {
        "step": state.step,
        "epoch": epoch,
        "split": "val",
        **metrics,
        "lr": state.optimizer.param_groups[0]["lr"],
        "seconds": round(seconds, 4),
        "voxels_per_second": round(voxels / seconds),
        "peak_gib": round(ranks.largest(peak_gib(run.device)), 4),
    }
    run.log.row(row)
    if update_best(run.cfg, state, metrics):
        save_best(run, metrics)


@torch.no_grad()
def validate(run: Run) -> tuple[dict[str, float], int]:
    """Means over held-out crops or volumes of the criterion's terms and of the task's metrics.

    Returns them with the voxels seen. The weights are those that would be shipped.
    """
    cfg, state, task = run.cfg, run.state, run.state.task
    model = state.shipped.eval()
    criterion = task.criterion or task.objective

    # First this rank's share of the crops. All ranks take as many turns, since they have to agree in each: a
    # rank without a crop left takes part in the last turn of the others.
    rows, counts, voxels = [], {}, 0
    mine = ranks.shared(len(run.held_out))
    turns = -(-len(run.held_out) // ranks.workers())             # rounded up
    for turn in range(turns):
        stop_if_signalled(run)
        if turn >= len(mine):
            recovered(run, (1, run.dataset.channels, *run.dataset.patch), ranks.agreed)
            continue
        number = mine[turn]
        crop = run.held_out[number]
        label = None if crop.label is None else crop.label[None].to(run.device)
        micro = MicroBatch(placed(cfg, crop.image[None], run.device), [], [], label)

        # The noise of a crop is the same at each validation, and at each try of it after out of memory.
        def work(micro=micro, number=number):
            generator = torch.Generator().manual_seed(seed_of(cfg.train.seed, "validation", number))
            return ranks.agreed(criterion(cfg, state, model, micro, [generator]))
        found = recovered(run, micro.image.shape, work)
        terms = found.terms | task.metrics(cfg, found.out, micro, crop)
        rows.append({name: float(term) for name, term in terms.items()})
        for name, count in task.counts(cfg, found.out, micro, run.dataset).items():
            counts[name] = counts.get(name, 0) + count
        voxels += crop.image[0].numel()
    state.shipped.train()

    # Then means over the crops of all ranks, and what was counted over all of them.
    rows, voxels = ranks.gathered(rows), sum(ranks.gathered([voxels]))
    metrics = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    every = [part for part in ranks.gathered([counts]) if part]
    if every:
        sums = {name: sum(part[name] for part in every) for name in every[0]}
        metrics |= task.figures(sums)
    return metrics, voxels


# -------------------------------------------------------------------------------- the best weights

def update_best(cfg: TrainConfig, state: State, metrics: dict[str, float]) -> bool:
    """Count a validation for best.pt, early stopping and the plateau schedule.

    Returns whether it is the best so far. Raises ValueError where the task has no such metric.
    """
    # First how much better this validation is, by train.metric.
    name = metric_of(cfg, state.task)
    if name not in metrics:
        raise ValueError(f"train.metric={name} is none of the metrics of --task {state.task.name}: "
                         f"{', '.join(metrics)}")
    higher_is_better = state.task.METRICS.get(name, True)
    value, loss = metrics[name], metrics["loss"]
    # A value that is none is the worst, such as the Dice of held-out labels without a class.
    if not math.isfinite(value):
        value = -math.inf if higher_is_better else math.inf
    gain = gain_over(state.best, value, higher_is_better)

    # Then whether it is the best: better, or as good with a lower loss. Until all terms have set in, the
    # last validation is the best, since those before it were measured on another criterion.
    first = state.best is None or state.step <= state.task.last_start(cfg)
    tie = gain == 0 and loss < state.best_loss
    better = math.isfinite(loss) and (first or gain > 0 or tie)
    if better:
        state.best, state.best_loss = value, loss

    # Then early stopping, which has a reference of its own, as in Keras and Lightning: only a gain above
    # train.min_delta moves it, so that many small gains add up to one.
    gain = gain_over(state.reference, value, higher_is_better)
    if better and (first or gain > cfg.train.min_delta):
        state.reference, state.bad_validations = value, 0
    else:
        state.bad_validations += 1

    # Then the plateau schedule, which looks at the loss alone: after some validations without a lower one
    # the rate falls by a factor.
    lowest, factor, waited = state.plateau
    if loss < lowest:
        lowest, waited = loss, 0
    elif waited + 1 >= cfg.optim.plateau_patience:
        factor, waited = factor * cfg.optim.gamma, 0
    else:
        waited += 1
    state.plateau = (lowest, factor, waited)
    return better


def gain_over(before: float | None, value: float, higher_is_better: bool) -> float:
    """How much better a value is than the one before; 0 where there is none before."""
    if before is None or before == value:
        return 0.0
    return value - before if higher_is_better else before - value


def weights_to_ship(run: Run, model: torch.nn.Module) -> dict:
    """The content of best.pt: what predict.py and --init need, and nothing else."""
    stage = {"stage": run.stage.name} if run.stage.name else {}
    if run.state.task.ship is not None:
        return run.state.task.ship(model) | {"step": run.state.step} | stage
    # An average is in float32 as it is.
    weights = full_weights(run.state) if model is run.state.model else model.state_dict()
    return {
        "kind": "vae3d.weights",
        "version": 1,
        "config": shared_config(run.shipped_settings),
        "step": run.state.step,
        **stage,
        "latent": run.state.latent,
        "data": facts_of(run.dataset),
        "model": weights,
    }


def save_best(run: Run, metrics: dict[str, float]) -> None:
    """metrics: of the validation that made these weights the best."""
    if ranks.first():
        checkpoints.save(run.out / "best.pt", weights_to_ship(run, run.state.shipped) | {"metrics": metrics})


def load_best(run: Run) -> dict:
    return checkpoints.load(run.out / "best.pt", "vae3d.weights", "vae3d.features")


def check_best(run: Run) -> bool:
    """For a resumed run: whether best.pt had to be replaced, by the weights at hand.

    It is replaced where it cannot be read, or is of a step that the run no longer reaches. Of a run that was
    killed beyond an edge which it is before now, this stage's lies beside it.
    """
    path = run.out / "best.pt"

    def what_is_wrong() -> str | None:
        name, end = run.stage.name, run.stage.end
        try:
            best, own = load_best(run), run.out / f"best_{name}.pt"
            if best.get("stage", "") != name and own.is_file():
                checkpoints.copy(own, path)
                best = load_best(run)
        except ValueError as error:
            return str(error)
        if best.get("stage", "") != name:
            return f"{path}: is of another stage than {name}"
        return None if best["step"] <= end else f"{path}: is of a later step than {end}"
    wrong = ranks.from_rank(0, what_is_wrong)
    if wrong is None:
        return False

    with dial_of_training_kept(run):
        metrics, _ = validate(run)
    name = metric_of(run.cfg, run.state.task)
    best = metrics[name] if math.isfinite(metrics[name]) else None
    run.state.best, run.state.best_loss = best, metrics["loss"]
    save_best(run, metrics)
    run.log.say(f"{wrong}; the weights of step {run.state.step} take its place, {name} "
                f"{shown(run.state.best)}")
    return True


# -------------------------------------------------------------------------------- pictures

@torch.no_grad()
def save_samples(run: Run) -> None:
    """OUT/samples/step_XXXXXX_NAME.png, and the volume as NIfTI beside it.

    Of the crop with most foreground of each held-out volume, up to log.samples volumes; what they show
    stands in the PNG as a note (training/views.py). All ranks compute them, since they recover from out of
    memory together; the first writes.
    """
    cfg, state, task = run.cfg, run.state, run.state.task
    if task.picture is None:
        return
    model = state.shipped.eval()
    done: dict[str, str] = {}                                    # stem of the files -> name of the volume
    for crop in crops_to_show(run):
        name = crop.entry.name
        stem = unique_name(cut(name.replace("/", "_")), name, done)
        stop_if_signalled(run)

        # First the network's output.
        x = placed(cfg, crop.image[None], run.device)

        def work(x=x, crop=crop):
            if task.sample is not None:
                return ranks.agreed(task.sample(cfg, state, model, crop))
            if task.output is not None:
                return ranks.agreed(task.output(cfg, state, model, x))
            return ranks.agreed(forward(state, model, x))
        with dial_of_training_kept(run):
            out = recovered(run, x.shape, work)
        if not ranks.first():
            continue

        # Then the files, and the picture for TensorBoard and W&B. They are for looking at: a full disk or a
        # sink that fails is a line, and the run goes on.
        try:
            save_sample(run, crop, out, f"step_{state.step:06d}_{stem}")
        except Exception as error:
            run.log.say(f"step {state.step}: no picture of {name}: {type(error).__name__}: {line_of(error)}")
    model.train()


def save_sample(run: Run, crop: data.Crop, out: tuple, stem: str) -> None:
    """out: what the network made of a crop. Raises whatever a disk or a sink may."""
    picture, folder = run.state.task.picture(run.cfg, crop, out), run.out / "samples"
    folder.mkdir(exist_ok=True)
    note = picture.note | {"name": crop.entry.name, "step": run.state.step} if picture.note else {}
    content = pictures.png(picture.image, json.dumps(note) if note else "")
    write_atomic(folder / f"{stem}.png", lambda file: file.write(content))
    path = folder / f"{stem}_{picture.kind}.nii.gz"
    with naming(path):
        write_nifti(path, picture.volume, crop.affine if picture.affine is None else picture.affine)
    for sink in run.log.sinks:
        sink.picture(f"samples/{crop.entry.name}", picture.image, run.state.step)


def crops_to_show(run: Run) -> Iterator[data.Crop]:
    """Of each of the first log.samples held-out volumes the crop with most foreground."""
    held_out, count = run.held_out, run.cfg.log.samples
    if isinstance(held_out, data.WholeVolumes):
        for number in range(min(count, len(held_out))):          # each is read when its turn comes
            yield held_out[number]
        return
    best: dict[str, tuple[int, data.Crop]] = {}
    for crop in held_out:
        name, amount = crop.entry.name, foreground(crop)
        if name not in best and len(best) == count:
            continue
        if name not in best or amount > best[name][0]:
            best[name] = amount, crop
    for _, crop in best.values():
        yield crop


def foreground(crop: data.Crop) -> int:
    """Voxels that a label names, or without one those that are not background."""
    if crop.label is not None:
        return int((crop.label > 0).sum())
    far = (crop.image - crop.entry.intensity.background).abs() > losses.OCCUPIED
    return int(far.any(0).sum())
