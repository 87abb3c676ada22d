"""`python -m syncnorm bench comm`: all-reduces by syncnorm against bare ones on the same memory.

Under mpirun the bare one is mpi4py's `Allreduce`, else torch.distributed's on Gloo. A Gloo group of the same ranks sums
in the memory of their host. Messages are what a SyncBatchNorm of C channels sends in forward, 2C + 3 float64, and one
gradient bucket of DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import info
from ..communicators import Communicator, communicator
from ..communicators.segment import MOST_BYTES
from ..job.init import init
from . import copy_baseline, report
from .timing import FULL, QUICK, Candidates, Effort, Timing, interleave

__all__ = ["MESSAGES", "Message", "Row", "Target", "check", "main", "measure"]

COMMUNICATOR = "Communicator"
MPI4PY = "torch on mpi4py"  # torch.distributed
GLOO = "torch on gloo"
SHARED = "shared memory"  # syncnorm's communicator of a Gloo group
COLUMNS = ("message", "all-reduce by", "median µs", "quartiles", "x raw", "µs over raw", "target", "")


class Target(NamedTuple):
    """What a path may cost: a factor (`ratio`) or a time (`extra_us`) over the raw call, or a factor over `of_mpi`."""

    quantity: str
    limit: float

    def __str__(self) -> str:
        return {
            "ratio": f"<= {self.limit:g} x raw",
            "extra_us": f"<= raw + {self.limit:g} µs",
            "of_mpi": f"<= {self.limit:g} x {COMMUNICATOR}",
        }[self.quantity]


class Message(NamedTuple):
    """What is summed, and the targets of the paths."""

    name: str
    elements: int
    dtype: torch.dtype
    targets: dict[str, Target]


STATISTICS = {COMMUNICATOR: Target("ratio", 1.3), MPI4PY: Target("extra_us", 25), SHARED: Target("of_mpi", 1.3)}
MESSAGES = [
    *(Message(f"C = {c}", 2 * c + 3, torch.float64, STATISTICS) for c in (64, 256, 1024, 2048)),
    Message("25 MB bucket", 25 * 2**20 // 4, torch.float32, {MPI4PY: Target("ratio", 1.2)}),
]


class Row(NamedTuple):
    """One path's time for one message, beside that of the raw call, and that of syncnorm's communicator of MPI."""

    message: Message
    path: str
    timing: Timing
    raw: Timing
    mpi: Timing | None = None

    @property
    def noisy(self) -> bool:
        """Whether the machine had other things to do."""
        return self.timing.noisy or self.raw.noisy

    def numbers(self) -> dict[str, Any]:
        """Return the row as it is written to JSON."""
        median, low, high = self.timing.micros()
        over = {"ratio": self.timing.median / self.raw.median, "extra_us": median - 1e6 * self.raw.median}
        if self.mpi is not None:
            over["of_mpi"] = self.timing.median / self.mpi.median
        target = self._target()
        return {
            "message": self.message.name,
            "elements": self.message.elements,
            "dtype": str(self.message.dtype).removeprefix("torch."),
            "path": self.path,
            "median_us": median,
            "quartiles_us": [low, high],
            **over,
            "target": target and target._asdict(),
            "met": target and over[target.quantity] <= target.limit,
            "noisy": self.noisy,
        }

    def _target(self) -> Target | None:
        target = self.message.targets.get(self.path)
        return None if target is not None and target.quantity == "of_mpi" and self.mpi is None else target

    def cells(self) -> list[str]:
        """Return the row as it is printed."""
        n = self.numbers()
        low, high = n["quartiles_us"]
        target = self._target()
        return [
            n["message"],
            n["path"],
            report.digits(n["median_us"]),
            f"{report.digits(low)} to {report.digits(high)}",
            f"{n['ratio']:.2f}",
            report.digits(n["extra_us"]),
            str(target or ""),
            {None: "", True: "met", False: "MISSED"}[n["met"]] + ", noisy" * n["noisy"] * (target is not None),
        ]


def main(files: report.Files, quick: bool = False) -> None:
    """Join the job, measure, print and write on rank 0. Collective on all ranks of the job.

    Raises:
        RuntimeError: this process is alone.
    """
    group = init()
    if group.size == 1:
        raise RuntimeError(
            "expected a group of several ranks, got this process alone: mpirun -n 2 python -m syncnorm bench comm"
        )
    sections = list(measure(group, QUICK if quick else FULL))
    job = info.job()
    if group.rank == 0:
        title = f"all-reduce on {report.ranks(group.size)}" + report.WARNING * quick
        rows = [row.numbers() for rows in sections for row in rows]
        report.publish_rows(report.header(job), report.Table(title, COLUMNS, []), sections, {"rows": rows}, files)


def measure(group: Communicator, effort: Effort) -> Iterator[list[Row]]:
    """Time every message on every path; yield the rows of each message. Collective on all ranks of the job."""
    gloo = dist.new_group(backend="gloo")
    for message in MESSAGES:
        tensor = torch.empty(message.elements, dtype=message.dtype, device="cpu")  # one memory for all paths
        timings: dict[str, Timing] = {}
        for candidates in paths(tensor, group, gloo):
            for name, run in candidates.items():
                check(name, run, tensor, group.size)
            tensor.zero_()  # whose sums stay finite
            timings |= interleave(candidates, group, effort)
        raw = next(iter(timings.values()))
        mpi = timings[COMMUNICATOR] if MPI4PY in timings else None
        yield [Row(message, name, timing, raw, mpi) for name, timing in timings.items()]


def check(name: str, run: Callable[[], object], tensor: Tensor, size: int) -> None:
    """Raise RuntimeError if `run` does not sum the tensor over `size` ranks: a benchmark of something else is none."""
    tensor.fill_(1)
    run()
    if not torch.equal(tensor, torch.full_like(tensor, size)):
        raise RuntimeError(f"expected {name} to sum ones over {size} ranks, got {tensor}")


def paths(tensor: Tensor, group: Communicator, gloo: dist.ProcessGroup) -> list[Candidates]:
    """Return the ways to sum the tensor's memory over the ranks, by name: those that take turns in one mapping.

    The first is the raw one. Gloo takes no turns with the others, which are slower after it, since Gloo's ranks sleep.
    """
    over_gloo = {GLOO: lambda: dist.all_reduce(tensor, group=gloo)}
    own = communicator(gloo)
    if dist.get_backend() != "mpi4py":
        return [over_gloo, {COMMUNICATOR: lambda: own.all_reduce(tensor)}]
    over_mpi = {
        "raw mpi4py": copy_baseline.all_reduce(tensor),
        COMMUNICATOR: lambda: group.all_reduce(tensor),
        MPI4PY: lambda: dist.all_reduce(tensor),
    }
    if tensor.nbytes <= MOST_BYTES:
        over_mpi[SHARED] = lambda: own.all_reduce(tensor)
    return [over_mpi, over_gloo]
