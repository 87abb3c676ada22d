"""Run a function on several ranks, each a process, and return their results."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from . import worker
from .mpirun import Mpirun
from .pickled import pickled_call
from .rewriting import rewritten_modules

__all__ = ["RankError", "run_ranks"]

Result = TypeVar("Result")

STACKS = 3.0  # seconds for all ranks to write where they are, after the first one has
GRACE = 20.0  # seconds after the timeout before a rank that has not ended is killed
PRELOADED = [  # imported once for all ranks: syncnorm and torch, what every optimizer imports late, the test runner
    worker.__name__,
    "torch._dynamo",
    *({"pytest"} & sys.modules.keys()),
]


class RankError(RuntimeError):
    """A rank of `run_ranks` ended without a result. The message says which rank, how it ended, and where it was."""


def run_ranks(
    fn: Callable[..., Result], world_size: int, *args: Any, backend: str = "gloo", timeout: float = 60
) -> list[Result]:
    """Call `fn(*args)` on `world_size` new processes that form a group, and return their results by rank.

    In each process `syncnorm.communicator()` returns the group. With "gloo" and "nccl" it is torch.distributed's
    default group. With "mpi" the processes are started by `mpirun`. The cores are divided equally among the ranks.

    Args:
        fn: the function to call on every rank. It must be importable, so it cannot be a lambda or a local function. A
            script must call run_ranks under `if __name__ == "__main__":`, because the ranks import the script. In a
            notebook or another interactive session, `cloudpickle` sends it by value if it is installed.
        world_size: the number of ranks.
        *args: picklable arguments. Each rank gets its own copy.
        backend: "gloo", "nccl" (CUDA devices are assigned round-robin) or "mpi".
        timeout: seconds after which a rank is ended.

    Raises:
        Exception: the exception of the first rank that failed. Its cause is a `RankError` with the rank's traceback.
        RankError: a rank died or was still running at the timeout. The message has the stack of each such rank.
        ValueError: `world_size` is less than one, or the backend is unknown.
        RuntimeError: mpirun is missing for "mpi", a CUDA device for "nccl", or cloudpickle in an interactive session.
    """
    __tracebackhide__ = True  # for pytest
    if world_size < 1:
        raise ValueError(f"expected at least one rank, got world_size={world_size}")
    if backend not in ("gloo", "nccl", "mpi"):
        raise ValueError(f'expected backend "gloo", "nccl" or "mpi", got {backend!r}')
    if backend == "nccl" and not torch.cuda.is_available():
        raise RuntimeError('expected a CUDA device for backend="nccl", got none: use "gloo"')
    with tempfile.TemporaryDirectory(prefix="syncnorm-ranks-") as name:
        directory = Path(name)
        call = pickled_call(fn, args)
        job = worker.Job(call, rewritten_modules(), backend, world_size, timeout, dict(os.environ))
        (directory / "job").write_bytes(pickle.dumps(job))
        processes = _start(directory, world_size, backend)
        deadline = time.monotonic() + timeout + GRACE
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                if any(process.exitcode for process in processes):  # the others may wait forever for it
                    if not any(stack.stat().st_size for stack in directory.glob("stack*")):
                        break
                    deadline = min(deadline, time.monotonic() + STACKS)  # at the timeout they write theirs, too
                time.sleep(0.005)
        finally:
            for process in processes:
                process.stop()
        outcomes = [worker.read_outcome(directory, rank) for rank in range(world_size)]
        stacks = [path.stat() for path in directory.glob("stack*")]
        timed_out = min((stack.st_mtime for stack in stacks if stack.st_size), default=math.inf)
        for rank, outcome in sorted(enumerate(outcomes), key=lambda item: item[1].time if item[1] else 0.0):
            if outcome is not None and outcome.error is not None and outcome.time <= timed_out:
                raise outcome.error from RankError(f"rank {rank} of {world_size} raised:\n{outcome.traceback}")
        if None in outcomes or timed_out < math.inf:
            raise RankError(_describe(directory, processes, outcomes, timeout))
        return [outcome.result for outcome in outcomes if outcome is not None]


class _Process(Protocol):
    """A started process: one rank, or an mpirun with all ranks."""

    name: str

    @property
    def exitcode(self) -> int | None: ...
    def is_alive(self) -> bool: ...
    def stop(self) -> None: ...


class _Forked:
    """One rank, forked from a server process that has already imported torch."""

    def __init__(self, context: Any, directory: Path, rank: int):
        self.name = f"rank {rank}"
        self.process = context.Process(target=worker.main, args=(directory, rank), daemon=True)
        self.process.start()

    @property
    def exitcode(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def is_alive(self) -> bool:
        return bool(self.process.is_alive())

    def stop(self) -> None:
        if self.is_alive():
            self.process.kill()
        self.process.join()


def _start(directory: Path, world_size: int, backend: str) -> list[_Process]:
    if backend == "mpi":
        return [Mpirun(directory, world_size)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return [_Forked(context, directory, rank) for rank in range(world_size)]


def _describe(
    directory: Path, processes: list[_Process], outcomes: Iterable[worker.Outcome | None], timeout: float
) -> str:
    lines = []
    for rank, outcome in enumerate(outcomes):
        stack = directory / f"stack{rank}"
        if outcome is not None and outcome.error is not None:
            lines.append(f"rank {rank}: raised, after another rank was ended:\n{outcome.traceback}")
        elif outcome is not None:
            lines.append(f"rank {rank}: returned")
        elif stack.exists() and stack.stat().st_size:
            lines.append(f"rank {rank}: still running after {timeout:g} s, at\n{stack.read_text()}")
        else:
            lines.append(f"rank {rank}: ended without a result")
    for process in processes:
        if process.exitcode:
            lines.append(f"{process.name}: {_exit_status(process.exitcode)}")
    return "expected a result from every rank, got\n" + "\n".join(lines)


def _exit_status(code: int) -> str:
    return f"exit status {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
