"""Which files are of one patient, and which patients are held out.

A patient's files are all on one side of the split, or validation would see whom training saw. Where
data.patient is `auto`, patients are found by, in this order: a datalist's keys, the `sub-` of BIDS, a folder
for each case, file names that repeat in several folders; else each file is its own. Version 1.0.
"""
import dataclasses
import os
import re
from collections.abc import Sequence
from statistics import median

import numpy as np

from volumes.config import DataConfig
from volumes.entries import Entry, Groups
from volumes.files import DataError, Say, show
from volumes.find import IMAGE_FOLDERS
from volumes.seeds import seeded

SUBJECT = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)")  # of BIDS
# Folders that are part of no patient's name: they hold images and their labels, side by side.
HOMES = (*IMAGE_FOLDERS, "imagests")
# A folder of one examination of a patient, such as ses-01, visit2 or a date ...
SESSION = re.compile(r"(ses|session|visit|scan|exam|time|timepoint|tp|day|week|month|year|baseline|"
                     r"follow-?up)[-_ ]?\d*$|\d{4}[-_.]?\d\d[-_.]?\d\d", re.IGNORECASE)
# ... and of many patients: of a site, of a part of the data, or of one kind of image.
OF_MANY = re.compile(r"(site|cent(er|re)|hospital|institution|scanner|fold|train\w*|val\w*|test\w*|"
                     r"t[12]\w{0,3}|t2star|pdw?|flair|dwi|adc|dti|asl|swi|ct|pet|mri?|bold|anat|func)"
                     r"[-_ ]?\d*$", re.IGNORECASE)
NONE_HELD_OUT = ("data: no usable volume in the `validation` list; some of the training files are held out "
                 "instead")
COMMON = 0.5  # share of a folder's names that other folders have too, for a folder for each case


# ---------------------------------------------------------------------------------------------- patients
def with_patients(training: Groups, held_out: Groups, cfg: DataConfig, say: Say) -> tuple[Groups, Groups]:
    """The same entries, each with its patient; a line says how they were found. Raises DataError for a
    regular expression that does not match.
    """
    files = [group[0] for group in training + held_out]
    patients, how = patients_of(files, cfg)
    named = [[dataclasses.replace(entry, patient=patient) for entry in group]
             for group, patient in zip(training + held_out, patients)]
    found = len(set(patients))
    are = "patient" if found == 1 else "patients"
    say(f"data: {found} {are} in {len(files)} files: {how} (data.patient={cfg.patient})")
    return named[:len(training)], named[len(training):]


def patients_of(files: Sequence[Entry], cfg: DataConfig) -> tuple[list[str], str]:
    """The patient of each file, and how they were found, in words. files: an entry of each."""
    if cfg.patient == "file":
        return [entry.file for entry in files], "each file a patient of its own"
    if cfg.patient not in ("auto", "folder"):
        return by_expression(files, cfg.patient), "by the expression"

    # A folder for each case may lie above a session's, or below a site's.
    places = [place_of(entry.file) for entry in files]
    depth, by_name = case_depth(places)
    if cfg.patient == "folder":
        keys = ["/".join(folders[:depth]) if depth else "/".join(folders) for folders, _ in places]
        return [key or "." for key in keys], "by their folders"

    # Then each file by the first rule that knows it.
    patients, rules = [], {}
    for entry, (folders, stem) in zip(files, places):
        subject = SUBJECT.search(entry.file)
        if entry.patient is not None:
            rule, patient = "by the datalist's keys", f"key {entry.patient}"
        elif subject:
            rule, patient = "by the sub- of BIDS", subject.group(1)
        elif depth and len(folders) >= depth:
            rule, patient = "by their folders", "/".join(folders[:depth])
        elif by_name:
            rule, patient = "by names that repeat in several folders", f"name {stem}"
        else:
            rule, patient = "each file a patient of its own", entry.file
        rules[rule] = rules.get(rule, 0) + 1
        patients.append(patient)
    if len(rules) == 1:
        return patients, next(iter(rules))
    return patients, ", ".join(f"{count} {rule}" for rule, count in rules.items())


def by_expression(files: Sequence[Entry], expression: str) -> list[str]:
    """The group of a regular expression, searched in each file's name, else in its path."""
    found = [re.search(expression, entry.file) or re.search(expression, str(entry.path)) for entry in files]
    lacking = [entry for entry, match in zip(files, found) if match is None or match.group(1) is None]
    if lacking:
        raise DataError(f"data.patient={expression!r} finds no patient in {len(lacking)} of {len(files)} "
                        f"files, first in {show(lacking[0].file)}; change it so that it matches all names, "
                        f"or use auto, file or folder")
    return [match.group(1) for match in found]


