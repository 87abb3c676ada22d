"""`python -m syncnorm bench layer`: forward and backward of one layer over the copy baseline, beside what others do.

All candidates take turns on the same x, dy and residual, (N, C, *). On a CPU it runs twice: as the C library is, which
returns freed memory to the system, and told to keep it, which spares all candidates page faults. On a GPU the times are
those of CUDA events, but for the tiny case: its times are the host's, from a call until it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .. import info
from ..communicators import Communicator, LocalCommunicator, ProcessGroupLike
from ..modules import SyncBatchNorm
from . import baselines, copy_baseline, graph, memory, report
from .cases import LARGE, TINY, Case, cases
from .job import Job, join
from .targets import (
    ADD_RELU,
    ALL,
    ALL_REDUCES,
    ALL_REDUCES_BETWEEN,
    ALONE,
    AUTOGRAD,
    COMPILED,
    COPY,
    GRAPH,
    MODULE,
    RELU,
    REPRODUCIBLE,
    TORCH,
    TORCH_SYNC,
    WORDS,
    Verdict,
    verdicts,
)
from .timing import DEVICE, FULL, HOST, QUICK, WALL, Budget, Effort, Timing, interleave, sampler_of, until_return

__all__ = ["Layer", "Result", "check", "expected", "layers", "main", "measure", "tables"]

COMPOSITION = "composed of all-reduces"
FAIRSCALE = "fairscale"
COMPILED_REFERENCE = "torch.compile"
LONG = Effort(rounds=21, block=FULL.block)  # of large tensors
BY_EVENTS = Effort(rounds=51, block=2e-3)  # on a GPU
BRIEF = QUICK._replace(rounds=2)
SECONDS_ON_GPU = 90  # for all cases, unless told otherwise
TOLERANCE = 0.1  # of the mean error over the mean value: bfloat16 statistics pass, those of one rank alone do not
COLUMNS = ("case", "candidate", "median µs", "quartiles", "x copy", "GB/s")
TARGET_COLUMNS = ("case", "target", "measured", "limit", "")


class Layer(NamedTuple):
    """A candidate.

    Args:
        forward: x -> y, both (N, C, *).
        parameters: those whose gradients backward computes, beside that of x.
        synchronized: whether it normalizes by the statistics of all ranks.
        relu: whether a ReLU follows.
        residual: what is added before it, which needs a gradient too.
        captured: whether forward and backward are replayed from a CUDA graph.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    synchronized: bool = False
    relu: bool = False
    residual: Tensor | None = None
    captured: bool = False

    def step(self, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Return what runs forward and backward and returns y and the gradients, that of x first."""
        inputs = [x, *self.parameters, *([] if self.residual is None else [self.residual])]

        def run() -> tuple[Tensor, ...]:
            y = self.forward(x)
            return (y, *torch.autograd.grad(y, inputs, dy))

        return run


class Result(NamedTuple):
    """What one case took.

    Args:
        case: what was timed.
        memory: `memory.RETURNED`, KEPT or CACHED.
        clock: WALL, DEVICE or HOST.
        torch_kernels: whose kernels F.batch_norm runs, as `baselines.batch_norm_kernels` returns it.
        timings: by candidate.
        verdicts: on the targets.
        failures: by candidate that could not be timed, why.
    """

    case: Case
    memory: str
    clock: str
    torch_kernels: str
    timings: dict[str, Timing]
    verdicts: list[Verdict]
    failures: dict[str, str]

    @property
    def noisy(self) -> bool:
        """Whether the machine had other things to do while one of the candidates was timed."""
        return any(timing.noisy for timing in self.timings.values())

    @property
    def about(self) -> str:
        """The case and its memory, as printed."""
        return f"{self.case.name}, memory {self.memory}" + ", host time" * (self.clock == HOST)

    def over_copy(self, name: str) -> float:
        """Return the median of a candidate over that of the copy baseline."""
        return self.timings[name].median / self.timings[COPY].median

    def bandwidth(self, name: str) -> float:
        """Return the traffic of the copy baseline over the median of a candidate, in GB/s (10⁹ bytes)."""
        return copy_baseline.LAYER_PASSES * self.case.megabytes / 1e3 / self.timings[name].median

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the candidates as they are written to JSON."""
        for name, timing in self.timings.items():
            median, low, high = timing.micros()
            yield {
                **self.case.numbers(),
                "memory": self.memory,
                "candidate": name,
                **({"kernels": self.torch_kernels} if name.startswith(TORCH) else {}),
                "clock": self.clock,
                "median_us": median,
                "quartiles_us": [low, high],
                "ratio": self.over_copy(name),
                "gigabytes_per_second": self.bandwidth(name),
                "noisy": timing.noisy,
            }

    def targets(self) -> Iterator[dict[str, Any]]:
        """Yield the verdicts as they are written to JSON."""
        for verdict in self.verdicts:
            yield {"case": self.case.name, "memory": self.memory, **verdict.numbers()}

    def failed(self) -> Iterator[dict[str, Any]]:
        """Yield the failures as they are written to JSON."""
        for name, error in self.failures.items():
            yield {"case": self.case.name, "memory": self.memory, "candidate": name, "error": error}


def main(
    files: report.Files, quick: bool = False, only: str = "", with_compiled: bool = False, seconds: int | None = None
) -> None:
    """Join the job, measure, print and write on rank 0. Collective on all ranks of the job.

    Args:
        files: what to write.
        quick: few rounds on tiny tensors.
        only: words that the names of the cases have to hold.
        with_compiled: time the compiled module and the compiled reference too.
        seconds: to measure for, about. Cases that are left are named. None: SECONDS_ON_GPU, without a limit on a CPU.

    Raises:
        RuntimeError: after all was written, if a candidate failed.
    """
    job = join()
    listed = cases(job.device, quick, only)
    budget = Budget(seconds or (SECONDS_ON_GPU if job.device.type == "cuda" else math.inf), job.group)
    facts = report.header(info.job())
    results: list[Result] = []
    for result in measure(job, listed, quick, with_compiled, budget):
        results.append(result)
        if job.group.rank == 0:
            report.write_json(facts, _numbers(results), files)
    if job.group.rank == 0:
        _publish(files, facts, listed, results, f"forward + backward on {report.ranks(job.group.size)}", quick)
    failures = _numbers(results)["failures"]
    if failures:
        raise RuntimeError(f"expected all candidates to run, got {failures}")


def _publish(
    files: report.Files,
    facts: dict[str, str],
    listed: Sequence[Case],
    results: Sequence[Result],
    title: str,
    quick: bool,
) -> None:
    facts["freed memory"] = ", ".join(dict.fromkeys(result.memory for result in results)) or "not measured"
    measured = {result.case for result in results}
    facts |= report.left_undone(case.name for case in listed if case not in measured)
    numbers, title = _numbers(results), title + report.WARNING * quick
    printed, in_markdown = tables(results, title)
    report.publish(facts, printed, numbers, files, in_markdown)
    if files.figure is not None:
        from . import figure  # needs matplotlib

        figure.draw(files.figure, numbers["rows"], numbers["targets"], title)


def _numbers(results: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
    return {
        "rows": [row for result in results for row in result.rows()],
        "targets": [target for result in results for target in result.targets()],
        "failures": [failure for result in results for failure in result.failed()],
    }


def measure(job: Job, listed: Sequence[Case], quick: bool, with_compiled: bool, budget: Budget) -> Iterator[Result]:
    """Time all candidates on the cases, then again with memory that is kept, until the time is up. Collective."""
    on_gpu = job.device.type == "cuda"
    parts = [(case, memory.CACHED if on_gpu else memory.RETURNED) for case in listed]
    if not on_gpu:
        parts += [(case, memory.KEPT) for case in listed if case.kind == LARGE or not quick]
    for number, (case, setting) in enumerate(parts):
        share = budget.share(len(parts) - number)
        if share == 0 or (setting == memory.KEPT and not memory.keep()):
            return
        yield _measured(job, case, setting, quick, with_compiled, Budget(share, job.group))


def _measured(job: Job, case: Case, setting: str, quick: bool, with_compiled: bool, budget: Budget) -> Result:
    group, device = job
    steps, failures, kernels = _steps(job, case, with_compiled)
    clock = WALL if device.type != "cuda" else HOST if case.kind == TINY else DEVICE
    sample = until_return(device) if clock == HOST else sampler_of(device)
    effort = (BRIEF if quick else _effort(case, clock))._replace(seconds=budget.left())
    timings = interleave(steps, group, effort, sample, together=group.size > 1 or clock == WALL)
    return Result(case, setting, clock, kernels, timings, list(verdicts(case, timings, device)), failures)


def _effort(case: Case, clock: str) -> Effort:
    if clock == DEVICE:
        return BY_EVENTS
    return LONG if case.kind == LARGE else FULL


def _steps(job: Job, case: Case, with_compiled: bool) -> tuple[dict[str, Callable[[], object]], dict[str, str], str]:
    """Return what is timed, by name, why others cannot be, and whose kernels F.batch_norm runs."""
    group, device = job
    generator = torch.Generator(device).manual_seed(group.rank)
    x = case.random(device, generator, mean=2.0 * group.rank).requires_grad_()  # so that ranks differ
    residual = case.random(device, generator).requires_grad_()
    dy = case.random(device, generator)
    pair = [torch.ones(case.shape[1], device=device, requires_grad=True) for _ in ("weight", "bias")]
    steps: dict[str, Callable[[], object]] = {
        COPY: copy_baseline.layer(x),
        AUTOGRAD: copy_baseline.layer_in_autograd(x, pair, dy),
    }
    wanted: dict[object, tuple[Tensor, Tensor]] = {}
    failures: dict[str, str] = {}
    for name, layer in layers(case, job, residual, with_compiled).items():
        kind = (layer.synchronized, layer.relu, layer.residual is not None)
        if kind not in wanted:
            wanted[kind] = expected(layer, x, dy, group if layer.synchronized else LocalCommunicator())
        try:
            step = layer.step(x, dy)
            if layer.captured:
                step = graph.captured(step, device)
            check(f"{name} on {case.name}", step()[:2], wanted[kind])
        except Exception as error:
            if group.size > 1:
                raise  # the other ranks would wait
            failures[name] = report.told(error)
            continue
        steps[name] = step
    if group.size > 1:
        all_reduces = _all_reduces(case.shape[1], device)
        steps[ALL_REDUCES] = lambda: [all_reduce() for all_reduce in all_reduces]
        steps[ALL_REDUCES_BETWEEN] = copy_baseline.layer(x, all_reduces)
    return steps, failures, baselines.batch_norm_kernels(nn.BatchNorm2d(case.shape[1], device=device), x)


def layers(case: Case, job: Job, residual: Tensor, with_compiled: bool = False) -> dict[str, Layer]:
    """Return the candidates for a case, by name."""
    group, device = job
    features, alone = case.shape[1], LocalCommunicator()
    norm = nn.BatchNorm2d(features, device=device)
    parameters = [norm.weight, norm.bias]

    def ours(process_group: ProcessGroupLike, activation: str | None = None, **options: Any) -> SyncBatchNorm:
        return SyncBatchNorm(features, process_group=process_group, device=device, activation=activation, **options)

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
        REPRODUCIBLE: _of_module(ours(alone, reproducible=True)),
        COMPOSITION: Layer(baselines.composition(norm, group), parameters, synchronized=True),
    }
    if case.kind == TINY:
        made[MODULE] = _of_module(norm)
    if with_compiled:
        torch.compiler.reset()  # else it would stop to compile after a few shapes
        made[COMPILED_REFERENCE] = Layer(baselines.compiled(norm), parameters)
        own = ours(alone)
        made[COMPILED] = Layer(torch.compile(own, dynamic=False), list(own.parameters()))
    if group.size > 1:
        made[ALL] = _of_module(ours(group), synchronized=True)
        other = baselines.fairscale(norm)
        if other is not None:
            made[FAIRSCALE] = _of_module(other, synchronized=True)
    if device.type == "cuda":
        made[GRAPH] = _of_module(ours(alone))._replace(captured=True)
        if baselines.has_torch_group():
            made[TORCH_SYNC] = _of_module(baselines.TorchSyncBatchNorm(features, device=device), synchronized=True)
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
    failed = [list(failure.values()) for result in results for failure in result.failed()]
    failures = report.Table("could not be timed", ("case", "memory", "candidate", "error"), [failed], names=4)
    quiet, note = report.undisturbed(results)
    in_markdown = [_ratios(quiet, title)._replace(note=note), _verdicts(quiet)._replace(note=note)]
    return [timings, targets], [*in_markdown, *[failures] * bool(failed)]


def _timing_rows(result: Result) -> Iterator[list[str]]:
    head = f"{result.about}, {result.case.megabytes:.3g} MB"
    for name, timing in result.timings.items():
        median, low, high = map(report.digits, timing.micros())
        shown = f"{name} ({result.torch_kernels})" if name == TORCH else name
        rate = report.digits(result.bandwidth(name))
        yield [head, shown, median, f"{low} to {high}", f"{result.over_copy(name):.2f}", rate]
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
            result.clock,
            result.torch_kernels,
            f"{report.digits(1e6 * result.timings[COPY].median)} ({report.digits(result.bandwidth(COPY))})",
            *(
                f"{result.over_copy(name):.2f} ({report.digits(result.bandwidth(name))})"
                if name in result.timings
                else ""
                for name in names
            ),
        ]
        for result in results
    ]
    columns = ("case", "memory", "clock", f"{TORCH} by", "copy µs (GB/s)", *names)
    return report.Table(f"{title}; times over the copy baseline (and GB/s of its traffic)", columns, [rows], names=4)


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
