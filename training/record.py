"""What made each file of an output folder: OUTPUT/.predict.jsonl, a row as each is done.

An output counts as done where its row says that it is of this input, this checkpoint and these flags. The
last row of a file counts; rows are appended, so that several processes may share the folder. Version 0.1
(2026-11).
"""
from __future__ import annotations

import json
import os
from pathlib import Path

from volumes.files import digest_of
from volumes.find import Item
from volumes.own import PREDICTIONS

NAME = PREDICTIONS


class Record:
    """The rows of one output folder. made_by: text that differs where results would."""
    def __init__(self, folder: Path, made_by: str):
        self.path, self.made_by = folder / NAME, made_by
        self.rows: dict[str, dict] = {}       # by the output's path in the folder
        self.digests: dict[Path, str] = {}    # of inputs
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                self.take(line)

    def take(self, line: str) -> None:
        """One row of the file. A line that was cut is none."""
        try:
            row = json.loads(line)
            known = {key: str(row[key]) for key in ("output", "input", "digest", "made_by")}
            self.rows[known["output"]] = known
        except (ValueError, KeyError, TypeError):
            return

    def is_of_another_input(self, name: str, item: Item) -> bool:
        """Whether the output is there, of a file of another place and with other bytes."""
        row = self.rows.get(name)
        if row is None or not (self.path.parent / name).exists():
            return False
        if row["input"] == os.path.realpath(item.path):
            return False
        return row["digest"] != self.digest(item)

    def is_done(self, name: str, item: Item) -> bool:
        row = self.rows.get(name)
        if row is None or row["made_by"] != self.made_by:
            return False
        return row["digest"] == self.digest(item)

    def digest(self, item: Item) -> str:
        """Of the input; empty where it cannot be read, which is told when its turn comes."""
        if item.path not in self.digests:
            try:
                self.digests[item.path] = digest_of(item.files)
            except OSError:
                self.digests[item.path] = ""
        return self.digests[item.path]

    def write(self, name: str, item: Item) -> None:
        row = {"output": name, "input": os.path.realpath(item.path), "digest": self.digest(item),
               "made_by": self.made_by}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