def place_of(name: str) -> tuple[tuple[str, ...], str]:
    """Folders and own name of a file, without folders such as images/."""
    *folders, stem = name.split("/")
    return tuple(folder for folder in folders if folder.lower() not in HOMES), stem


def case_depth(places: Sequence[tuple[tuple[str, ...], str]]) -> tuple[int | None, bool]:
    """How many folders make the name of a case, None where folders are no cases; and whether own names that
    repeat in several folders tell patients instead.

    Folders of cases look alike inside: t1 and t2 in each, or s0_t1 in s0 and s1_t1 in s1.
    """
    for depth in range(1, 1 + max(len(folders) for folders, _ in places)):
        groups: dict[tuple[str, ...], list[str]] = {}
        for folders, stem in places:
            if len(folders) >= depth:
                below = [re.sub(r"\d+", "#", folder) for folder in folders[depth:]]
                name = "/".join([*below, stem.replace(folders[depth - 1], "")])
                groups.setdefault(folders[:depth], []).append(name)
        if len(groups) < 2 or not look_alike(list(groups.values())):
            continue

        # They look alike; but a few folders of many numbered files, or of one kind of image, are no cases.
        lasts = [key[-1] for key in groups]
        is_deepest = max(len(folders) for folders, _ in places) == depth
        if most(lasts, SESSION.match):
            return (depth - 1, False) if depth > 1 else (None, is_deepest)
        has_digits = most(lasts, re.compile(r"\d").search)
        if not has_digits or most(lasts, OF_MANY.match) or is_numbered(list(groups.values())):
            if is_deepest:
                # Folders such as smith and jones are cases where the names in them are of no patient: one
                # for all, or t1, t2, ct.
                names = sorted({stem for _, stem in places})
                is_of_images = len(names) == 1 or most(names, OF_MANY.match)
                is_of_many = most(lasts, OF_MANY.match) or is_numbered(list(groups.values()))
                return (depth, False) if is_of_images and not is_of_many else (None, True)
            continue
        return depth, False
    return None, False


def look_alike(groups: Sequence[Sequence[str]]) -> bool:
    """Whether the names in a group are, for the most part, those of other groups."""
    count: dict[str, int] = {}
    for names in groups:
        for name in set(names):
            count[name] = count.get(name, 0) + 1
    shares = [np.mean([count[name] > 1 for name in set(names)]) for names in groups]
    return float(np.mean(shares)) >= COMMON


def is_numbered(groups: Sequence[Sequence[str]]) -> bool:
    """Whether there are fewer groups than files in one, whose names differ by numbers for the most part."""
    files = median(len(names) for names in groups)
    kinds = median(len({re.sub(r"\d+", "#", name) for name in names}) for names in groups)
    return 2 * kinds <= files and len(groups) < files


def most(names: Sequence[str], test) -> bool:
    return 2 * sum(test(name) is not None for name in names) > len(names)


# ---------------------------------------------------------------------------------------------- the split
def split(files: Groups, cfg: DataConfig, seed: int, say: Say) -> tuple[Groups, Groups]:
    """Files to train on, and those of the patients that are held out, at least one. seed: of the run."""
    seed = seed if cfg.split_seed is None else cfg.split_seed
    if any(group[0].fold is not None for group in files):
        return split_by_keys(files, cfg, say)
    if len(files) == 1:
        only = files[0][0]
        say(f"data: one usable file only, {show(only.path or only.name)}: it serves for training and "
            f"validation, so validation says nothing about other volumes")
        return files, files

    # Patients in the order of their first files.
    patients = list(dict.fromkeys(patient_of(group) for group in files))
    if len(patients) == 1:
        say("data: one patient only, so files of that patient are held out and validation says nothing about "
            "other patients; data.patient says how patients are found")
        patients = [group[0].name for group in files]
        held_out_of = [group[0].name for group in files]
    else:
        held_out_of = [patient_of(group) for group in files]
    order = seeded(seed, "split").permutation(len(patients)).tolist()
    if cfg.fold is None:
        count = min(len(patients) - 1, max(1, round(cfg.val_fraction * len(patients))))
        chosen = order[:count]
    else:
        number, folds = cfg.fold_numbers()
        if folds is None:
            raise DataError(f"data.fold={cfg.fold}: no file has a `fold` in a datalist; give K/N, such as "
                            f"{cfg.fold}/5")
        if folds > len(patients):
            raise DataError(f"data.fold={cfg.fold}: there are {len(patients)} patients; use "
                            f"{len(patients)} folds at most")
        chosen = order[number::folds]
    held_out = {patients[i] for i in chosen}
    return ([group for group, key in zip(files, held_out_of) if key not in held_out],
            [group for group, key in zip(files, held_out_of) if key in held_out])


