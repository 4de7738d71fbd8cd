"""Autoencoders that another library made, as files: their weights, and what the file itself cannot say
(hints). Version 0.3 (2026-11).
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


class Foreign(NamedTuple):
    """An autoencoder of another library, converted."""
    layout: str                               # of weights.LAYOUTS
    vae: VAEConfig
    weights: dict[str, Tensor]


def load_foreign(path: str | Path, hints: str | None, flag: str) -> Foreign | None:
    """What weights.py makes of a file; None for a folder, an absent file and what is not foreign. flag: with
    which the hints were given.

    intensity_range is what the layout's own scripts use unless a hint says otherwise: [0, 1] for MONAI's,
    else [-1, 1]; and so are the axes: MONAI reads volumes as x,y,z, so that its kernels are turned round.
    ValueError in one line."""
    content = checkpoints.read(path) if Path(path).is_file() else None
    layout = is_foreign(content)
    if layout is None:
        return None
    named, several = read_hints(hints, flag)
    named.setdefault("intensity_range", (0.0, 1.0) if layout in BLOCKS else VAEConfig.intensity_range)
    axes = named.pop("axes", "xyz" if layout in BLOCKS else "zyx")
    one_of(f"{flag}: axes", axes, ("xyz", "zyx"))
    errors = []
    # A MAISI config describes two autoencoders: the one that fits.
    for arguments in several:
        try:
            vae, state = convert_foreign(content, **{**arguments, **named})
            return Foreign(layout, vae, turn_axes(state) if axes == "xyz" else state)
        except HintError as error:
            errors.append(f"{path}: {error} ({flag} NAME=VALUE,NAME=VALUE,... or the original's CONFIG.json)")
        # TypeError: of strides that are no lists, and the like.
        except (ValueError, TypeError) as error:
            errors.append(
                f"{path}: {line_of(error)}" + f" (given {flag} {hints})" * isinstance(error, TypeError)
            )
    raise ValueError(errors[0])


def read_hints(text: str | None, flag: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """"FILE,NAME=VALUE,NAME=VALUE" -> the named values, read as YAML; and the arguments of each autoencoder
    in FILE, [{}] without one.
    """
    named, several = {}, [{}]
    for part in re.split(r",(?=\s*\w+\s*=)", text) if text else ():
        name, is_named, value = part.partition("=")
        if Path(part).is_file():
            several = autoencoder_arguments(part)
        elif not is_named:
            raise ValueError(f"{flag}: {part} is neither NAME=VALUE nor a file")
        elif name.strip() in named or not value.strip():
            raise ValueError(f"{flag}: {name.strip()} is given "
                             f"{'twice' if value.strip() else 'without a value'}")
        else:
            try:
                named[name.strip()] = with_numbers(
                    yaml.safe_load(value if "[" in value or "," not in value else f"[{value.strip('() ')}]")
                )
            except yaml.YAMLError as error:
                raise ValueError(f"{flag}: {part} cannot be read: {line_of(error)}") from None
    for arguments in several:
        for name, value in arguments.items():
            if isinstance(value, str) and value[:1] in ("@", "$") and name not in named:
                raise ValueError(f"{flag}: the file says {name}: {value!r}, which is not evaluated here; "
                                 f"add {name}=VALUE")
    return named, several


def with_numbers(value: Any) -> Any:
    """YAML reads 1e-6 as a text."""
    if isinstance(value, list):
        return [with_numbers(part) for part in value]
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def autoencoder_arguments(path: str) -> list[dict[str, Any]]:
    """Constructor arguments of each autoencoder in a JSON or YAML file such as a MONAI bundle's, "@name" put
    in. ValueError without any.
    """
    try:  # JSON may be indented by tabs, YAML not
        content = (
            json.loads(Path(path).read_text(encoding="utf-8")) if path.endswith(".json") else read_yaml(path)
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {line_of(error)}") from None

    def entries(value: Any) -> Iterator[dict]:
        if isinstance(value, dict) and value.keys() & {"latent_channels", "latent_dim"} and value.keys() & {
                "channels", "num_channels", "block_out_channels", "base_channels"}:
            yield value
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from entries(part)

    def resolved(value: Any) -> Any:
        found = content
        for name in re.split("[#:]+", value[1:]) if isinstance(value, str) and value.startswith("@") else ():
            found = found.get(name) if isinstance(found, dict) else None
        return with_numbers(value if found is content or found is None else found)

    found = [
        {name: resolved(value) for name, value in entry.items() if not name.startswith("_")}
        for entry in entries(content)
    ]
    if not found:
        raise ValueError(f"{path}: describes no autoencoder; looked for latent_channels beside channels or "
                         "num_channels")
    return found


def foreign_init(flags: dict, from_file: dict, task: Task) -> Foreign | None:
    """The network of train.init where another library made it. ValueError where flags deny it."""
    section = from_file.get("train") if isinstance(from_file.get("train"), dict) else {}
    given = {name: {**section, **flags.get("train", {})}.get(name) for name in ("init", "init_hints")}
    init, hints = (convert(value, str | None, f"train.{name}") for name, value in given.items())
    foreign = load_foreign(init, hints, "--train.init_hints") if init is not None else None
    if foreign is None:
        if "init_hints" in flags.get("train", {}):
            raise ValueError(
                "--train.init_hints are about a foreign file, and "
                + (
                    f"--init {init} is none: its checkpoint says it all; leave them out"
                    if init
                    else "there is no --init"
                )
            )
    elif not task.FILE_PRESETS:
        raise ValueError(f"--init {init}: is an autoencoder (layout {foreign.layout}), for --task vae, not "
                         f"{task.name}")
    elif "preset" in flags:
        raise ValueError(f"--init {init}: says itself what the network is; leave --preset out (single "
                         "fields: --vae.FIELD)")
    return foreign


def explained(error: Exception) -> str:
    """An error as a line; of a checkpoint that was none of ours, who made it and what takes it."""
    layout = is_foreign(error.content) if isinstance(error, checkpoints.OtherKind) else None
    if layout is not None:
        return (f"{error.path}: is an autoencoder made elsewhere (layout {layout}); train.py --init takes "
                f"it, and so does predict.py reconstruct, encode, decode and evaluate --checkpoint")
    text = line_of(error)
    if isinstance(error, checkpoints.OtherKind) and text.endswith("best.pt or last.pt"):
        text += f", or an autoencoder's weights named as by {', '.join(LAYOUTS)}"
    return text
