"""One rank of `syncnorm.testing.run_ranks`: reads its job from a directory, joins the group, writes its outcome."""

from __future__ import annotations

import faulthandler
import functools
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..job.init import init
from .rewriting import rewrite


@dataclass(frozen=True)
class Job:
    """What to call on every rank, and the settings of the group.

    Attributes:
        call: the pickled function and its arguments.
        rewritten: the modules whose asserts pytest rewrites.
    """

    call: bytes
    rewritten: list[str]
    backend: str
    world_size: int
    timeout: float
    environment: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """The result of a rank, or its error and traceback, and the time."""

    result: Any
    error: Exception | None
    traceback: str
    time: float


def read_outcome(directory: Path, rank: int) -> Outcome | None:
    """Return the outcome of a rank, or None if it wrote none."""
    path = directory / f"outcome{rank}"
    outcome: Outcome | None = pickle.loads(path.read_bytes()) if path.exists() else None
    return outcome


def main(directory: Path, rank: int) -> None:
    """Run the job in `directory` as `rank`. At the timeout, the rank writes its stack and exits."""
    with (directory / f"stack{rank}").open("w") as stack:
        job = _read_job(directory)
        try:
            faulthandler.dump_traceback_later(job.timeout, exit=True, file=stack)
            call = _load(job)
            faulthandler.dump_traceback_later(job.timeout, exit=True, file=stack)  # imports are not part of the time
            outcome = pickle.dumps(Outcome(_run(directory, rank, job, call), None, "", time.time()))
            failed = False
        except Exception as error:
            outcome = pickle.dumps(Outcome(None, _picklable(error), traceback.format_exc(), time.time()))
            failed = True
        temporary = directory / f"unfinished{rank}"
        temporary.write_bytes(outcome)
        temporary.rename(directory / f"outcome{rank}")
        faulthandler.cancel_dump_traceback_later()
    if failed:
        sys.exit(1)


def _read_job(directory: Path) -> Job:
    job: Job = pickle.loads((directory / "job").read_bytes())
    return job


def _load(job: Job) -> Callable[[], Any]:
    """Import the function, and return what calls it."""
    rewrite(job.rewritten)
    fn, args = pickle.loads(job.call)
    return functools.partial(fn, *args)


def _run(directory: Path, rank: int, job: Job, call: Callable[[], Any]) -> Any:
    """Join the group, make the call, and leave the group."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job.world_size))
    limit = timedelta(seconds=job.timeout)
    if job.backend == "mpi":
        init("mpi", limit)
        return call()
    os.environ.clear()
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo"} | job.environment)  # all ranks are on this machine
    if job.backend == "nccl":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        job.backend,
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=job.world_size,
        timeout=limit,
    )
    dist.barrier()  # a rank that ends while others still connect would break their connections
    result = call()
    dist.destroy_process_group()
    return result


def _picklable(error: Exception) -> Exception:
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
        return copy
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def main_under_mpirun() -> None:
    """Run the job in the directory given on the command line, as the rank that MPI assigned."""
    from ..mpi.library import MPI

    directory = Path(sys.argv[1])
    spawn.prepare(pickle.loads((directory / "preparation").read_bytes()))
    try:
        main(directory, MPI.COMM_WORLD.rank)
    except SystemExit:
        MPI.COMM_WORLD.Abort(1)
