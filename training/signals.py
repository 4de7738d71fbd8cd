"""How a run ends before its time: by an error that it cannot go on from, or by SIGINT, SIGTERM or SIGUSR1.

A signal ends a run after the step at hand, and what writes files whole or not at all at once; a second signal
ends either without a word.

Version 0.3 (2026-11).
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
# Seconds; what comes sooner is the same one: `timeout` sends it twice.
SECOND_SIGNAL = 1.0


class RunStopped(RuntimeError):
    """The run cannot go on; its state is kept. The message is one line."""


class Stopped(BaseException):
    """By a signal, whose number it holds."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 raise Stopped, at once: for what writes files whole or not at all. A second
    one, after SECOND_SIGNAL seconds, ends the process without a word.
    """
    first: list[float] = []

    def stop(number, _):
        if not first:
            first.append(time.monotonic())
            raise Stopped(number)
        if time.monotonic() - first[0] >= SECOND_SIGNAL:
            os._exit(SIGNALS[number])
    try:
        before = {number: signal.signal(number, stop) for number in SIGNALS}
    except ValueError:                                           # not the main thread: nobody signals it
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT, SIGTERM and SIGUSR1, so that the loop ends after the step at hand. A
    second one, after SECOND_SIGNAL seconds, ends the process at once.

    A thread waits for that one: handlers run in the main thread, between Python's instructions, so not in the
    middle of a backward()."""
    received: list[int] = []
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        first = None
        while number := os.read(read, 1)[0]:
            if number not in SIGNALS:                            # SIGCHLD of a DataLoader worker
                continue
            name = signal.Signals(number).name
            if first is None:
                first = time.monotonic()
                tell(f"{name}: ending after the step at "
                     f"hand{', with the state saved' * (ranks.world() == 1)}; another one ends at once")
            elif time.monotonic() - first >= SECOND_SIGNAL:
                for worker in multiprocessing.active_children():  # they would tell how they lost this process
                    worker.kill()
                with contextlib.suppress(OSError):
                    os.write(
                        2,
                        f"train.py: {name} again: ended at once, the last checkpoint stays "
                        f"as it is\n".encode(),
                    )
                os._exit(SIGNALS[number])
    try:
        before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in SIGNALS}
    except ValueError:                                           # not the main thread: nobody signals it
        before = {}
    watcher = threading.Thread(target=watch, daemon=True)
    if before:
        woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        watcher.start()
    try:
        yield received
    finally:
        if before:
            signal.set_wakeup_fd(woken)
            # The end: workers may hold this pipe too, so closing it is none.
            os.write(write, b"\0")
            watcher.join()
        os.close(read)
        os.close(write)
        for number, handler in before.items():
            signal.signal(number, handler)
