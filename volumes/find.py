"""Folders and datalists -> the files of a data set, images with their labels.

A label goes with each image by a datalist's {image, label}, the same name in `images/` and `labels/` (or `imgs/` and `masks/`),
`X_image` beside `X_label`, or `vol` and `seg` in one .npz. Nothing is read but names, datalists and the names in an .npz. Version 1.0.
"""
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from volumes.files import COMPRESSED, DataError, brief, one_line, show, split_ending
from volumes.formats import NO_SHAPE, format_of, is_picture, is_volume

IMAGE_FOLDERS, LABEL_FOLDERS = ("images", "imgs", "imagestr"), ("labels", "masks", "labelstr")  # side by side in one folder
LABEL_SUFFIX = re.compile("_(label|mask|seg)$")  # X_label goes with X_image or X, in lower case
MAX_DATALIST = 2**28  # bytes; some million files
NO_LABEL = "has no label: no file of its name in labels/ or masks/, no X_label beside it, no `seg` in an .npz, none in a datalist"
NO_IMAGE = "a label without its image; put the image beside it, or name the pair in a datalist, {\"image\": ..., \"label\": ...}"


class Item(NamedTuple):
    """One file of a data set. `kind` is the datalist's `class`, as written there. `label` may be the file itself: an .npz of both."""
    path: Path
    kind: str | None = None
    label: Path | None = None
    fault: str | None = None  # why it is refused before it is read: an image without label, a label without image


def list_items(path: str | os.PathLike, labels: bool = False, say: Callable[[str], object] = lambda line: None) -> dict[str, list[Item]]:
    """Folder, file or JSON datalist -> {"training": [...], "validation": [...], "testing": [...]}, each file once.

    A folder is searched recursively, links followed, hidden names skipped; the files are sorted by their path and are all
    `training`. A datalist has those three keys (Decathlon's `test` is `testing`), each a list of {image, label?, class?} or of
    plain paths, relative to the JSON. Raises DataError when there is nothing at `path` or the datalist is malformed.

    labels: each image comes with its label; what has no partner has a `fault`. Otherwise the labels of pairs are left out. So are, with or
    without, pictures in a folder that holds volumes, unless they are pairs; `say` gets a line about what was left out.
    """
    path = Path(os.path.expanduser(path))
    lists = {"training": [], "validation": [], "testing": []}
    if os.path.isdir(path):
        lists["training"] = pair(path, list(walk(path)), labels, say)
    elif path.suffix.lower() == ".json" and os.path.isfile(path):
        lists = read_datalist(path, labels)
    elif os.path.exists(path):
        lists["training"] = [with_label_beside(path) if labels else Item(path)]
    else:
        raise DataError(f"{show(path)}: no such file or folder; give a folder, a volume or a JSON datalist")
    for name, items in lists.items():
        once: dict[str, Item] = {}
        for item in items:
            once.setdefault(os.path.realpath(item.path), item)  # a link to a file is that file: else it could be on both sides of the split
        lists[name] = list(once.values())
    return lists


def walk(root: Path) -> Iterator[Path]:
    """Files under `root` that look like volumes, sorted; of a pair such as .hdr/.img the header alone. Link loops end."""
    def fail(error: OSError):
        raise DataError(f"{show(error.filename)}: {error.strerror}; make the folder readable or move it out of the data")

    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        lower = {name.lower() for name in files}
        for name in files:
            kind, tail = split_ending(name)
            stem = name[:len(name) - len(kind + tail)].lower()
            header = format_of(name).header_of.get(kind)
            is_second = header is not None and any(stem + header + end in lower for end in ("", *COMPRESSED))
            known = is_volume(name) or kind == NO_SHAPE
            if known and not name.startswith(".") and not is_second:
                found.append(Path(folder, name))
    return iter(sorted(file for file in found if os.path.isfile(file) or not os.path.exists(file)))  # no pipes; broken links stay


def pair(root: Path, files: list[Path], labels: bool, say: Callable[[str], object]) -> list[Item]:
    """Files of a folder -> items, see `list_items`."""
    pictures = {file for file in files if is_picture(file)}
    mixed = any(not is_picture(file) and split_ending(file)[0] != NO_SHAPE for file in files)
    if mixed and not labels:
        files = [file for file in files if file not in pictures]
    label_of, image_of, in_folder = match(root, files)
    if labels:
        ignored = {file for file in pictures if mixed and label_of.get(file) is None and image_of.get(file) is None}
        items = [Item(file, None, label_of.get(file) or own_label(file), NO_IMAGE if file in image_of else None)
                 for file in files if file not in ignored and image_of.get(file) is None]
        items = [item if item.label or item.fault else item._replace(fault=NO_LABEL) for item in items]
    else:
        ignored = pictures if mixed else set()
        with_pairs = {label.parent for label, image in image_of.items() if image is not None}
        left = [label for label in image_of if label in in_folder or label.parent in with_pairs]
        if left:
            say(f"data: left out {some(left, 'label file')}: the labels of pairs serve segmentation only")
        items = [Item(file) for file in files if file not in set(left)]
    if ignored:
        say(f"data: left out {some(sorted(ignored), 'picture')} among volumes; give pictures a folder of their own to use them")
    return items


def some(files: Sequence[Path], what: str) -> str:
    return f"{len(files)} {what}{'s' * (len(files) > 1)} ({', '.join(show(file.name) for file in files[:3])}{', ...' * (len(files) > 3)})"


