"""`python -m syncnorm bench comm`: all-reduces by syncnorm against bare ones on the same memory.

Under mpirun the bare one is mpi4py's `Allreduce`, else torch.distributed's on Gloo. Messages are what a SyncBatchNorm
of C channels sends in forward, 2C + 3 float64, and one gradient bucket of DistributedDataParallel.

"Shared memory" is a communicator on a Gloo group, which is what torchrun gives a job on CPUs. Under torchrun it is the
only communicator there is. Under mpirun it is beside that of MPI, so that one run tells what the two take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import info
from ..communicators import Communicator
from ..communicators.process_group import ProcessGroupCommunicator
from ..job.init import init
from . import copy_baseline, report
from .timing import FULL, QUICK, Candidates, Effort, Timing, interleave

__all__ = ["MESSAGES", "Message", "Row", "Target", "check", "main", "measure"]

RAW_MPI = "raw mpi4py"
COMMUNICATOR = "Communicator"
MPI4PY = "torch on mpi4py"  # torch.distributed
SHARED = "shared memory"  # a communicator on Gloo
GLOO = "torch on gloo"
COLUMNS = ("message", "all-reduce by", "median µs", "quartiles", "x raw", "µs over raw", "target", "")


class Target(NamedTuple):
    """What a path may cost over another one: a factor (`ratio`) or a time (`extra_us`)."""

    quantity: str
    limit: float
    path: str | None = None  # the other one. None: the raw call

    def __str__(self) -> str:
        path = self.path or "raw"
        return f"<= {self.limit:g} x {path}" if self.quantity == "ratio" else f"<= {path} + {self.limit:g} µs"


class Message(NamedTuple):
    """What is summed, and the targets of the paths."""

    name: str
    elements: int
    dtype: torch.dtype
    targets: dict[str, Target]


STATISTICS = {
    COMMUNICATOR: Target("ratio", 1.3),
    MPI4PY: Target("extra_us", 25),
    SHARED: Target("ratio", 1.3, COMMUNICATOR),
}
MESSAGES = [
    *(Message(f"C = {c}", 2 * c + 3, torch.float64, STATISTICS) for c in (64, 256, 1024, 2048)),
    Message("25 MB bucket", 25 * 2**20 // 4, torch.float32, {MPI4PY: Target("ratio", 1.2)}),
]


class Row(NamedTuple):
    """One path's time for one message, beside those of the other paths. The first of them is the raw call."""

    message: Message
    path: str
    timings: Mapping[str, Timing]

    @property
    def target(self) -> Target | None:
        """What this path may cost."""
        return self.message.targets.get(self.path)

    @property
    def raw(self) -> str:
        """The path of the raw call."""
        return next(iter(self.timings))

    @property
    def noisy(self) -> bool:
        """Whether the machine had other things to do."""
        paths = {self.path, self.raw, (self.target and self.target.path) or self.raw}
        return any(self.timings[path].noisy for path in paths)

    def over(self, path: str) -> dict[str, float]:
        """Return what this path costs over another one: the quantities of `Target`."""
        own, other = self.timings[self.path].median, self.timings[path].median
        return {"ratio": own / other, "extra_us": 1e6 * (own - other)}

    def numbers(self) -> dict[str, Any]:
        """Return the row as it is written to JSON."""
        median, low, high = self.timings[self.path].micros()
        target = self.target
        if target is not None:
            path = target.path or self.raw
            value = self.over(path)[target.quantity]
        return {
            "message": self.message.name,
            "elements": self.message.elements,
            "dtype": str(self.message.dtype).removeprefix("torch."),
            "path": self.path,
            "median_us": median,
            "quartiles_us": [low, high],
            **self.over(self.raw),
            "target": target and {**target._asdict(), "path": path, "value": value},
            "met": target and value <= target.limit,
            "noisy": self.noisy,
        }

    def cells(self) -> list[str]:
        """Return the row as it is printed."""
        n = self.numbers()
        low, high = n["quartiles_us"]
        return [
            n["message"],
            n["path"],
            report.digits(n["median_us"]),
            f"{report.digits(low)} to {report.digits(high)}",
            f"{n['ratio']:.2f}",
            report.digits(n["extra_us"]),
            str(self.target or ""),
            {None: "", True: "met", False: "MISSED"}[n["met"]] + ", noisy" * n["noisy"] * (self.target is not None),
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
    gloo = ProcessGroupCommunicator(dist.new_group(backend="gloo"))
    facts, route = report.header(info.job()), gloo.route()
    if dist.get_backend() != "gloo":
        facts["sums on a gloo group"] = route
    sections = list(measure(group, gloo, QUICK if quick else FULL))
    if group.rank == 0:
        title = f"all-reduce on {report.ranks(group.size)}" + report.WARNING * quick
        rows = [row.numbers() for rows in sections for row in rows]
        report.publish_rows(facts, report.Table(title, COLUMNS, []), sections, {"rows": rows}, files)


def measure(group: Communicator, gloo: ProcessGroupCommunicator, effort: Effort) -> Iterator[list[Row]]:
    """Time every message on every path; yield the rows of each message. Collective on all ranks of the job."""
    for message in MESSAGES:
        tensor = torch.empty(message.elements, dtype=message.dtype, device="cpu")  # one memory for all paths
        timings: dict[str, Timing] = {}
        for candidates in paths(message, tensor, group, gloo):
            for name, run in candidates.items():
                check(name, run, tensor, group.size)
            tensor.zero_()  # whose sums stay finite
            timings |= interleave(candidates, group, effort)
        yield [Row(message, name, timings) for name in timings]


def check(name: str, run: Callable[[], object], tensor: Tensor, size: int) -> None:
    """Raise RuntimeError if `run` does not sum the tensor over `size` ranks: a benchmark of something else is none."""
    tensor.fill_(1)
    run()
    if not torch.equal(tensor, torch.full_like(tensor, size)):
        raise RuntimeError(f"expected {name} to sum ones over {size} ranks, got {tensor}")


def paths(message: Message, tensor: Tensor, group: Communicator, gloo: ProcessGroupCommunicator) -> list[Candidates]:
    """Return the ways to sum the tensor's memory over the ranks, by name: those that take turns in one mapping.

    The first is the raw one. Gloo takes no turns with MPI and memory, which are slower after it, since Gloo's ranks
    sleep.
    """
    over_gloo: Candidates = {GLOO: lambda: dist.all_reduce(tensor, group=gloo.group)}
    if dist.get_backend() != "mpi4py":
        return [over_gloo, {COMMUNICATOR: lambda: gloo.all_reduce(tensor)}]
    awake = {
        RAW_MPI: copy_baseline.all_reduce(tensor),
        COMMUNICATOR: lambda: group.all_reduce(tensor),
        MPI4PY: lambda: dist.all_reduce(tensor),
    }
    if SHARED in message.targets and gloo.route().startswith("in shared memory"):
        awake[SHARED] = lambda: gloo.all_reduce(tensor)
    return [awake, over_gloo]
