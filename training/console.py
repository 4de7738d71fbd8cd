"""What a run says on the console, in single lines. Version 0.3 (2026-11)."""
from __future__ import annotations

import math
import os
import sys

from volumes.files import one_line


def line_of(error: object) -> str:
    """Its message as one line; of what a DataLoader's worker raised, the last line of its traceback, which is
    the message.
    """
    text = str(error)
    if "in DataLoader worker process" in text:
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return one_line(text, 1000) or type(error).__name__


def tell(text: str, end: str = "\n") -> None:
    """To the console. A reader that is gone (Ctrl-C ends the `tee` behind it too) stops no run: log.jsonl has
    it all.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def shown(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


def unit_of(figure: str) -> str:
    """What stands behind its number."""
    return " dB" if figure == "psnr" else ""


def clear_line() -> None:
    """Of a line that is written over again and again; nothing in a pipe."""
    if sys.stdout.isatty():
        print("\r\x1b[K", end="")


def short_number(value: float) -> str:
    """232000 -> 232 k."""
    power = max(0, min(3, int(math.log10(max(value, 1)) // 3)))
    return f"{value / 1000 ** power:.3g} {('', 'k', 'M', 'G')[power]}".strip()
