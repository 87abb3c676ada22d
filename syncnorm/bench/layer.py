"""`python -m syncnorm bench layer`: forward and backward of one layer over the copy baseline, beside what others do.

All candidates take turns on the same x, dy and residual, (N, C, *). On large tensors it runs twice: as the C library
is, which returns freed memory to the system, and told to keep it, which spares all candidates page faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .. import info
from ..communicators import Communicator, LocalCommunicator, ProcessGroupLike
from ..modules import SyncBatchNorm
from . import baselines, copy_baseline, memory, report
from .cases import LARGE, TINY, Case, cases
from .job import Job, join
from .targets import (
    ADD_RELU,
    ALL,
    ALL_REDUCES,
    ALL_REDUCES_BETWEEN,
    ALONE,
    AUTOGRAD,
    COPY,
    MODULE,
    RELU,
    TORCH,
    TORCH_SYNC,
    WORDS,
    Verdict,
    verdicts,
)
from .timing import FULL, QUICK, Effort, Timing, clock_of, interleave

__all__ = ["Layer", "Result", "check", "expected", "layers", "main", "measure", "tables"]

COMPOSITION = "composed of all-reduces"
FAIRSCALE = "fairscale"
COMPILED = "torch.compile"
LONG = Effort(rounds=21, block=FULL.block)  # of large tensors
BRIEF = QUICK._replace(rounds=2)
TOLERANCE = 0.1  # of the mean error over the mean value: bfloat16 statistics pass, those of one rank alone do not
COLUMNS = ("case", "candidate", "median µs", "quartiles", "x copy")
TARGET_COLUMNS = ("case", "target", "measured", "limit", "")


class Layer(NamedTuple):
    """A candidate.

    Args:
        forward: x -> y, both (N, C, *).
        parameters: those whose gradients backward computes, beside that of x.
        synchronized: whether it normalizes by the statistics of all ranks.
        relu: whether a ReLU follows.
        residual: what is added before it, which needs a gradient too.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    synchronized: bool = False
    relu: bool = False
    residual: Tensor | None = None

    def step(self, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Return what runs forward and backward and returns y and the gradients, that of x first."""
        inputs = [x, *self.parameters, *([] if self.residual is None else [self.residual])]

        def run() -> tuple[Tensor, ...]:
            y = self.forward(x)
            return (y, *torch.autograd.grad(y, inputs, dy))

        return run


class Result(NamedTuple):
    """What one case took, with memory `memory.RETURNED`, KEPT or CACHED."""

    case: Case
    memory: str
    timings: dict[str, Timing]
    verdicts: list[Verdict]

    @property
    def noisy(self) -> bool:
        """Whether the machine had other things to do while one of the candidates was timed."""
        return any(timing.noisy for timing in self.timings.values())

    @property
    def about(self) -> str:
        """The case and its memory, as printed."""
        return f"{self.case.name}, memory {self.memory}"

    def over_copy(self, name: str) -> float:
        """Return the median of a candidate over that of the copy baseline."""
        return self.timings[name].median / self.timings[COPY].median

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the candidates as they are written to JSON."""
        for name, timing in self.timings.items():
            median, low, high = timing.micros()
            yield {
                **self.case.numbers(),
                "memory": self.memory,
                "candidate": name,
                "median_us": median,
                "quartiles_us": [low, high],
                "ratio": self.over_copy(name),
                "noisy": timing.noisy,
            }

    def targets(self) -> Iterator[dict[str, Any]]:
        """Yield the verdicts as they are written to JSON."""
        for verdict in self.verdicts:
            yield {"case": self.case.name, "memory": self.memory, **verdict.numbers()}


def main(files: report.Files, quick: bool = False, only: str = "", with_compiled: bool = False) -> None:
    """Join the job, measure, print and write on rank 0. Collective on all ranks of the job.

    Args:
        files: what to write.
        quick: few rounds on small batches.
        only: words that the names of the cases have to hold.
        with_compiled: time the compiled reference too.
    """
    job = join()
    results = list(measure(job, cases(job.device, quick, only), quick, with_compiled))
    told = info.job()
    if job.group.rank == 0:
        facts = report.header(told)
        facts["freed memory"] = ", ".join(dict.fromkeys(result.memory for result in results))
        rows = [row for result in results for row in result.rows()]
        targets = [target for result in results for target in result.targets()]
        title = f"forward + backward on {report.ranks(job.group.size)}" + report.WARNING * quick
        printed, in_markdown = tables(results, title)
        report.publish(facts, printed, {"rows": rows, "targets": targets}, files, in_markdown)
        if files.figure is not None:
            from . import figure  # needs matplotlib

            figure.draw(files.figure, rows, targets, title)


def measure(job: Job, listed: Sequence[Case], quick: bool, with_compiled: bool) -> Iterator[Result]:
    """Time all candidates on the cases, then again with memory that is kept. Collective."""
    on_gpu = job.device.type == "cuda"
    for case in listed:
        yield _measured(job, case, memory.CACHED if on_gpu else memory.RETURNED, quick, with_compiled)
    if not on_gpu and memory.keep():
        for case in listed:
            yield _measured(job, case, memory.KEPT, quick, with_compiled)


def _measured(job: Job, case: Case, setting: str, quick: bool, with_compiled: bool) -> Result:
    group, device = job
    generator = torch.Generator().manual_seed(group.rank)
    x = case.random(device, generator, mean=2.0 * group.rank).requires_grad_()  # so that ranks differ
    residual = case.random(device, generator).requires_grad_()
    dy = case.random(device, generator)
    pair = [torch.ones(case.shape[1], device=device, requires_grad=True) for _ in ("weight", "bias")]
    steps: dict[str, Callable[[], object]] = {
        COPY: copy_baseline.layer(x),
        AUTOGRAD: copy_baseline.layer_in_autograd(x, pair, dy),
    }
    wanted: dict[object, tuple[Tensor, Tensor]] = {}
    for name, layer in layers(case, job, residual, with_compiled).items():
        step = layer.step(x, dy)
        kind = (layer.synchronized, layer.relu, layer.residual is not None)
        if kind not in wanted:
            wanted[kind] = expected(layer, x, dy, group if layer.synchronized else LocalCommunicator())
        check(f"{name} on {case.name}", step()[:2], wanted[kind])
        steps[name] = step
    if group.size > 1:
        all_reduces = _all_reduces(case.shape[1], device)
        steps[ALL_REDUCES] = lambda: [all_reduce() for all_reduce in all_reduces]
        steps[ALL_REDUCES_BETWEEN] = copy_baseline.layer(x, all_reduces)
    effort = BRIEF if quick else LONG if case.kind == LARGE else FULL
    timings = interleave(steps, group, effort, clock_of(device), together=True)
    return Result(case, setting, timings, list(verdicts(case, timings, device)))


def layers(case: Case, job: Job, residual: Tensor, with_compiled: bool = False) -> dict[str, Layer]:
    """Return the candidates for a case, by name."""
    group, device = job
    features, alone = case.shape[1], LocalCommunicator()
    norm = nn.BatchNorm2d(features, device=device)
    parameters = [norm.weight, norm.bias]

    def ours(process_group: ProcessGroupLike, activation: str | None = None) -> SyncBatchNorm:
        return SyncBatchNorm(features, process_group=process_group, device=device, activation=activation)

    def plain(x: Tensor) -> Tensor:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True)

    def plain_relu(x: Tensor) -> Tensor:
        return F.relu(plain(x), inplace=True)

    def plain_add_relu(x: Tensor) -> Tensor:
        return F.relu(plain(x).add_(residual), inplace=True)

    one, relu, add_relu = ours(alone), ours(alone, "relu"), ours(alone, "relu")

    def fused(x: Tensor) -> Tensor:
        return add_relu(x, residual=residual)  # type: ignore[no-any-return]

    made = {
        TORCH: Layer(plain, parameters),
        f"{TORCH}, relu": Layer(plain_relu, parameters, relu=True),
        f"{TORCH}, add, relu": Layer(plain_add_relu, parameters, relu=True, residual=residual),
        ALONE: _of_module(one),
        RELU: _of_module(relu, relu=True),
        ADD_RELU: Layer(fused, list(add_relu.parameters()), relu=True, residual=residual),
        COMPOSITION: Layer(baselines.composition(norm, group), parameters, synchronized=True),
    }
    if case.kind == TINY:
        made[MODULE] = _of_module(norm)
    if with_compiled:
        made[COMPILED] = Layer(baselines.compiled(norm), parameters)
    if group.size > 1:
        made[ALL] = _of_module(ours(group), synchronized=True)
        other = baselines.fairscale(norm)
        if other is not None:
            made[FAIRSCALE] = _of_module(other, synchronized=True)
    if device.type == "cuda" and dist.is_initialized() and dist.get_backend() in ("nccl", "gloo"):
        made[TORCH_SYNC] = Layer(baselines.torch_sync_batch_norm(norm), parameters, synchronized=True)
    return made


