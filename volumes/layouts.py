"""Images whose channels lie in files of their own: nnU-Net's folders, and the files that it names.

nnU-Net (doi:10.1038/s41592-020-01008-z) keeps channel k of case X as imagesTr/X_000k and its label as
labelsTr/X, test cases in imagesTs; dataset.json says what the channels are (version 1: `modality`, version 2:
`channel_names`). Version 1.0.
"""
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from volumes import formats
from volumes.config import MAX_CLASSES
from volumes.files import DataError, Say, bare_name, name_below, one_line, show, sizes, split_ending
from volumes.volume import Request, Source, check_size, distance

CHANNEL = re.compile(r"(.+)_(\d{4})$")  # of a file's own name
FAR = 0.01                              # of a voxel: places of two channels may differ by this
MAX_DATALIST = 2**28                    # bytes of a JSON file; some million files


class ChannelCase(NamedTuple):
    """The files of one image."""
    name: str                  # below the data's root, without the channel
    files: tuple[Path, ...]    # channel 0, 1, ...; or what there is of them
    label: Path | None
    fault: str | None          # a channel that is missing


class Cases(NamedTuple):
    training: list[ChannelCase]
    testing: list[ChannelCase]
    orphans: list[Path]        # labels without an image


def nnunet_cases(root: Path, say: Say) -> Cases | None:
    """The cases of a folder of nnU-Net, or of its imagesTr or imagesTs alone; None where it is none.

    A folder is one where all names in imagesTr end in a channel, and where dataset.json, a label of a case's
    name or a second channel shows that these numbers are channels.
    """
    folders = {name.lower(): root / name for name in sorted(os.listdir(root)) if (root / name).is_dir()}
    home = root
    own_name = Path(os.path.abspath(root)).name.lower()
    if own_name in ("imagestr", "imagests"):
        home = Path(os.path.abspath(root)).parent
        folders = {name.lower(): home / name for name in sorted(os.listdir(home))
                   if (home / name).is_dir() and name.lower().startswith("labels")}
        folders[own_name] = root
    found = {}
    for name in ("imagestr", "imagests"):
        if name in folders:
            labels = labels_in(folders.get(name.replace("images", "labels")))
            found[name] = cases_in(folders[name], root, labels, channels_named(home))
    if not any(found.values()) or None in found.values():
        return None
    if own_name in found:
        training, testing = found[own_name], []
    elif "imagestr" in found:
        training, testing = found["imagestr"], found.get("imagests", [])
    else:
        return None
    used = {case.label for case in training}
    orphans = []
    if "imagestr" in found:
        orphans = [file for file in labels_in(folders.get("labelstr")).values() if file not in used]
    most = max(len(case.files) for case in training)
    plural = "s" if most > 1 else ""
    say(f"data: nnU-Net's folders: {len(training)} cases of {most} channel{plural}")
    return Cases(training, testing, orphans)


def channels_named(home: Path) -> int | None:
    """How many channels dataset.json names; None where it does not say."""
    content = json_in(home / "dataset.json")
    names = content.get("channel_names") or content.get("modality")
    return len(names) or None if isinstance(names, (dict, list, str)) else None


class DeclaredLabels(NamedTuple):
    """What dataset.json says of labels."""
    names: dict[int, str]      # stored value -> name, but for the ignored one
    ignored: int | None        # the value of nnU-Net's `ignore`
    regions: dict[str, tuple[int, ...]] = {}  # name -> the values whose union it is

    @property
    def count(self) -> int:
        """How many classes these are; 0 where their values are not 0, 1, 2, ..."""
        is_whole = sorted(self.names) == list(range(len(self.names)))
        return len(self.names) if is_whole and len(self.names) <= MAX_CLASSES else 0


