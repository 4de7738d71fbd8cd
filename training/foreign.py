"""Autoencoders that another library made, as files: their weights, and hints.

A hint is what the file itself cannot say, such as the number of groups of its GroupNorms. The user gives
hints as NAME=VALUE, or names the JSON or YAML file with the arguments that the autoencoder was built with.
weights.py converts; this room reads files and hints, and words the errors. Version 0.3 (2026-11).
"""
from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from training import checkpoints
from training.config import convert, one_of, read_yaml
from training.console import line_of
from training.task import Task
from vae3d import VAEConfig
from weights import BLOCKS, LAYOUTS, HintError, is_foreign, turn_axes
from weights import convert as convert_foreign

# One of each names an autoencoder's arguments, whatever else stands beside them.
LATENT_NAMES = {"latent_channels", "latent_dim"}
WIDTH_NAMES = {"channels", "num_channels", "block_out_channels", "base_channels"}


class Foreign(NamedTuple):
    """An autoencoder of another library, converted."""
    layout: str                               # of weights.LAYOUTS
    vae: VAEConfig
    weights: dict[str, Tensor]


def load_foreign(path: str | Path, hints: str | None, flag: str) -> Foreign | None:
    """What weights.py makes of a file; None for a folder, an absent file and what is not foreign.

    flag: the one that the hints were given with, for errors. ValueError in one line.

    Two things are as in the layout's own scripts unless a hint says otherwise. intensity_range is [0, 1]
    for MONAI's, else [-1, 1]. And MONAI reads volumes as x,y,z, so that its kernels are turned round.
    """
    content = checkpoints.read(path) if Path(path).is_file() else None
    layout = is_foreign(content)
    if layout is None:
        return None

    # First what holds for the layout, under what the hints say.
    named, several = read_hints(hints, flag)
    is_monai = layout in BLOCKS
    named.setdefault("intensity_range", (0.0, 1.0) if is_monai else VAEConfig.intensity_range)
    axes = named.pop("axes", "xyz" if is_monai else "zyx")
    one_of(f"{flag}: axes", axes, ("xyz", "zyx"))

    # Then the first autoencoder of the arguments' file that fits: a MAISI config describes two.
    errors = []
    for arguments in several:
        try:
            vae, state = convert_foreign(content, **{**arguments, **named})
            if axes == "xyz":
                state = turn_axes(state)
            return Foreign(layout, vae, state)
        except HintError as error:
            errors.append(f"{path}: {error} ({flag} NAME=VALUE,NAME=VALUE,... or the original's CONFIG.json)")
        except ValueError as error:
            errors.append(f"{path}: {line_of(error)}")
        # Of hints that have the wrong type, such as strides that are no lists.
        except TypeError as error:
            errors.append(f"{path}: {line_of(error)} (given {flag} {hints})")
    raise ValueError(errors[0])


# -------------------------------------------------------------------------------- hints