def check(name: str, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Raise RuntimeError unless y and dx are those expected: a benchmark of something else is none."""
    for what, result, right in zip(("y", "dx"), found, wanted, strict=True):
        error = ((result.detach().float() - right).abs().mean() / right.abs().mean()).item()
        if not error <= TOLERANCE:
            raise RuntimeError(f"expected {name} to compute {what} to {TOLERANCE:.0%} on average, got {error:.0%}")


def tables(results: Sequence[Result], title: str) -> tuple[list[report.Table], list[report.Table]]:
    """Return the tables for the terminal, with all there is, and those for Markdown, with a line for each case."""
    timings = report.Table(title, COLUMNS, [list(_timing_rows(result)) for result in results])
    targets = report.Table(WORDS, TARGET_COLUMNS, [list(_target_rows(result)) for result in results])
    quiet, note = report.undisturbed(results)
    return [timings, targets], [_ratios(quiet, title)._replace(note=note), _verdicts(quiet)._replace(note=note)]


def _timing_rows(result: Result) -> Iterator[list[str]]:
    head = f"{result.about}, {result.case.megabytes:.3g} MB"
    for name, timing in result.timings.items():
        median, low, high = map(report.digits, timing.micros())
        yield [head, name, median, f"{low} to {high}", f"{result.over_copy(name):.2f}"]
        head = ""


def _target_rows(result: Result) -> Iterator[list[str]]:
    head = result.about
    for verdict in result.verdicts:
        yield [head, *verdict.cells()]
        head = ""


def _ratios(results: Sequence[Result], title: str) -> report.Table:
    """Return the times over the copy baseline, a line for each case. Of layers with activations the verdicts tell."""
    names = [name for name in _in_order(result.timings for result in results) if "relu" not in name and name != COPY]
    rows = [
        [
            result.case.name,
            result.memory,
            report.digits(1e6 * result.timings[COPY].median),
            *(f"{result.over_copy(name):.2f}" if name in result.timings else "" for name in names),
        ]
        for result in results
    ]
    return report.Table(f"{title}; times over the copy baseline", ("case", "memory", "copy µs", *names), [rows])


def _verdicts(results: Sequence[Result]) -> report.Table:
    cells = [{verdict.target: verdict.cell() for verdict in result.verdicts} for result in results]
    names = _in_order(cells)
    rows = [
        [result.case.name, result.memory, *(of.get(name, "") for name in names)]
        for result, of in zip(results, cells, strict=True)
    ]
    return report.Table(WORDS, ("case", "memory", *names), [rows])


def _in_order(named: Iterable[Iterable[str]]) -> list[str]:
    """Return all names once, in the order in which they come."""
    return list(dict.fromkeys(name for names in named for name in names))


def _of_module(module: nn.Module, synchronized: bool = False, relu: bool = False) -> Layer:
    return Layer(module, list(module.parameters()), synchronized, relu)


def _all_reduces(features: int, device: torch.device) -> list[Callable[[], object]]:
    """Return two bare all-reduces, of what forward and backward of a layer send."""
    sizes = 2 * features + 1, 2 * features
    return [copy_baseline.all_reduce(torch.zeros(size, dtype=torch.float64, device=device)) for size in sizes]


def expected(layer: Layer, x: Tensor, dy: Tensor, group: Communicator) -> tuple[Tensor, Tensor]:
    """Return this rank's y and dx of F.batch_norm in float32 on the whole batch of the group."""

    def whole(tensor: Tensor) -> Tensor:
        return torch.cat(group.all_gather(tensor.detach())).float()

    batch = whole(x).requires_grad_()
    y = F.batch_norm(batch, None, None, training=True)
    if layer.residual is not None:
        y = y + whole(layer.residual)
    if layer.relu:
        y = F.relu(y)
    (dx,) = torch.autograd.grad(y, batch, whole(dy))
    mine = slice(group.rank * len(x), (group.rank + 1) * len(x))
    return y.detach()[mine], dx[mine]
