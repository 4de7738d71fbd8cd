"""A folder, a file or a JSON datalist -> the files of a data set, images with their labels.

A label goes with its image by a datalist's {image, label}, by the same name in `images/` and `labels/` (or
`imgs/` and `masks/`), as `X_image` beside `X_label`, as `segmentation` beside one image, or in one file that
holds both. Version 1.2.
"""
import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from volumes import format_sitk, formats
from volumes.files import (
    COMPRESSED,
    DataError,
    bare_name,
    brief,
    name_below,
    one_line,
    show,
    split_ending,
    stem_of,
)
from volumes.layouts import MAX_DATALIST, ChannelCase, channels_of, names_no_files, nnunet_cases
from volumes.own import Own

IMAGE_FOLDERS = ("images", "imgs", "imagestr")  # side by side with one of the next line, in lower case
LABEL_FOLDERS = ("labels", "masks", "labelstr")
LABEL_SUFFIX = re.compile("_(label|mask|seg)$")  # X_label goes with X_image or X, in lower case
LABEL_NAME = re.compile("(segmentations?|seg|labels?|masks?|aseg)$")  # with the one image in its folder
HALF_CHARACTERS = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte of a name
LISTS = {"training": ["training"], "validation": ["validation"], "testing": ["testing", "test"]}  # keys
PATIENT_KEYS = ("patient", "patient_id", "subject", "subject_id", "case_id")  # of a datalist
MAX_NAME = 4096       # characters of a path in a datalist
MOST_KINDS = 12       # of ignored files that are named in a line

NO_LABEL = ("has no label: no file of its name in labels/ or masks/, no X_label or segmentation beside it, "
            "no `seg` in an .npz, none in a datalist")
NO_IMAGE = ("a label without its image; put the image beside it, or name the pair in a datalist, "
            "{\"image\": ..., \"label\": ...}")


class Item(NamedTuple):
    """One file of a data set."""
    path: Path
    kind: str | None = None     # the datalist's `class`, as written there
    label: Path | None = None   # may be the file itself: an .npz of both
    fault: str | None = None    # why it is refused before it is read: an image without label, or the reverse
    name: str = ""              # its path below the data's root, without its ending; "": not known
    patient: str | None = None  # of a datalist's PATIENT_KEYS
    fold: int | None = None     # of a datalist's `fold`
    more: tuple[Path, ...] = ()  # files of further channels
    region: str | None = None   # of a datalist's `region`: the part of the body

    @property
    def known_as(self) -> str:
        """Its name, or where it was given alone that of the file."""
        return self.name or stem_of(self.path)

    @property
    def files(self) -> list[str]:
        """All files that its voxels come from: two where they lie apart from their header."""
        found = []
        for path in (self.path, *self.more):
            found += formats.parts_of(path) or [str(path)]
        return found