def match(root: Path, files: Sequence[Path]) -> tuple[dict[Path, Path | None], dict[Path, Path | None], set[Path]]:
    """{image: its label or None}, {label: its image or None}, and the labels that a folder such as labels/ makes labels."""
    homes, places = {}, {}
    for file in files:
        folders = file.relative_to(root).parts[:-1]
        level = next((i for i in reversed(range(len(folders))) if folders[i].lower() in IMAGE_FOLDERS + LABEL_FOLDERS), None)
        if level is not None:
            role = folders[level].lower() in LABEL_FOLDERS
            homes.setdefault(folders[:level], set()).add(role)
            places[file] = folders[:level], folders[level + 1:], role
    images: dict[tuple, list[Path]] = {}
    names: dict[Path, list[tuple]] = {}
    for file in files:
        stem = file.name[:len(file.name) - len("".join(split_ending(file.name)))].lower()
        base = LABEL_SUFFIX.sub("", stem)
        home, below, role = places.get(file, ((), (), False))
        in_home = file in places and len(homes[home]) == 2
        place = (home, below) if in_home else (None, file.parent)
        if in_home and role:
            names[file] = [(*place, name) for name in (stem, base, f"{stem}_image", f"{base}_image")]
        elif not in_home and base != stem and own_label(file) is None:
            names[file] = [(*place, name) for name in (f"{base}_image", base)]
        else:
            images.setdefault((*place, stem), []).append(file)
    label_of: dict[Path, Path | None] = {file: None for group in images.values() for file in group}
    image_of: dict[Path, Path | None] = dict.fromkeys(names)
    for rank in range(4):                                      # an equal name goes before a name with an ending
        for label, keys in names.items():
            free = [file for file in images.get(keys[rank], ()) if label_of[file] is None] if rank < len(keys) else []
            if free and image_of[label] is None:
                label_of[free[0]], image_of[label] = label, free[0]
    return label_of, image_of, {label for label, keys in names.items() if keys[0][0] is not None}


def own_label(path: Path) -> Path | None:
    """The file itself if it is an .npz of an image and its label (or none that can be opened: reading it says why)."""
    if os.path.isfile(path) and format_of(path).holds_label(path):
        return path
    return None


def with_label_beside(path: Path) -> Item:
    """One image and the label that a folder's pairing would give it."""
    file = Path(os.path.abspath(path))
    root = file.parent.parent if file.parent.name.lower() in IMAGE_FOLDERS else file.parent
    try:
        folders = [file.parent] + [folder for folder in root.iterdir() if folder.name.lower() in LABEL_FOLDERS and folder.is_dir()]
        files = sorted({other for folder in folders for other in folder.iterdir()
                        if is_volume(other) and other.is_file()} | {file})
    except OSError:  # a folder that may be entered, not listed
        files = [file]
    label_of, image_of, _ = match(root, files)
    label = label_of.get(file) or own_label(file)
    return Item(path, None, label, None if label else NO_IMAGE if file in image_of else NO_LABEL)


def read_datalist(path: Path, labels: bool) -> dict[str, list[Item]]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(found := dict(pairs)) != len(pairs):              # json keeps the last one and says nothing
            raise ValueError(f"{len(pairs) - len(found)} keys of {brief(sorted(found)[:8])} stand there twice")
        return found

    try:
        if (size := os.path.getsize(path)) > MAX_DATALIST:
            raise ValueError(f"{size} bytes; a datalist has {MAX_DATALIST} at most")
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{show(path)}: not a readable JSON file ({one_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise DataError(f"{show(path)}: a datalist needs a list `training` of {{image, label?, class?}}, found "
                        f"{brief(sorted(content)[:8]) if isinstance(content, dict) else type(content).__name__}")
    lists = {}
    for name, keys in (("training", ("training",)), ("validation", ("validation",)), ("testing", ("testing", "test"))):
        entries = next((content[key] for key in keys if key in content), None) or []
        if not isinstance(entries, list):
            raise DataError(f"{show(path)}: `{name}` is a {type(entries).__name__}; make it a list of {{image, label?, class?}}")
        lists[name] = [datalist_item(path, name, number, entry, labels) for number, entry in enumerate(entries)]
    return lists


def datalist_item(path: Path, name: str, number: int, entry: object, labels: bool) -> Item:
    image, kind = (entry.get("image"), entry.get("class")) if isinstance(entry, dict) else (entry, None)
    if not is_name(image):
        raise DataError(f"{show(path)}: {name}[{number}] is {brief(entry)}; make it {{\"image\": path}} or a path")
    if kind is not None and not isinstance(kind, (str, int)):
        raise DataError(f"{show(path)}: {name}[{number}] has the class {brief(kind)}; make it a text such as ct")
    file, label = path.parent / os.path.expanduser(image), entry.get("label") if labels and isinstance(entry, dict) else None
    if label is not None and not is_name(label):
        raise DataError(f"{show(path)}: {name}[{number}] has the label {brief(label)}; make it a path")
    label = path.parent / os.path.expanduser(label) if label else own_label(file) if labels else None
    return Item(file, None if kind is None else str(kind), label, NO_LABEL if labels and label is None else None)


def is_name(value: object) -> bool:
    """A text that may be a path: JSON can hold halves of characters, which no file system takes."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and "\0" not in value and not re.search("[\ud800-\udc7f\udd00-\udfff]", value)