def split_by_keys(files: Groups, cfg: DataConfig, say: Say) -> tuple[Groups, Groups]:
    """By the `fold` keys of a datalist: one fold is held out, the first unless data.fold names another."""
    known = sorted({group[0].fold for group in files if group[0].fold is not None})
    number, folds = known[0], None
    if cfg.fold is not None:
        number, folds = cfg.fold_numbers()
    if number not in known or folds not in (None, len(known)):
        raise DataError(f"{show(cfg.path)}: data.fold={cfg.fold}, but its `fold` keys are "
                        f"{', '.join(map(str, known))}; name one of them")
    training = [group for group in files if group[0].fold != number]
    held_out = [group for group in files if group[0].fold == number]
    if not training:
        raise DataError(f"{show(cfg.path)}: all files are of fold {number}, which is held out; give the "
                        f"others another `fold`")
    say(f"data: fold {number} of the datalist's {len(known)} is held out (data.fold)")
    return training, held_out


def patient_of(group: Sequence[Entry]) -> str:
    first = group[0]
    return first.patient or first.file or first.name


def tell_shared(training: Groups, held_out: Groups, is_listed: bool, say: Say) -> None:
    """A line for files, and one for patients, that are in both training and validation. is_listed: a datalist
    says who is held out; else whole patients are, as far as there are several.

    The same file is the same place, whatever way leads there; the same bytes; or one name with two endings,
    such as p.nii and p.nii.gz.
    """
    def marks(group: Sequence[Entry]) -> set[tuple]:
        first = group[0]
        if first.path is None:
            return {("name", first.name)}
        known = {("place", os.path.realpath(first.path)),
                 ("name", os.path.dirname(os.path.realpath(first.path)), first.file.rsplit("/", 1)[-1])}
        return known | {("bytes", first.digest)} if first.digest else known

    seen = set().union(*(marks(group) for group in training))
    shared = [group[0] for group in held_out if marks(group) & seen]
    if shared:
        are = "file is" if len(shared) == 1 else "files are"
        say(f"data: {len(shared)} {are} in both training and validation, "
            f"{show(shared[0].path or shared[0].name)} for one; validation is no test of them: leave them "
            f"out of one of the two")
    trained, seen = ({patient_of(group) for group in groups} for groups in (training, held_out))
    patients = trained & seen
    if is_listed and patients and len(patients) > len({patient_of([entry]) for entry in shared}):
        are = "patient is" if len(patients) == 1 else "patients are"
        say(f"data: {len(patients)} {are} in both training and validation, {show(min(patients))} for one; "
            f"validation is no test of other patients (data.patient={{auto,file,folder,expression}})")


# ---------------------------------------------------------------------------------------------- validation
def in_turn(entries: Sequence[Entry], seed: int, count: int) -> list[Entry]:
    """The entries of `count` validation crops: the patients in turn, of each its files in turn, of each its
    volumes; so that a 4-D file of 200 volumes counts as one.
    """
    # First whose volumes they are: patient -> file -> volumes.
    tree: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        files = tree.setdefault(patient_of([entry]), {})
        files.setdefault(entry.path or entry.name, []).append(entry)
    patients = [list(files.values()) for files in tree.values()]

    # Then the turns, in an order of the seed's.
    order = seeded(seed, "val order").permutation(len(patients))
    chosen = []
    for k in range(count):
        number, turn = int(order[k % len(order)]), k // len(order)
        files = patients[number]
        volumes = in_its_turn(files, turn, seeded(seed, "val files", number))
        chosen.append(in_its_turn(volumes, turn // len(files), seeded(seed, "val volumes", number)))
    return chosen


def in_its_turn(things: Sequence, turn: int, generator: np.random.Generator):
    """Each of them comes once in as many turns as there are, in an order of the generator's."""
    return things[generator.permutation(len(things))[turn % len(things)]]
