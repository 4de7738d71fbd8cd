"""What a user should know of the files of a data set, a line for each kind. Version 1.0."""
from collections.abc import Sequence

from volumes.entries import Entry
from volumes.files import Say, show


def counted(number: int, thing: str) -> str:
    """1 file, 2 files."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def tell_guesses(entries: Sequence[Entry], say: Say) -> None:
    """A line for each modality that was guessed. entries: one of each file."""
    guesses: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.guessed:
            guesses.setdefault(entry.intensity.rule, []).append(entry)
    for modality, guessed in guesses.items():
        names = ", ".join(entry.name for entry in guessed[:4])
        more = ", ..." if len(guessed) > 4 else ""
        say(f"data: guessed {modality} from the values of {counted(len(guessed), 'file')} ({names}{more}); "
            f"if that is wrong, set data.modality or a datalist's class")


def tell_notes(entries: Sequence[Entry], say: Say) -> None:
    """A line for each kind of note on files, of the first one. entries: one of each file."""
    noted: dict[str, list[tuple[Entry, str]]] = {}
    for entry in entries:
        for note in entry.notes:
            noted.setdefault(note.kind, []).append((entry, note.text))
    for (entry, text), *others in noted.values():
        more = f" (so too, in their own numbers, {len(others)} more files)" if others else ""
        say(f"data: {show(entry.path)}: {text}{more}")


def tell_scales(entries: Sequence[Entry], say: Say) -> None:
    """A line where voxel grids have a scale each: what is 1 in one of them is less in another."""
    highs = [entry.intensity.high for entry in entries if entry.intensity.modality == "voxel"]
    if len(set(highs)) < 2:
        return
    spread = [(min(channel), max(channel)) for channel in zip(*highs)]
    least, largest = max(spread, key=lambda limits: limits[1] / limits[0])
    one = ",".join(f"{limits[1]:.4g}" for limits in spread)
    say(f"data: each of {len(highs)} voxel grids has its own scale, from {least:.4g} to {largest:.4g}; "
        f"--data.voxel_scale {one} is one for all")
