"""Processes that wait for work, for the tests of several ranks: gloo on the CPU."""
from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any


def serve(pipe) -> None:
    """A process that does what it is sent: (variables of its rank, function, arguments). SIGUSR2: where it
    stands, on stderr.
    """
    faulthandler.register(signal.SIGUSR2, sys.__stderr__)
    # As ranks.started does, for ranks that begin without it.
    importlib.import_module("torch.distributed.nn")
    while (job := pipe.recv()) is not None:
        variables, function, arguments = job
        os.environ |= variables
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pool:
    """Each process starts when a test first asks for so many, and stays for those that come after."""

    def __init__(self):
        self.pipes, self.processes, self.hangs = [], [], False

    def grow(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self.processes) < size:
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(theirs,), daemon=True))
            self.processes[-1].start()
            # multiprocessing's own way is SIGTERM, which ranks come to ignore.
            atexit.register(self.processes[-1].kill)

    def begin(self, world: int, function: Callable, *arguments: Any) -> None:
        assert not self.hangs, "a rank hung in an earlier test"
        self.grow(world)
        port = free_port()
        for rank in range(world):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {name: str(value) for name, value in variables.items()}
            self.pipes[rank].send((variables, function, arguments))

    def end(self, ranks: Sequence[int], seconds: float = 120) -> list:
        """What the function returned on each of these ranks. If one takes longer, the test fails and all tell
        where they stand.
        """
        answers = []
        for rank in ranks:
            if not self.pipes[rank].poll(seconds):
                for process in self.processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGUSR2)
                time.sleep(2)
                self.hangs = True
                raise AssertionError(f"rank {rank} hangs")
            answers.append(self.pipes[rank].recv())
        for rank, (fine, result) in zip(ranks, answers):
            assert fine, f"rank {rank}:\n{result}"
        return [result for _, result in answers]

    def __call__(self, world: int, function: Callable, *arguments: Any) -> list:
        self.begin(world, function, *arguments)
        return self.end(range(world))

    def close(self) -> None:
        """Ends the processes; a test after it has new ones. One that does not come to its end fails the test,
        unless it hung before.
        """
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
        for process in self.processes:
            process.join(0 if self.hangs else 30)
        stuck = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
        self.pipes, self.processes = [], []
        assert self.hangs or not stuck, f"ranks {stuck} do not end"