def list_items(path: str | os.PathLike, labels: bool = False,
               say: Callable[[str], object] = lambda line: None) -> dict[str, list[Item]]:
    """Folder, file or JSON datalist -> {"training": [...], "validation": [...], "testing": [...]}, each
    file once.

    A folder is searched recursively, links followed, hidden names skipped; the files are sorted by their
    path and are all `training`. A datalist has those three keys (Decathlon's `test` is `testing`), each a
    list of {image, label?, class?} or of plain paths, relative to the JSON. Raises DataError when there is
    nothing at `path` or the datalist is malformed.

    labels: each image comes with its label; what has no partner has a `fault`. Otherwise the labels of
    pairs are left out. So are, with or without, pictures in a folder that holds volumes, unless they are
    pairs, and what this project wrote below a folder (volumes/own.py); `say` gets a line about what was
    left out.
    """
    path = Path(os.path.expanduser(path))
    lists = {"training": [], "validation": [], "testing": []}
    if os.path.isdir(path):
        cases = None
        with contextlib.suppress(OSError):                   # of a folder that cannot be read, told by `walk`
            cases = nnunet_cases(path, say)
        if cases is not None:
            lists["training"] = [item_of_case(case, labels) for case in cases.training]
            lists["testing"] = [item_of_case(case, labels) for case in cases.testing]
            if labels:
                lists["training"] += [Item(file, None, file, NO_IMAGE) for file in cases.orphans]
        else:
            lists["training"] = pair_files(path, walk(path, say), labels, say)
    elif path.suffix.lower() == ".json" and names_no_files(path):
        return list_items(path.parent, labels, say)
    elif path.suffix.lower() == ".json" and os.path.isfile(path):
        lists = read_datalist(path, labels)
    elif path.suffix.lower() in (".txt", ".csv", ".tsv", ".yaml", ".yml") and os.path.isfile(path):
        raise DataError(f"{show(path)}: neither a volume nor a datalist; write the list as JSON: "
                        '{"training": [{"image": PATH, "label": PATH}, ...]}, or plain paths in it')
    elif os.path.exists(path):
        lists["training"] = [with_label_beside(path) if labels else Item(path)]
    else:
        raise DataError(f"{show(path)}: no such file or folder; give a folder, a volume or a JSON datalist")
    for name, items in lists.items():
        once: dict[tuple, Item] = {}
        for item in items:
            # A link to a file is that file: else it could be on both sides of the split.
            once.setdefault(tuple(map(os.path.realpath, (item.path, *item.more))), item)
        lists[name] = list(once.values())
        kept = {id(item) for item in lists[name]}
        again = [item.path for item in items if id(item) not in kept]
        if again:
            say(f"data: left out {some(again, 'file')} that the data have already, as a link or twice")
    root = root_of(path, [item.path for items in lists.values() for item in items])
    return {name: [item._replace(name=item.name or name_in(root, item.path)) for item in items]
            for name, items in lists.items()}


def item_of_case(case: ChannelCase, labels: bool) -> Item:
    first, *more = case.files
    fault = case.fault
    if labels and case.label is None:
        fault = fault or NO_LABEL
    label = case.label if labels else None
    return Item(first, None, label, fault, case.name, more=tuple(more))


def name_in(root: Path, file: Path) -> str:
    """What a file is known by below `root`. Of a series of files that is its folder, with the number of the
    series where there are several.
    """
    row = formats.format_of(file)
    if not row.is_series or not row.is_installed():
        return name_below(root, file)
    name = name_below(root, file.parent / "x").rpartition("/")[0]
    name = name or name_below(file.parent.absolute().parent, file.parent / "x").rpartition("/")[0]
    firsts = [os.path.realpath(names[0]) for names in format_sitk.series_in(str(file.parent))]
    mine = os.path.realpath(formats.parts_of(file)[0])
    if len(firsts) > 1 and mine in firsts:
        name += f"/series_{firsts.index(mine) + 1}"
    return name


def root_of(path: Path, files: Sequence[Path]) -> Path:
    """The folder below which the files of `path` are named.

    It is the folder itself; the folder of a file, or of a datalist where all its files lie below that; else
    the deepest folder that holds all files of the datalist.
    """
    if os.path.isdir(path):
        return path
    root = Path(os.path.abspath(path)).parent
    folders = [Path(os.path.abspath(file)).parent for file in files]
    if all(folder.is_relative_to(root) for folder in folders):
        return root
    return Path(os.path.commonpath(folders))


