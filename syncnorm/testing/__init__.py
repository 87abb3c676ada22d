"""Tools for distributed tests: run a function on ranks that are real processes, and count collectives."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..communicators import Communicator, ProcessGroupLike, communicator, uncounted
from ..job.launcher import RENDEZVOUS
from . import worker

__all__ = ["Call", "CountingCommunicator", "RankError", "TimedCommunicator", "run_ranks"]

GRACE = 5.0  # seconds beyond the timeout after which a rank that did not end itself is killed
MPI_RANK = f"from {__name__} import worker; worker.main_under_mpirun()"
PRELOADED = [  # what every rank would import: torch with us, what its backward imports late, and the test runner
    worker.__name__,
    "torch.fx.experimental.symbolic_shapes",
    *({"pytest"} & sys.modules.keys()),
]
MPIRUN_ENVIRONMENT = {  # as root, and with more ranks than cores, on Open MPI 4 and 5 and on Intel MPI
    "I_MPI_PIN": "0",
    "I_MPI_WAIT_MODE": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


class RankError(RuntimeError):
    """A rank of `run_ranks` ended without a result; the text says which, how, and where it was."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout: float = 60
) -> list[Any]:
    """Call `fn(*args)` on `world_size` new processes that form a group, and return their results by rank.

    In each process `syncnorm.communicator()` is the group. With "gloo" and "nccl" it is torch.distributed's default
    group; with "mpi" the processes are started by `mpirun`. They compute with an equal share of the cores.

    Args:
        fn: a function that can be imported, so no lambda or local function; called on every rank. A script that calls
            run_ranks does so under `if __name__ == "__main__":`, since ranks import the script.
        world_size: number of ranks.
        *args: picklable; each rank gets a copy of its own.
        backend: "gloo", "nccl" (ranks take CUDA devices by turns) or "mpi".
        timeout: seconds from the start of a rank until it is ended.

    Raises:
        Exception: what the first failing rank raised; its cause is a `RankError` with the rank and its traceback.
        RankError: a rank died, or stood still until the timeout; with the stack of each rank that did.
        ValueError: no ranks, or another backend than these.
        RuntimeError: the backend is "mpi" and there is no mpirun, or "nccl" and there is no CUDA device.
    """
    if world_size < 1:
        raise ValueError(f"expected at least one rank, got world_size={world_size}")
    if backend not in ("gloo", "nccl", "mpi"):
        raise ValueError(f'expected backend "gloo", "nccl" or "mpi", got {backend!r}')
    if backend == "nccl" and not torch.cuda.is_available():
        raise RuntimeError("nccl was asked for, and there is no CUDA device")
    with tempfile.TemporaryDirectory(prefix="syncnorm-ranks-") as name:
        directory = Path(name)
        job = worker.Job(fn, args, backend, world_size, timeout, dict(os.environ))
        (directory / "job").write_bytes(pickle.dumps(job))
        processes = _start(directory, world_size, backend)
        deadline = time.monotonic() + timeout + GRACE
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                if any(process.exitcode for process in processes):
                    break  # one failed: the others may wait for it for ever
                time.sleep(0.005)
        finally:
            for process in processes:
                process.stop()
        outcomes = [worker.read_outcome(directory, rank) for rank in range(world_size)]
        for rank, outcome in sorted(enumerate(outcomes), key=lambda item: item[1].time if item[1] else 0.0):
            if outcome is not None and outcome.error is not None:
                raise outcome.error from RankError(f"rank {rank} of {world_size} raised:\n{outcome.traceback}")
        if None in outcomes:
            raise RankError(_describe(directory, processes, outcomes, timeout))
        return [outcome.result for outcome in outcomes if outcome is not None]


class _Process(Protocol):
    """A started process, be it one rank or an mpirun with all of them."""

    name: str

    @property
    def exitcode(self) -> int | None: ...
    def is_alive(self) -> bool: ...
    def stop(self) -> None: ...


class _Forked:
    """One rank, forked from a server process that has imported torch already."""

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