def read_hints(text: str | None, flag: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """"FILE,NAME=VALUE,NAME=VALUE" -> the named values, and the arguments of each autoencoder in FILE.

    Values are read as YAML. Without a file there is one autoencoder, of which nothing is known: [{}].
    """
    named, several = {}, [{}]
    # A comma separates where a NAME= follows: other commas belong to a value.
    parts = re.split(r",(?=\s*\w+\s*=)", text) if text else []
    for part in parts:
        name, is_named, value = part.partition("=")
        name = name.strip()
        if Path(part).is_file():
            several = autoencoder_arguments(part)
        elif not is_named:
            raise ValueError(f"{flag}: {part} is neither NAME=VALUE nor a file")
        elif not value.strip():
            raise ValueError(f"{flag}: {name} is given without a value")
        elif name in named:
            raise ValueError(f"{flag}: {name} is given twice")
        else:
            # 1,2,4 and (1,2,4) are lists too.
            if "," in value and "[" not in value:
                value = f"[{value.strip('() ')}]"
            try:
                named[name] = with_numbers(yaml.safe_load(value))
            except yaml.YAMLError as error:
                raise ValueError(f"{flag}: {part} cannot be read: {line_of(error)}") from None

    # A MONAI bundle may hold references and code, which are never run; a named value takes their place.
    for arguments in several:
        for name, value in arguments.items():
            if isinstance(value, str) and value[:1] in ("@", "$") and name not in named:
                raise ValueError(f"{flag}: the file says {name}: {value!r}, which is not evaluated here; "
                                 f"add {name}=VALUE")
    return named, several


def with_numbers(value: Any) -> Any:
    """Texts that are numbers become numbers: YAML reads 1e-6 as a text."""
    if isinstance(value, list):
        return [with_numbers(part) for part in value]
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def autoencoder_arguments(path: str) -> list[dict[str, Any]]:
    """Constructor arguments of each autoencoder in a JSON or YAML file such as a MONAI bundle's.

    "@name" is replaced by what stands under that name. ValueError where the file describes none.
    """
    try:
        # JSON may be indented by tabs, which YAML may not.
        if path.endswith(".json"):
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        else:
            content = read_yaml(path)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {line_of(error)}") from None

    found = []
    for entry in autoencoders_in(content):
        arguments = {name: value for name, value in entry.items() if not name.startswith("_")}
        found.append({name: looked_up(value, content) for name, value in arguments.items()})
    if not found:
        raise ValueError(f"{path}: describes no autoencoder; looked for latent_channels beside channels or "
                         "num_channels")
    return found


def autoencoders_in(value: Any) -> Iterator[dict]:
    """The dicts, at any depth, that hold an autoencoder's arguments."""
    inner = []
    if isinstance(value, dict):
        if value.keys() & LATENT_NAMES and value.keys() & WIDTH_NAMES:
            yield value
        inner = value.values()
    elif isinstance(value, list):
        inner = value
    for part in inner:
        yield from autoencoders_in(part)


def looked_up(value: Any, content: Any) -> Any:
    """A value of the file; "@network#channels" is content["network"]["channels"] where there is such."""
    if not isinstance(value, str) or not value.startswith("@"):
        return with_numbers(value)
    found = content
    for name in re.split("[#:]+", value[1:]):
        found = found.get(name) if isinstance(found, dict) else None
    return with_numbers(value if found is None else found)


# -------------------------------------------------------------------------------- in a run

def foreign_init(flags: dict, from_file: dict, task: Task) -> Foreign | None:
    """The network of train.init where another library made it.

    flags, from_file: {section: {field: value}} of the command line and of the config file. ValueError
    where the flags do not go together with such a file, or with its absence.
    """
    section = from_file.get("train") if isinstance(from_file.get("train"), dict) else {}
    given = section | flags.get("train", {})
    init = convert(given.get("init"), str | None, "train.init")
    hints = convert(given.get("init_hints"), str | None, "train.init_hints")
    foreign = None
    if init is not None:
        foreign = load_foreign(init, hints, "--train.init_hints")

    if foreign is None:
        if "init_hints" in flags.get("train", {}):
            why = "there is no --init"
            if init:
                why = f"--init {init} is none: its checkpoint says it all; leave them out"
            raise ValueError(f"--train.init_hints are about a foreign file, and {why}")
        return None
    if not task.FILE_PRESETS:
        raise ValueError(f"--init {init}: is an autoencoder (layout {foreign.layout}), for --task vae, not "
                         f"{task.name}")
    if "preset" in flags:
        raise ValueError(f"--init {init}: says itself what the network is; leave --preset out (single "
                         "fields: --vae.FIELD)")
    return foreign


def explained(error: Exception) -> str:
    """An error as a line; of a checkpoint that was none of ours, who made it and what takes it."""
    text = line_of(error)
    if not isinstance(error, checkpoints.OtherKind):
        return text
    layout = is_foreign(error.content)
    if layout is not None:
        return (f"{error.path}: is an autoencoder made elsewhere (layout {layout}); train.py --init takes "
                f"it, and so does predict.py reconstruct, encode, decode and evaluate --checkpoint")
    # Where weights would do, so would those of another library.
    if text.endswith("best.pt or last.pt"):
        text += f", or an autoencoder's weights named as by {', '.join(LAYOUTS)}"
    return text
