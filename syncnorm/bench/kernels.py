"""`python -m syncnorm bench kernels`: each pass of each implementation over a copy of its own memory traffic.

Passes: moments, normalize, reduce_grad, grad_input on x and dy, (N, C, *). Memory is kept (see `memory`): the pass is
measured, not the allocator. No pass has a collective; several ranks show what sharing the memory's bandwidth costs.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import info, kernels
from ..kernels import Kernels, Saved
from . import copy_baseline, memory, report
from .cases import LARGE, TINY, Case, cases
from .job import Job, join
from .timing import FULL, QUICK, Budget, Effort, Timing, interleave, sampler_of

__all__ = ["IMPLEMENTATIONS", "Row", "available", "check", "main", "measure", "passes"]

IMPLEMENTATIONS = ("reference", "cpu", "triton")
LONG = Effort(rounds=21, block=FULL.block)  # of large tensors
BY_EVENTS = Effort(rounds=51, block=1e-3)  # on a GPU
BRIEF = QUICK._replace(rounds=2)
SECONDS_ON_GPU = 25  # for all cases, unless told otherwise
COPY = "copy baseline"
COLUMNS = ("case", "pass", "implementation", "median µs", "quartiles", "x copy")


class Failure(NamedTuple):
    """Why a pass of an implementation was not timed."""

    case: str
    kernel: str
    implementation: str
    error: str


class Row(NamedTuple):
    """The time of one pass of one implementation, or of the copy baseline, beside that of the copy baseline."""

    case: Case
    kernel: str
    implementation: str
    timing: Timing
    copy: Timing

    @property
    def noisy(self) -> bool:
        """Whether the machine had other things to do."""
        return self.timing.noisy or self.copy.noisy

    def numbers(self) -> dict[str, Any]:
        """Return the row as it is written to JSON."""
        median, low, high = self.timing.micros()
        return {
            **self.case.numbers(),
            "kernel": self.kernel,
            "implementation": self.implementation,
            "median_us": median,
            "quartiles_us": [low, high],
            "copy_us": 1e6 * self.copy.median,
            "ratio": self.timing.median / self.copy.median,
            "noisy": self.noisy,
        }

    def cells(self) -> list[str]:
        """Return the row as it is printed."""
        median, low, high = map(report.digits, self.timing.micros())
        ratio = f"{self.timing.median / self.copy.median:.2f}"
        return [self.case.name, self.kernel, self.implementation, median, f"{low} to {high}", ratio]


def main(files: report.Files, quick: bool = False, only: str = "", seconds: int | None = None) -> None:
    """Join the job, measure, print and write on rank 0. Collective on all ranks of the job.

    Args:
        files: what to write.
        quick: few rounds on tiny tensors.
        only: words that the names of the cases have to hold.
        seconds: to measure for, about. Cases that are left are named. None: SECONDS_ON_GPU, without a limit on a CPU.

    Raises:
        RuntimeError: there is no such case; after all was written, if a pass failed or computes something else.
    """
    job = join()
    memory.keep()
    listed = [case for case in cases(job.device, quick, only) if case.kind != TINY]
    if not listed:
        raise RuntimeError(f"expected --only to name a case with memory traffic, got {only!r}")
    facts = report.header(info.job())
    for name, found in _search(job.device).items():
        facts[f"implementation {name}"] = found if isinstance(found, str) else "timed"
    budget = Budget(seconds or (SECONDS_ON_GPU if job.device.type == "cuda" else math.inf), job.group)
    sections: list[list[Row]] = []
    failures: list[Failure] = []
    for rows in measure(job, listed, quick, budget, failures):
        sections.append(rows)
        if job.group.rank == 0:
            report.write_json(facts, report.numbers(sections, failures), files)
    if job.group.rank == 0:
        facts |= report.left_undone(case.name for case in listed[len(sections) :])
        title = f"passes over the data on {report.ranks(job.group.size)}" + report.WARNING * quick
        numbers = report.numbers(sections, failures)
        report.publish_rows(facts, report.Table(title, COLUMNS, [], names=3), sections, numbers, files)
    if failures:
        raise RuntimeError(f"expected all passes to run and to be right, got {failures}")


def measure(
    job: Job, listed: Sequence[Case], quick: bool, budget: Budget, failures: list[Failure]
) -> Iterator[list[Row]]:
    """Time every pass of every implementation; yield the rows of each case, until the time is up. Collective.

    A pass that fails in a job of one rank is left out and appended to `failures`. In other jobs it raises.
    """
    found = available(job.device)
    on_gpu = job.device.type == "cuda"
    for number, case in enumerate(listed):
        share = budget.share(len(listed) - number)
        if share == 0:
            return
        generator = torch.Generator(job.device).manual_seed(job.group.rank)
        x, dy = case.random(job.device, generator), case.random(job.device, generator)
        effort = BRIEF if quick else BY_EVENTS if on_gpu else LONG if case.kind == LARGE else FULL
        effort = effort._replace(seconds=share / len(copy_baseline.PASSES))
        by_name = {name: passes(implementation, x, dy) for name, implementation in found.items()}
        rows = []
        for kernel, traffic in copy_baseline.PASSES.items():
            runs: dict[str, Callable[[], object]] = {COPY: partial(traffic, x, dy)}
            for name, made in by_name.items():
                try:
                    check(f"{kernel} of {name} on {case.name}", made[kernel](), by_name["reference"][kernel]())
                except Exception as error:
                    if job.group.size > 1:
                        raise  # the other ranks would wait
                    failures.append(Failure(case.name, kernel, name, report.told(error)))
                    continue
                runs[name] = made[kernel]
            together = job.group.size > 1 or not on_gpu
            timings = interleave(runs, job.group, effort, sampler_of(job.device), together=together)
            rows += [Row(case, kernel, name, timing, timings[COPY]) for name, timing in timings.items()]
        yield rows


def available(device: torch.device) -> dict[str, Kernels]:
    """Return the implementations for the device that are there, by name: the reference, and what can be imported."""
    return {name: found for name, found in _search(device).items() if not isinstance(found, str)}


def _search(device: torch.device) -> dict[str, Kernels | str]:
    """Return the implementations for the device, by name, or why they are not there."""
    found: dict[str, Kernels | str] = {"reference": kernels.reference}
    with_triton = device.type == "cuda" or os.environ.get("SYNCNORM_KERNELS") == "triton"  # in its interpreter
    for name in IMPLEMENTATIONS[1:]:
        if (name == "triton") != with_triton:
            continue
        try:
            implementation: Any = importlib.import_module(f"{kernels.__name__}.{name}")
        except (ImportError, OSError, RuntimeError) as error:  # not compiled, or without what it needs
            implementation = f"none: {error}".splitlines()[0]
        found[name] = implementation
    return found


def passes(implementation: Kernels, x: Tensor, dy: Tensor) -> dict[str, Callable[[], tuple[Tensor | None, ...]]]:
    """Return the passes of an implementation over x and dy, by name. What they are given the reference has computed."""
    weight, bias = (torch.full((x.shape[1],), value, device=x.device) for value in (0.5, 1.0))
    moments = kernels.reference.moments(x)
    _, statistics, _ = kernels.reference.normalize(x, moments, weight, bias, None, 1e-5)
    read = (dy, Saved(x), statistics, weight, bias)
    *_, sums = kernels.reference.Backward(*read).reduce_grad()
    return {
        "moments": lambda: (implementation.moments(x),),
        "normalize": lambda: implementation.normalize(x, moments, weight, bias, None, 1e-5),
        "reduce_grad": lambda: implementation.Backward(*read).reduce_grad(),
        "grad_input": lambda: implementation.Backward(*read).grad_input(sums),
    }


def check(name: str, found: tuple[Tensor | None, ...], expected: tuple[Tensor | None, ...]) -> None:
    """Raise RuntimeError unless a pass returns what the reference does: a benchmark of something else is none."""
    for result, wanted in zip(found, expected, strict=True):
        if result is None or wanted is None:
            if result is not wanted:
                raise RuntimeError(f"expected {name} to return {wanted}, got {result}")
            continue
        error = (result.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)
        tolerance = 1e-2 if wanted.dtype == torch.bfloat16 else 1e-4
        if not error.item() <= tolerance:
            raise RuntimeError(f"expected {name} to agree with the reference to {tolerance:g}, got {error.item():.2g}")