class _Mpirun:
    """An mpirun and, through it, its ranks; what they print is shown when they ended."""

    name = "mpirun"

    def __init__(self, directory: Path, world_size: int):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        mpirun = shutil.which("mpirun", path=path)
        if mpirun is None:
            raise RuntimeError("backend mpi was asked for, and there is no mpirun: pip install 'syncnorm[mpi]'")
        preparation = get_preparation_data("rank")  # how multiprocessing lets a child import what its parent can
        preparation.pop("authkey")  # not for files
        (directory / "preparation").write_bytes(pickle.dumps(preparation))
        self.output = (directory / "output").open("w+")
        self.process = subprocess.Popen(
            [mpirun, "-n", str(world_size), sys.executable, "-c", MPI_RANK, str(directory)],
            env=mpirun_environment() | {"PATH": path},  # Intel's mpirun looks for its mpiexec there
            cwd=Path(__file__).parents[2],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()

    def is_alive(self) -> bool:
        return self.exitcode is None

    def stop(self) -> None:
        if self.is_alive():
            self.process.terminate()  # mpirun ends its ranks
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.output.seek(0)
        sys.stdout.write(self.output.read())
        self.output.close()


def _start(directory: Path, world_size: int, backend: str) -> list[_Process]:
    if backend == "mpi":
        return [_Mpirun(directory, world_size)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return [_Forked(context, directory, rank) for rank in range(world_size)]


def mpirun_environment() -> dict[str, str]:
    """Return this process's environment for an mpirun: as root, with more ranks than cores, inside another mpirun."""
    of_another_job = (
        *("OMPI_", "PMIX_", "PRTE_", "PMI_", "MPI_LOCAL", "HYDI_", "HYDRA_"),
        *("SYNCNORM_JOB_ID", "TORCHELASTIC_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *RENDEZVOUS),
    )
    return {k: v for k, v in os.environ.items() if not k.startswith(of_another_job)} | MPIRUN_ENVIRONMENT


def _describe(
    directory: Path, processes: list[_Process], outcomes: Iterable[worker.Outcome | None], timeout: float
) -> str:
    lines = []
    for rank, outcome in enumerate(outcomes):
        stack = directory / f"stack{rank}"
        if outcome is not None:
            lines.append(f"rank {rank}: returned")
        elif stack.exists() and stack.stat().st_size:
            lines.append(f"rank {rank}: still running after {timeout:g} s, at\n{stack.read_text()}")
        else:
            lines.append(f"rank {rank}: ended without a result")
    for process in processes:
        if process.exitcode:
            lines.append(f"{process.name}: {_exit_status(process.exitcode)}")
    return "expected a result of every rank, got\n" + "\n".join(lines)


def _exit_status(code: int) -> str:
    return f"exit status {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"


class Call(NamedTuple):
    """One collective: its name and the bytes of the tensor that this rank gave (0 for objects and barriers)."""

    name: str
    nbytes: int


class CountingCommunicator:
    """A communicator that passes every collective on and notes it in `calls`.

    The group that `split` returns is another CountingCommunicator, with `calls` of its own.

    Args:
        process_group: whose rank, size and collectives it has, as in `syncnorm.communicator`.
    """

    def __init__(self, process_group: ProcessGroupLike = None):
        self.communicator = communicator(process_group)
        self.calls: list[Call] = []

    @property
    def uncounted(self) -> Communicator:
        """The communicator below, for what a layer sends once and not at each step."""
        return uncounted(self.communicator)

    @property
    def rank(self) -> int:
        """The rank of the communicator below."""
        return self.communicator.rank

    @property
    def size(self) -> int:
        """The size of the communicator below."""
        return self.communicator.size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Note and pass on."""
        self._note("all_reduce", tensor)
        return self.communicator.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Note and pass on."""
        self._note("broadcast", tensor)
        return self.communicator.broadcast(tensor, root)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Note and pass on."""
        self._note("all_gather", tensor)
        return self.communicator.all_gather(tensor)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Note and pass on."""
        self._note("all_gather_object")
        return self.communicator.all_gather_object(obj)

    def barrier(self) -> None:
        """Note and pass on."""
        self._note("barrier")
        self.communicator.barrier()

    def split(self, block: int) -> CountingCommunicator:
        """Note, pass on, and count what the new group calls on its own. TypeError: the communicator below has none."""
        if not callable(getattr(self.communicator, "split", None)):
            raise TypeError(f"expected a communicator that defines split(block), got {self.communicator!r}: add it")
        self._note("split")
        return CountingCommunicator(self.communicator.split(block))

    def _note(self, name: str, tensor: Tensor | None = None) -> None:
        self.calls.append(Call(name, 0 if tensor is None else tensor.numel() * tensor.element_size()))


class TimedCommunicator(CountingCommunicator):
    """A CountingCommunicator that also times its all-reduces. The wait for the slowest rank is part of their time.

    On a GPU the times are those of CUDA events. Nothing waits for the device until `seconds` is called. A group that
    `split` returns is counted and not timed.

    Args:
        process_group: whose rank, size and collectives it has, as in `syncnorm.communicator`.
    """

    def __init__(self, process_group: ProcessGroupLike = None):
        super().__init__(process_group)
        self._spans: list[tuple[Any, Any]] = []  # start and end of each call: seconds, or CUDA events

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Note, time and pass on."""
        stop = self.start("all_reduce", tensor)
        result = self.communicator.all_reduce(tensor)
        stop()
        return result

    def start(self, name: str, tensor: Tensor) -> Callable[[], None]:
        """Note a collective on `tensor` that the caller issues itself, and start to time it.

        A communication hook of DistributedDataParallel can time its all-reduces by it.

        Returns:
            A function without arguments that stops the time. Call it when the collective has completed.
        """
        self._note(name, tensor)
        begin = _now(tensor)

        def stop() -> None:
            self._spans.append((begin, _now(tensor)))

        return stop

    def seconds(self) -> float:
        """Return the time of all that was timed. Waits for the device if that is a GPU."""
        return sum((_seconds_between(begin, end) for begin, end in self._spans), 0.0)

    def clear(self) -> None:
        """Forget all calls and times so far."""
        self.calls.clear()
        self._spans.clear()


def _now(tensor: Tensor) -> Any:
    """Return the time in seconds, or an event that the tensor's CUDA device records when it comes to it."""
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def _seconds_between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
