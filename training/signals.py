"""How a run ends before its time: by an error that it cannot go on from, or by SIGINT, SIGTERM or SIGUSR1.

A training run goes on to the end of its optimizer step, saves its state and ends (`caught_signals`). What
writes files whole or not at all ends at once (`stopped_by_signals`). A second signal ends either without a
word. Version 0.3 (2026-11).
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

from training import ranks
from training.console import tell

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}
# Seconds after which a signal is a second one. Sooner it is the first again: `timeout` sends that twice.
SECOND_SIGNAL = 1.0


class RunStopped(RuntimeError):
    """The run cannot go on; its state is kept. The message is one line."""


class Stopped(BaseException):
    """Stopped by a signal, whose number it holds. No `except Exception` takes it."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 raise Stopped, at once: for what writes files whole or not at all.

    A second one, after SECOND_SIGNAL seconds, ends the process without a word.
    """
    first: float | None = None                                   # when the first one came

    def stop(number, _):
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise Stopped(number)
        if time.monotonic() - first >= SECOND_SIGNAL:
            os._exit(SIGNALS[number])

    before = handled_by(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def handled_by(handler) -> dict:
    """Have the signals handled so. Returns the handlers from before; none outside of the main thread.

    Python lets only the main thread set handlers, and only the main thread is signalled.
    """
    try:
        return {number: signal.signal(number, handler) for number in SIGNALS}
    except ValueError:
        return {}


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT, SIGTERM and SIGUSR1, so that the loop ends after the step at hand.

    A second one, after SECOND_SIGNAL seconds, ends the process at once. A thread waits for that one, since
    handlers run in the main thread, between Python's instructions, so not in the middle of a backward().
    Python tells the thread through a pipe, into which it writes the number of each signal.
    """
    received: list[int] = []
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        first = None                                             # when the first one came
        while True:
            number = os.read(read, 1)[0]
            if number == 0:                                      # the end, see below
                return
            if number not in SIGNALS:                            # SIGCHLD of a DataLoader worker
                continue
            name = signal.Signals(number).name
            if first is None:
                first = time.monotonic()
                # Of several ranks only the first saves, and this may be another.
                saved = ", with the state saved" if ranks.world() == 1 else ""
                tell(f"{name}: ending after the step at hand{saved}; another one ends at once")
            elif time.monotonic() - first >= SECOND_SIGNAL:
                end_at_once(number)

    # First the handlers and the thread that watches.
    before = handled_by(lambda number, _: received.append(number))
    watcher = threading.Thread(target=watch, daemon=True)
    if before:
        woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        watcher.start()

    # Then the run, and all as it was. The thread ends by a zero: it would not notice that the pipe is
    # closed, since DataLoader workers may hold the pipe open too.
    try:
        yield received
    finally:
        if before:
            signal.set_wakeup_fd(woken)
            os.write(write, b"\0")
            watcher.join()
        os.close(read)
        os.close(write)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once(number: int) -> None:
    """End the process without another word than this one."""
    # Workers first: they would tell how they lost this process.
    for worker in multiprocessing.active_children():
        worker.kill()
    name = signal.Signals(number).name
    text = f"train.py: {name} again: ended at once, the last checkpoint stays as it is\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
    os._exit(SIGNALS[number])
