"""What this project wrote itself, recognised among the files of a data folder: run folders, results of
predict.py and latents. They are no data: a run that is resumed would train on what it drew. Version 1.0.

Only what lies below the folder that is searched is left out: who names a folder of results wants them.
"""
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from volumes.files import bare_name, show

PREDICTIONS = ".predict.jsonl"   # of predict.py, in an output folder: a row for each file that is written
LATENT = "_latent.npz"           # ending of what predict.py encode writes
IN_LATENT = {"about", "low", "high"}  # arrays that each of these has, besides others
# A run folder has two of them.
OF_A_RUN = {"config.yaml", "log.jsonl", "last.pt", "last.prev.pt", "best.pt"}
SAMPLES = "samples"              # of a run folder: pictures and volumes
SHOWN = 3                        # names in a line
MAX_RECORD = 2**28               # bytes of a file of rows


def is_run_folder(names: Iterable[str]) -> bool:
    """Whether a folder that holds files of these names is that of a run of train.py."""
    return len(OF_A_RUN.intersection(names)) >= 2


def results_of(folder: str | os.PathLike) -> set[str]:
    """The files that predict.py's record in a folder says were written there: their real paths."""
    found: set[str] = set()
    record = Path(folder, PREDICTIONS)
    try:
        if os.path.getsize(record) > MAX_RECORD:
            return found
        lines = record.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            path = os.path.realpath(Path(folder, json.loads(line)["output"]))
        except (ValueError, KeyError, TypeError, RecursionError):  # a line that was cut
            continue
        name = os.path.basename(path)
        found |= {path, os.path.join(os.path.dirname(path), bare_name(name) + "_viz.png")}
    return found


def is_latent(path: str | os.PathLike) -> bool:
    """Whether a file is what predict.py encode writes, by its ending and the arrays in it.

    True also of one of that ending that cannot be opened.
    """
    if not os.fspath(path).endswith(LATENT):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()} >= IN_LATENT
    except Exception:  # a damaged archive may raise anything
        return True


class Own:
    """What is left out of a folder as it is searched, from its root downwards."""
    def __init__(self, root: Path):
        self.root = os.path.realpath(root)
        self.runs: list[str] = []
        self.files: list[str] = []
        self.latents: list[str] = []
        self.results: set[str] = set()   # real paths that records name
        self.of_root: str | None = None  # the samples of a run whose folder is the root itself

    def is_of_run(self, folder: str, names: Sequence[str]) -> bool:
        """Whether a folder is a run's, to be left with all that is below; reads the record that may be in it.

        names: of its files.
        """
        real = os.path.realpath(folder)
        if real == self.root:
            if is_run_folder(names):
                self.of_root = os.path.join(real, SAMPLES)
            return False
        if is_run_folder(names) or real == self.of_root:
            self.runs.append(folder)
            return True
        if PREDICTIONS in names:
            self.results |= results_of(folder)
        return False

    def takes(self, path: Path) -> bool:
        """Whether a file is left out."""
        if is_latent(path):
            self.latents.append(str(path))
        elif self.results and os.path.realpath(path) in self.results:
            self.files.append(str(path))
        else:
            return False
        return True

    def tell(self, say: Callable[[str], object]) -> None:
        """One line about all of them."""
        parts = []
        for paths, one, many in ((self.runs, "run folder", "run folders"),
                                 (self.files, "result of predict.py", "results of predict.py"),
                                 (self.latents, "latent", "latents")):
            if paths:
                what = one if len(paths) == 1 else many
                names = ", ".join(show(os.path.relpath(path, self.root)) for path in sorted(paths)[:SHOWN])
                more = ", ..." if len(paths) > SHOWN else ""
                parts.append(f"{len(paths)} {what} ({names}{more})")
        if parts:
            say(f"data: left out what was written by this project: {', '.join(parts)}; a folder of them that "
                f"is named itself is used")