def declared_labels(path: Path | None) -> DeclaredLabels:
    """The `labels` of a datalist, or of the dataset.json in a folder or beside its imagesTr; else none.

    Version 1 has {"1": "liver"}, version 2 {"liver": 1}. A list of values is a region: no class, but the
    union of some. A class that stands in regions alone has no name.
    """
    if path is None:
        return DeclaredLabels({}, None)
    path = Path(os.path.expanduser(path))
    if path.suffix.lower() != ".json":
        folder = Path(os.path.abspath(path))
        if folder.name.lower() in ("imagestr", "imagests"):
            folder = folder.parent
        path = folder / "dataset.json"
    names: dict[int, str] = {}
    regions: dict[str, tuple[int, ...]] = {}
    labels = json_in(path).get("labels")
    for name, value in labels.items() if isinstance(labels, dict) else ():
        if isinstance(name, str) and name.isdecimal() and isinstance(value, str):
            name, value = value, int(name[:9])
        if is_label(value):
            names.setdefault(value, one_line(name, 40))
        if isinstance(value, list) and value and all(map(is_label, value)):
            regions[one_line(name, 40)] = tuple(value)
            # A region of one value is a class like another.
            if len(value) == 1:
                names.setdefault(value[0], one_line(name, 40))
    regions = {name: values for name, values in regions.items() if len(values) > 1}
    for value in sorted({value for values in regions.values() for value in values}):
        names.setdefault(value, str(value))
    ignored = next((value for value, name in names.items() if name.lower() == "ignore"), None)
    names.pop(ignored, None)
    return DeclaredLabels(names, ignored, regions)


def is_label(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**15


def names_no_files(path: Path) -> bool:
    """Whether it is nnU-Net's dataset.json of version 2, which names no files, beside its imagesTr."""
    if not (path.parent / "imagesTr").is_dir():
        return False
    content = json_in(path)
    return "training" not in content and "labels" in content


def json_in(path: Path) -> dict:
    """What a JSON file holds; nothing where it cannot be read, is too large or is no object."""
    try:
        if os.path.getsize(path) > MAX_DATALIST:
            return {}
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def labels_in(folder: Path | None) -> dict[str, Path]:
    """Name -> label."""
    return {bare_name(file.name): file for file in volumes_in(folder)} if folder else {}


def volumes_in(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(os.listdir(folder))
            if formats.is_volume(name) and not name.startswith(".")]


def cases_in(folder: Path, root: Path, labels: dict[str, Path],
             named: int | None) -> list[ChannelCase] | None:
    """The cases of a folder such as imagesTr. None where its names are no channels."""
    groups: dict[str, dict[int, Path]] = {}
    for file in volumes_in(folder):
        match = CHANNEL.match(bare_name(file.name))
        if match is None or bare_name(file.name) in labels:
            return None
        groups.setdefault(match.group(1), {})[int(match.group(2))] = file
    are_channels = named or labels.keys() & groups.keys() or all(
        len(channels) > 1 and 0 in channels for channels in groups.values())
    if not groups or not are_channels:
        return None
    cases = []
    for case, channels in groups.items():
        wanted = named or max(channels) + 1
        lacking = [k for k in range(wanted) if k not in channels]
        fault = None
        if lacking:
            fault = f"its case {case} has no channel _{lacking[0]:04d}; put that file beside it"
        files = tuple(channels[k] for k in sorted(channels))
        own = name_below(root, files[0])
        cases.append(ChannelCase(own[:-len("_0000")], files, labels.get(case), fault))
    return cases


def channels_of(file: Path) -> list[Path]:
    """X_0000, X_0001, ... of a file X that is not there itself, as version 1 of dataset.json names cases."""
    ending = "".join(split_ending(file))
    if os.path.exists(file):
        return []
    found = []
    while True:
        channel = file.with_name(f"{bare_name(file.name)}_{len(found):04d}{ending}")
        if not os.path.isfile(channel):
            return found
        found.append(channel)


def joined(paths: Iterable[Path], first: Source, request: Request, nan: str) -> Source:
    """The first file, read, with the others as its further channels. Raises DataError where one of them does
    not lie on its grid.
    """
    array = first.volume.array
    parts = [array]
    for path in paths:
        check_size((len(parts) + 1, *array.shape[1:]), 4, request.max_gib)
        other = formats.read_source(path, request, nan).volume
        if len(other.array) != 1 or len(array) != 1:
            raise DataError(f"{show(path)}: one of several channels of an image, but they hold "
                            f"{len(array)} and {len(other.array)} volumes or channels; give files of one "
                            f"each")
        if other.array.shape != array.shape:
            raise DataError(f"{show(path)}: its grid is {sizes(other.array.shape[1:])} voxels (D,H,W), that "
                            f"of the image's first channel {sizes(array.shape[1:])}; resample it onto that")
        apart = distance(other, first.volume)
        if apart > FAR * min(first.volume.spacing):
            raise DataError(f"{show(path)}: lies up to {apart:.3g} mm away from the image's first channel: "
                            f"their affines differ; resample it onto that one's grid")
        parts.append(other.array)
    return first._replace(volume=first.volume._replace(array=np.concatenate(parts)), is_series=False)