def walk(root: Path, say: Callable[[str], object]) -> list[Path]:
    """Files under `root` that look like volumes, sorted; of two halves the header alone. Link loops end.

    What this project wrote itself is left out, and `say` gets a line about it; and one that counts files of
    other kinds.
    """
    def fail(error: OSError):
        raise DataError(f"{show(error.filename)}: {error.strerror}; make the folder readable or move it out "
                        f"of the data")

    found, seen, own = [], set(), Own(root)
    ignored: Counter[str] = Counter()
    without: dict[str, list[Path]] = {}  # what installs a package -> the files that need it
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if own.is_of_run(folder, names):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        lower, series = {name.lower() for name in names}, []
        for name in names:
            if name.startswith("."):
                continue
            file, row = Path(folder, name), formats.row_of(os.path.join(folder, name))
            if row is None and split_ending(name)[0] != formats.NO_SHAPE:
                ignored["".join(split_ending(name))] += 1
            elif row is not None and not row.is_installed():
                without.setdefault(row.install, []).append(file)
            elif row is not None and row.is_series:
                series.append(file)
            elif not is_second_half(name, lower):
                found.append(file)
        found += firsts_of(series)
    found = [file for file in found if not own.takes(file)]
    for install, files in without.items():
        endings = " ".join(sorted({file.suffix.lower() or "DICOM" for file in files}))
        say(f"data: left out {some(sorted(files), 'file')} of kinds ({endings}) whose package is not "
            f"installed: {install}")
    own.tell(say)
    tell_ignored(ignored, say)
    # No pipes; broken links stay, and are refused by name.
    return sorted(file for file in found if os.path.isfile(file) or not os.path.exists(file))


def firsts_of(files: Sequence[Path]) -> list[Path]:
    """The first file of each series among those of a folder; and files of none, which reading will refuse."""
    firsts, seen = [], set()
    for file in sorted(files):
        if os.path.abspath(file) not in seen:
            names = formats.parts_of(file)
            seen |= set(names)
            firsts.append(Path(file.parent, os.path.basename(names[0])))
    return firsts


def tell_ignored(kinds: Counter[str], say: Callable[[str], object]) -> None:
    """A line that counts the files of other kinds. kinds: ending -> how many."""
    if not kinds:
        return
    by_number = sorted(kinds.items(), key=lambda row: (-row[1], row[0]))
    counts = [f"{count} {show(ending) or 'without an ending'}" for ending, count in by_number[:MOST_KINDS]]
    rest = sum(count for _, count in by_number[MOST_KINDS:])
    if rest:
        counts.append(f"{rest} of other kinds")
    say(f"data: ignored: {', '.join(counts)}")


def is_second_half(name: str, lower: set[str]) -> bool:
    """Whether a file holds the voxels of a header beside it. lower: names in its folder, in lower case."""
    header = formats.format_of(name).header_of.get(split_ending(name)[0])
    if header is None:
        return False
    stem = bare_name(name).lower()
    return any(stem + header + packed in lower for packed in ("", *COMPRESSED))


# ---------------------------------------------------------------------------------------------- pairs
def pair_files(root: Path, files: list[Path], labels: bool, say: Callable[[str], object]) -> list[Item]:
    """Files of a folder -> items, see `list_items`."""
    pictures = {file for file in files if formats.is_picture(file)}
    is_mixed = any(file not in pictures and split_ending(file)[0] != formats.NO_SHAPE for file in files)
    if is_mixed and not labels:
        files = [file for file in files if file not in pictures]
    label_of, image_of, in_folder = match(root, files)
    if labels:
        ignored = set()
        if is_mixed:
            ignored = {file for file in pictures if label_of.get(file) is None and image_of.get(file) is None}
        items = [item_of(file, label_of.get(file), file in image_of)
                 for file in files if file not in ignored and image_of.get(file) is None]
    else:
        ignored = pictures if is_mixed else set()
        with_pairs = {label.parent for label, image in image_of.items() if image is not None}
        left = [label for label in image_of if label in in_folder or label.parent in with_pairs]
        if left:
            say(f"data: left out {some(left, 'label file')}: the labels of pairs serve segmentation only")
        items = [Item(file) for file in files if file not in set(left)]
    if ignored:
        say(f"data: left out {some(sorted(ignored), 'picture')} among volumes; give pictures a folder of "
            f"their own to use them")
    return items


def item_of(file: Path, label: Path | None, is_label: bool) -> Item:
    """An image with the label that was found for it; is_label: it is a label itself, without an image."""
    label = label or own_label(file)
    if is_label:
        return Item(file, None, label, NO_IMAGE)
    return Item(file, None, label, None if label else NO_LABEL)


