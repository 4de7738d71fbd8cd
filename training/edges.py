"""Edges: what is made ready before the first stage of a run, and what ends and begins between two of them.

At an edge, after the last step of a stage,

    1. the old stage is ended as a run is: validation, latent and pictures by its own settings (train.settle);
       its best weights stay as best_NAME.pt,
    2. schedule and warm-up begin anew, by the new stage's steps alone,
    3. so do best.pt, early stopping and the factor of the plateau schedule: figures of two resolutions or two
       losses do not compare. A validation at the edge gives the new stage its first ones,
    4. a discriminator that the new stage weighs first is built, and one that it does not weigh any more goes,
    5. last.pt is written.

Weights, moments, averages, codebook and its usage, loss scale and clipping norms go on. Early stopping
(train.patience, or `until: plateau`) ends its stage alone, in the last one the run. A run that is killed
between any two of these is resumed before the edge and crosses it again, to the bit. Version 0.1 (2026-11).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

import data
import peaks
from training import checkpoints, fit, memory, ranks
from training.config import MemoryConfig, TrainConfig, changed
from training.console import line_of
from training.devices import on_device, pick_precision
from training.order import seed_of
from training.plan import Settled, activations_of, budget_of, dial_text, network_of, settled
from training.run import Run
from training.signals import RunStopped
from training.stages import Stage, planned, without
from training.state import State, allocate_moments, tensors_of
from training.task import Task
from training.validation import load_best
from volumes.files import sizes

# -------------------------------------------------------------------------------- before the first step

def begin(cfg: TrainConfig, opened: Sequence[Stage], task: Task, device: torch.device,
          checkpoint: dict | None) -> State:
    """The state of the stage that a run begins or goes on with; nothing of a checkpoint is in it yet.

    What later stages need is built once and dropped, so that what is wrong with it is told now. A feature
    network stays: it is small, and its file may be gone by then. Raises ValueError.
    """
    content = checkpoint or {}
    features, number = content.get("features"), len(content.get("edges", ()))
    if number >= len(opened):
        raise ValueError(f"the checkpoint is of stage {number + 1}, but train.stages has {len(opened)}; "
                         "leave the stages that have begun as they are")
    state = memory.begin(opened[number].cfg, task, device, features)
    state.global_batch = cfg.train.batch * cfg.train.accum * ranks.workers()
    for stage in opened[number + 1:]:
        network_of(stage.cfg, task)
        judge = task.helpers(stage.cfg, torch.device("cpu"), features).get("perceptual")
        if state.perceptual is None and judge is not None:
            state.perceptual = on_device(judge, device)
    return state


def settle_dials(opened: Sequence[Stage], state: State) -> tuple[list[Stage], list[str]]:
    """The stages with what their dials leave to `auto` chosen, and that of the stage at hand turned; a line
    about each choice.

    Chosen before the first step, since the free memory of a card is another one in a resumed run.
    """
    def dials() -> list[Settled]:
        found = []
        for stage in opened:
            cfg, network = stage.cfg, network_of(stage.cfg, state.task)
            dtype = activations_of(cfg, state.device, network)
            budget = budget_of(cfg.memory, state.device)
            found.append(settled(network, cfg.memory, stage.dataset.patch, cfg.train.batch, dtype, budget))
        return found
    chosen = ranks.chosen(0, dials)
    memory.turn_dial(state, chosen[len(state.edges)].dial)
    lines = []
    for stage, choice in zip(opened, chosen):
        if choice.text is not None:
            lines.append(f"stage {stage.name}: {choice.text}" if stage.name else choice.text)
    return [with_dial_of(stage, choice.dial) for stage, choice in zip(opened, chosen)], lines


def with_dial_of(stage: Stage, dial: MemoryConfig) -> Stage:
    return dataclasses.replace(stage, cfg=dataclasses.replace(stage.cfg, memory=dial))


def attach(run: Run) -> None:
    """Give a run what its loop takes from the stage at hand."""
    stage = run.stage
    run.crops = data.Crops(stage.dataset, stage.cfg.train.seed)
    run.held_out = data.val_crops(stage.dataset, stage.cfg.train.seed, stage.cfg.train.val_crops)
    if stage.cfg.train.val_whole:
        run.held_out = data.WholeVolumes(stage.dataset)
    run.over = False
    run.log.cfg, run.log.total, run.log.stage = stage.cfg, run.total, stage.name


# -------------------------------------------------------------------------------- from one stage to the next

def next_stage(run: Run) -> bool:
    """Cross the edge behind a stage that is over; False where there is none.

    The validation that is due at the new stage's beginning is left to train.settle.
    """
    if run.is_last_stage:
        return False
    # First the old stage's best weights get their own name, unless best.pt is of a later one already.
    if ranks.first():
        keep_best(run)

    # Then the plan: a stage that was stopped early moves all that come after it. The config keeps the dial
    # that the old stage came to, as that of a run which was resumed within it does.
    state, number = run.state, run.number
    run.opened[number] = with_dial_of(run.opened[number], state.dial)
    state.edges = [*state.edges, state.step]
    run.stages = planned(run.whole, run.opened, state.global_batch, state.edges)
    run.beside = None

    # Then the state, whose counters of validations begin anew.
    fresh = {f.name: f.default for f in dataclasses.fields(State)}
    for name in ("best", "best_loss", "reference", "bad_validations", "plateau", "latent", "finished"):
        setattr(state, name, fresh[name])
    state.validated = state.step - 1
    enter(state, run.cfg, run.number)
    attach(run)
    run.log.say(stage_text(run))
    return True


def keep_best(run: Run) -> None:
    """best.pt as best_NAME.pt; nothing where no validation of the stage was finite."""
    best = run.out / "best.pt"
    if not best.is_file():
        return
    try:
        content = load_best(run)
    except ValueError as error:
        raise RunStopped(f"{error}; --resume {run.out} makes it anew") from None
    if content.get("stage") == run.stage.name:
        checkpoints.copy(best, best.with_name(f"best_{run.stage.name}.pt"))


def enter(state: State, cfg: TrainConfig, number: int) -> None:
    """Make a state the one of stage `number`: precision, what is trained, its judges, its dial."""
    # First the precision. A loss scale goes on where both stages have one.
    device = state.device
    state.amp_dtype = ranks.from_rank(0, lambda: pick_precision(cfg.train.amp, device, state.model)[0])
    is_scaled = state.amp_dtype is torch.float16
    if is_scaled != state.scaler.is_enabled():
        state.scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)
    # Compiled code of other crops is dropped, as a resumed run has none of it.
    if cfg.train.compile:
        torch.compiler.reset()
        state.forward = torch.compile(state.model)

    # Then what is trained: all weights, or with train.stage 1 the codebook alone.
    wanted = network_of(cfg, state.task).parameters()
    for weight, master, new in zip(state.model.parameters(), state.weights, wanted):
        weight.requires_grad_(new.requires_grad)
        master.requires_grad_(new.requires_grad)
    allocate_moments(state.optimizer)
    for settings in state.optimizer.param_groups:
        settings["weight_decay"] = cfg.optim.weight_decay

    # Then the networks that judge: those that both stages have go on.
    torch.manual_seed(seed_of(cfg.train.seed, "stage", number))
    features = state.perceptual and state.perceptual.features.to_checkpoint()
    helpers = state.task.helpers(cfg, device, features)
    for name in ("disc", "disc_optimizer", "lecam"):
        if name not in helpers or getattr(state, name) is None:
            setattr(state, name, helpers.get(name))
    if state.disc_optimizer is not None:
        allocate_moments(state.disc_optimizer)
    ranks.take_from_first(tensors_of(state))
    memory.turn_dial(state, cfg.memory)


def stage_text(run: Run) -> str:
    stage, cfg = run.stage, run.cfg
    crops = f"{stage.global_batch} crops of {sizes(stage.dataset.patch)}"
    precision = pick_precision(cfg.train.amp, run.device, run.state.model)[1]
    return (f"stage {stage.name} ({run.number + 1} of {len(run.stages)}): steps {stage.first + 1} to "
            f"{stage.end} of {crops}, {stage.per_epoch} an epoch; rate {cfg.optim.lr:g}, memory mode "
            f"{dial_text(run.state.dial)}, {precision}")


# -------------------------------------------------------------------------------- will it fit?

def peaks_of(opened: Sequence[Stage], task: Task, device: torch.device) -> list[str]:
    """The predicted peak of a step of each stage and the largest of them, as lines."""
    if len(opened) == 1:
        return [fit.predicted_peak(opened[0].cfg, task, device)]
    lines, found = [], {}
    for stage in opened:
        try:
            found[stage.name] = fit.predicted(stage.cfg, task, device).bytes / peaks.GIB
            lines.append(f"stage {stage.name}: {found[stage.name]:.2f} GiB")
        except RuntimeError as error:
            lines.append(f"stage {stage.name}: no prediction, {line_of(error)}")
    if found:
        largest = max(found, key=found.get)
        lines.append(f"predicted peak of a step on {device.type}: {found[largest]:.2f} GiB, in stage "
                     f"{largest}{fit.left_out(device)}")
    return lines


def fit_largest(opened: Sequence[Stage], task: Task, device: torch.device, budget: str,
                say: Callable[[str], None]) -> MemoryConfig:
    """fit.fit() of the stage whose step is predicted to take the most; what fits it fits all."""
    largest = opened[0]
    if len(opened) > 1:
        largest = max(opened, key=lambda stage: fit.predicted(stage.cfg, task, device).bytes)
        say(f"--fit: stage {largest.name} takes the most")
    return fit.fit(largest.cfg, task, device, budget, say)


def with_memory(cfg: TrainConfig, opened: Sequence[Stage], section: MemoryConfig
                ) -> tuple[TrainConfig, list[Stage]]:
    """The run's config and its stages with the dial of --fit, in the place of their own."""
    dial = {name: getattr(section, name) for name in ("mode", "tile", "stretch")}
    cfg, _ = without(changed(cfg, memory=dial), {"memory": dial})
    return cfg, [dataclasses.replace(stage, cfg=changed(stage.cfg, memory=dial)) for stage in opened]