def some(files: Sequence[Path], what: str) -> str:
    """Their number and the first names, for a message."""
    plural = "s" if len(files) > 1 else ""
    names = ", ".join(show(file.name) for file in files[:3])
    more = ", ..." if len(files) > 3 else ""
    return f"{len(files)} {what}{plural} ({names}{more})"


class Pairs(NamedTuple):
    """Which file goes with which."""
    label_of: dict[Path, Path | None]  # of each image
    image_of: dict[Path, Path | None]  # of each label
    in_folder: set[Path]               # labels that a folder such as labels/ makes labels


def match(root: Path, files: Sequence[Path]) -> Pairs:
    """The pairs among the files below `root`."""
    # First the files that lie in a folder such as images/ or labels/: its home, the way from there, its role.
    homes: dict[tuple, set[bool]] = {}
    places: dict[Path, tuple] = {}
    for file in files:
        folders = file.relative_to(root).parts[:-1]
        named = [i for i, folder in enumerate(folders) if folder.lower() in IMAGE_FOLDERS + LABEL_FOLDERS]
        if named:
            level = named[-1]
            is_label = folders[level].lower() in LABEL_FOLDERS
            homes.setdefault(folders[:level], set()).add(is_label)
            places[file] = folders[:level], folders[level + 1:], is_label

    # Then by (place, stem) the images, and of each label the names that its image may have, the best first.
    images: dict[tuple, list[Path]] = {}
    names: dict[Path, list[tuple]] = {}
    for file in files:
        stem = bare_name(file.name).lower()
        base = LABEL_SUFFIX.sub("", stem)
        home, below, is_label = places.get(file, ((), (), False))
        is_in_home = file in places and len(homes[home]) == 2
        place = (home, below) if is_in_home else (None, file.parent)
        if is_in_home and is_label:
            names[file] = [(*place, name) for name in (stem, base, f"{stem}_image", f"{base}_image")]
        elif not is_in_home and base != stem and own_label(file) is None:
            names[file] = [(*place, name) for name in (f"{base}_image", base)]
        else:
            images.setdefault((*place, stem), []).append(file)

    # A file that is called segmentation is the label of the one image beside it, as KiTS has them.
    for place, folder, stem in list(images):
        if place is None and LABEL_NAME.match(stem):
            beside = [key for key in images if key[:2] == (place, folder) and key[2] != stem]
            same_name = images[place, folder, stem]
            if len(beside) == len(same_name) == 1 and own_label(same_name[0]) is None:
                names[same_name[0]] = beside
                del images[place, folder, stem]

    # An equal name goes before a name with an ending: all labels try their first name, then all their second.
    label_of: dict[Path, Path | None] = {file: None for same_name in images.values() for file in same_name}
    image_of: dict[Path, Path | None] = dict.fromkeys(names)
    for rank in range(4):
        for label, keys in names.items():
            if rank >= len(keys) or image_of[label] is not None:
                continue
            free = [file for file in images.get(keys[rank], ()) if label_of[file] is None]
            if free:
                label_of[free[0]], image_of[label] = label, free[0]
    return Pairs(label_of, image_of, {label for label, keys in names.items() if keys[0][0] is not None})


def own_label(path: Path) -> Path | None:
    """The file itself if it holds an image and its label."""
    if os.path.isfile(path) and formats.format_of(path).holds_label(path):
        return path
    return None


def with_label_beside(path: Path) -> Item:
    """One image and the label that a folder's pairing would give it."""
    file = Path(os.path.abspath(path))
    root = file.parent.parent if file.parent.name.lower() in IMAGE_FOLDERS else file.parent
    try:
        named = [folder for folder in root.iterdir() if folder.name.lower() in LABEL_FOLDERS]
        folders = [file.parent, *(folder for folder in named if folder.is_dir())]
        beside = {other for folder in folders for other in folder.iterdir()
                  if formats.is_volume(other) and other.is_file()}
        files = sorted(beside | {file})
    except OSError:  # a folder that may be entered, not listed
        files = [file]
    label_of, image_of, _ = match(root, files)
    label = label_of.get(file) or own_label(file)
    if label:
        return Item(path, None, label)
    return Item(path, None, None, NO_IMAGE if file in image_of else NO_LABEL)


# ---------------------------------------------------------------------------------------------- datalists
def read_datalist(path: Path, labels: bool) -> dict[str, list[Item]]:
    """The three lists of a JSON datalist."""
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):              # json keeps the last one and says nothing
            raise ValueError(f"{len(pairs) - len(found)} keys of {brief(sorted(found)[:8])} stand there "
                             f"twice")
        return found

    try:
        size = os.path.getsize(path)
        if size > MAX_DATALIST:
            raise ValueError(f"{size} bytes; a datalist has {MAX_DATALIST} at most")
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{show(path)}: not a readable JSON file ({one_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        found = brief(sorted(content)[:8]) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{show(path)}: a datalist needs a list `training` of {{image, label?, class?}}, "
                        f"found {found}")
    lists = {}
    for name, keys in LISTS.items():
        entries = next((content[key] for key in keys if key in content), None) or []
        if not isinstance(entries, list):
            raise DataError(f"{show(path)}: `{name}` is a {type(entries).__name__}; make it a list of "
                            f"{{image, label?, class?}}")
        lists[name] = [datalist_item(path, f"{name}[{number}]", entry, labels)
                       for number, entry in enumerate(entries)]
    return lists


def datalist_item(path: Path, place: str, entry: object, labels: bool) -> Item:
    """One entry of a datalist. place: where it stands there, for messages."""
    named = entry if isinstance(entry, dict) else {"image": entry}
    image, kind = named.get("image"), named.get("class")
    label = named.get("label") if labels else None
    images = image if isinstance(image, list) else [image]
    if not images or not all(map(is_name, images)):
        raise DataError(f"{show(path)}: {place} is {brief(entry)}; make it {{\"image\": path}}, a path, or "
                        f"{{\"image\": [a path for each channel]}}")
    if kind is not None and not isinstance(kind, (str, int)):
        raise DataError(f"{show(path)}: {place} has the class {brief(kind)}; make it a text such as ct")
    if label is not None and not is_name(label):
        raise DataError(f"{show(path)}: {place} has the label {brief(label)}; make it a path")

    file, *more = (path.parent / os.path.expanduser(name) for name in images)
    if not more:
        file, *more = channels_of(file) or [file]
    if label is not None:
        label = path.parent / os.path.expanduser(label)
    elif labels:
        label = own_label(file)
    fault = NO_LABEL if labels and label is None else None
    return Item(file, None if kind is None else str(kind), label, fault, more=tuple(more),
                patient=patient_named(path, place, named), fold=fold_named(path, place, named),
                region=region_named(path, place, named))


def patient_named(path: Path, place: str, named: dict) -> str | None:
    """Whose file an entry says that it is."""
    for key in PATIENT_KEYS:
        value = named.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (str, int)):
                raise DataError(f"{show(path)}: {place} has the {key} {brief(value)}; make it a text or a "
                                f"number")
            return one_line(value)
    return None


def fold_named(path: Path, place: str, named: dict) -> int | None:
    """The fold that an entry says it is of."""
    value = named.get("fold")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise DataError(f"{show(path)}: {place} has the fold {brief(value)}; make it a whole number")
    return value


def region_named(path: Path, place: str, named: dict) -> str | None:
    """The part of the body that an entry says it shows, such as chest or chest-abdomen."""
    value = named.get("region")
    if value is not None and not isinstance(value, str):
        raise DataError(f"{show(path)}: {place} has the region {brief(value)}; make it a text such as chest")
    return None if value is None else one_line(value)


def is_name(value: object) -> bool:
    """A text that may be a path: JSON can hold halves of characters, which no file system takes."""
    if not isinstance(value, str) or "\0" in value or HALF_CHARACTERS.search(value):
        return False
    return 0 < len(value) <= MAX_NAME
