"""`python -m syncnorm bench train`: steps of a ResNet under DistributedDataParallel, by its norms.

Candidates: BatchNorm on each rank alone; SyncBatchNorm in its place; SyncBatchNorm that also adds the residual and
applies the ReLU. On a GPU also the kernels of torch.nn.SyncBatchNorm, and two ResNets with leaky ReLU in the place of
ReLU: with norms that apply it, and with norms that write over their input as well. They take turns on the same images.
A process alone trains without DistributedDataParallel. On a GPU, models are channels-last under autocast to bfloat16.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .. import info
from ..communicators import Communicator
from ..modules import SyncBatchNorm
from ..testing import TimedCommunicator
from . import baselines, report
from .job import Job, distributed, join
from .resnet import BLOCKS, InPlace, NormFactory, ResNet, Separate
from .targets import Verdict, of_collectives
from .timing import Budget, Effort, Timing, clock_of, interleave, wall

__all__ = ["CANDIDATES", "Failure", "Row", "Training", "candidates", "main", "measure", "peak_memory", "waiting"]

BN, SYNC, FUSED = CANDIDATES = ("BN", "SyncBN", "SyncBN fused")
TORCH_SYNC = "torch SyncBN's kernels"
LEAKY, IN_PLACE = WITH_LEAKY_RELU = ("SyncBN fused, leaky ReLU", "SyncBN in place, leaky ReLU")
STEPS = Effort(rounds=11, block=0.0)  # of one step each
STEPS_ON_GPU = Effort(rounds=15, block=0.05)
QUICK_STEPS = Effort(rounds=2, block=0.0)
ON_CPU, ON_GPU, IF_QUICK = ((4,), 64), ((2, 4, 8, 16), 224), ((2,), 16)  # images per rank, height and width
NARROW = ((1,), 4)  # blocks and width if quick
SECONDS_ON_GPU = 100  # for all batches, unless told otherwise
SLOPE = 0.01  # of the leaky ReLU that norms apply


class Training:
    """A model with its optimizer on one batch: a call is a step.

    Args:
        name: of `candidates`.
        job: its ranks are those of DistributedDataParallel.
        blocks: of the ResNet.
        width: of the ResNet.
        images: (N, 3, H, W), in the memory format that the model gets as well.
        autocast: whether to compute in bfloat16 what torch.autocast takes for safe.
    """

    def __init__(
        self, name: str, job: Job, blocks: tuple[int, ...], width: int, images: Tensor, autocast: bool = False
    ):
        torch.manual_seed(0)  # all ranks and candidates start alike
        self.timed = TimedCommunicator(job.group)
        model: nn.Module = ResNet(blocks, _norms(name, self.timed), width).to(job.device)
        if images.is_contiguous(memory_format=torch.channels_last):
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model if job.group.size == 1 else distributed(model, job.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.images = images
        self.labels = torch.arange(len(images), device=job.device)
        self.autocast = partial(torch.autocast, job.device.type, torch.bfloat16, enabled=autocast)

    def __call__(self) -> None:
        """Train for one step."""
        self.optimizer.zero_grad()
        with self.autocast():
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def bytes(self) -> int:
        """Return the size of what is there between steps: parameters, buffers and the optimizer's momentum."""
        momentum = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = itertools.chain(self.model.parameters(), self.model.buffers(), momentum)
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class Row(NamedTuple):
    """How long a step took with one kind of norm, and the `share` of it that its `calls` of collectives took."""

    norm: str
    batch: int  # images of a rank
    images: int  # of all ranks
    timing: Timing
    batch_norm: Timing
    calls: float
    share: float
    memory: int | None  # bytes at the peak, on a GPU
    device: torch.device

    @property
    def noisy(self) -> bool:
        """Whether the machine had other things to do."""
        return self.timing.noisy or self.batch_norm.noisy

    @property
    def target(self) -> Verdict | None:
        """What the collectives may take of a step, and whether they do."""
        return of_collectives(self.share, self.calls, self.device, self.noisy)

    def numbers(self) -> dict[str, Any]:
        """Return the row as it is written to JSON."""
        median, low, high = self.timing
        return {
            "norm": self.norm,
            "images_per_rank": self.batch,
            "images_per_step": self.images,
            "median_ms": 1e3 * median,
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "images_per_second": self.images / median,
            "ratio": median / self.batch_norm.median,
            "peak_memory_mb": None if self.memory is None else self.memory / 1e6,
            "norm_collectives_per_step": self.calls,
            "norm_collectives_share": self.share,
            "target": self.target and self.target.numbers(),
            "noisy": self.noisy,
        }

    def cells(self) -> list[str]:
        """Return the row as it is printed."""
        median, low, high = (report.digits(1e3 * seconds) for seconds in self.timing)
        rate, ratio = self.images / self.timing.median, self.timing.median / self.batch_norm.median
        memory = [] if self.memory is None else [f"{self.memory / 1e6:,.0f}"]
        times = [median, f"{low} to {high}", f"{rate:.1f}", f"{ratio:.2f}"]
        target = self.target
        share = f"{self.share:.1%}" + (f" (<= {target.limit:.0%}: {target.cells()[-1]})" if target else "")
        return [str(self.batch), self.norm, *times, *memory, f"{self.calls:g}", share]


class Failure(NamedTuple):
    """Why a candidate could not be trained."""

    norm: str
    images_per_rank: int
    error: str


def main(
    files: report.Files,
    quick: bool = False,
    depth: int = 50,
    batch: Sequence[int] | None = None,
    size: int | None = None,
    seconds: int | None = None,
) -> None:
    """Join the job, measure, print and write on rank 0. Collective on all ranks of the job.

    Args:
        files: what to write.
        quick: few steps of a narrow ResNet.
        depth: of the ResNet, one of BLOCKS.
        batch: numbers of images per rank, one after the other.
        size: height and width of an image.
        seconds: to measure for, about. Batches that are left are named. None: SECONDS_ON_GPU, without a limit on a CPU.

    Raises:
        RuntimeError: after all was written, if a candidate failed.
    """
    job = join()
    on_gpu = job.device.type == "cuda"
    usual_batches, usual_size = IF_QUICK if quick else ON_GPU if on_gpu else ON_CPU
    batches, size = batch or usual_batches, size or usual_size
    blocks, width = NARROW if quick else (BLOCKS[depth], 64)
    effort = QUICK_STEPS if quick else STEPS_ON_GPU if on_gpu else STEPS
    budget = Budget(seconds or (SECONDS_ON_GPU if on_gpu else math.inf), job.group)
    facts = report.header(info.job())
    sections: list[list[Row]] = []
    failures: list[Failure] = []
    for number, images in enumerate(batches):
        share = budget.share(len(batches) - number)
        if share == 0:
            facts |= report.left_undone(f"{left} images per rank" for left in batches[number:])
            break
        shape, until = (images, 3, size, size), Budget(share, job.group)
        names = candidates(job.device, quick)
        sections.append(list(measure(job, names, blocks, width, shape, effort, until, failures)))
        if job.group.rank == 0:
            report.write_json(facts, report.numbers(sections, failures), files)
    if job.group.rank == 0:
        what = "a narrow ResNet" if quick else f"ResNet-{depth}"
        how = ", bfloat16 (autocast) and channels last" * on_gpu
        title = f"training step of {what}, images of {size} x {size}{how}, on {report.ranks(job.group.size)}"
        table = report.Table(title + report.WARNING * quick, _columns(on_gpu), [])
        numbers = report.numbers(sections, failures)
        report.publish_rows(facts, table, sections, numbers, files)
        if files.figure is not None:
            from . import train_figure  # needs matplotlib

            train_figure.draw(files.figure, numbers["rows"], table.title)
    if failures:
        raise RuntimeError(f"expected all candidates to train, got {failures}")


def _columns(with_memory: bool) -> list[str]:
    times = ["step ms", "quartiles", "images per second", "x BN"]
    memory = ["peak memory MB"] * with_memory
    return ["images per rank", "norm", *times, *memory, "norm collectives per step", "their share of the step"]


def candidates(device: torch.device, quick: bool = False) -> list[str]:
    """Return the norms to train with. On a CPU those with a leaky ReLU, which save memory, are for `quick` alone."""
    of_torch = [TORCH_SYNC] * (device.type == "cuda" and baselines.has_torch_group())
    return [*CANDIDATES, *of_torch, *(WITH_LEAKY_RELU if device.type == "cuda" or quick else ())]


def measure(
    job: Job,
    names: Sequence[str],
    blocks: tuple[int, ...],
    width: int,
    shape: tuple[int, ...],
    effort: Effort,
    budget: Budget,
    failures: list[Failure],
) -> Iterator[Row]:
    """Time the steps of all candidates; yield their rows. Collective on all ranks of the job.

    A candidate that fails in a job of one rank is left out and appended to `failures`. In other jobs it raises.
    """
    on_gpu = job.device.type == "cuda"
    generator = torch.Generator(job.device).manual_seed(job.group.rank)
    images = torch.randn(shape, generator=generator, device=job.device)
    if on_gpu:
        images = images.contiguous(memory_format=torch.channels_last)
    trainings: dict[str, Training] = {}
    for name in names:
        try:
            training = Training(name, job, blocks, width, images, autocast=on_gpu)
            training()
        except Exception as error:
            if job.group.size > 1 or name == BN:  # the other ranks would wait; nothing to compare with
                raise
            failures.append(Failure(name, shape[0], report.told(error)))
            continue
        trainings[name] = training
    clock = clock_of(job.device)
    effort = effort._replace(seconds=budget.left())
    timings = interleave(trainings, job.group, effort, wall(clock), together=job.group.size > 1 or not on_gpu)
    for name, training in trainings.items():
        job.group.barrier()
        share, calls = waiting(training, training.timed, effort.rounds if job.group.size > 1 else 1, clock)
        share = sum(job.group.all_gather_object(share)) / job.group.size
        memory = peak_memory(training, job.device) if on_gpu else None
        yield Row(
            name, shape[0], job.group.size * shape[0], timings[name], timings[BN], calls, share, memory, job.device
        )


def peak_memory(training: Training, device: torch.device) -> int:
    """Return the bytes that a step on a GPU needs at its peak, without those of the other trainings and the images."""
    training.optimizer.zero_grad()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    training()
    return training.bytes() + torch.cuda.max_memory_allocated(device) - before


def waiting(
    step: Callable[[], object], timed: TimedCommunicator, steps: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Return which share of some steps this rank spends in the all-reduces of `timed`, and how many a step has."""
    timed.clear()
    start = clock()
    for _ in range(steps):
        step()
    spent = clock() - start
    return timed.seconds() / spent, len(timed.calls) / steps


def _norms(name: str, group: Communicator) -> NormFactory:
    def fused(channels: int, relu: bool, add: bool, kind: str = "relu", inplace: bool = False) -> nn.Module:
        return SyncBatchNorm(channels, process_group=group, activation=kind if relu else None, inplace=inplace)

    def in_place(channels: int, relu: bool, add: bool) -> nn.Module:
        norm = fused(channels, relu and not add, add, kind="leaky_relu", inplace=True)
        return InPlace(norm, partial(F.leaky_relu, negative_slope=SLOPE, inplace=True)) if add else norm

    def separate(channels: int, relu: bool, add: bool) -> nn.Module:
        kinds = {BN: nn.BatchNorm2d, TORCH_SYNC: baselines.TorchSyncBatchNorm}
        norm = kinds[name](channels) if name in kinds else SyncBatchNorm(channels, process_group=group)
        return Separate(norm, relu)

    makers: dict[str, NormFactory] = {FUSED: fused, LEAKY: partial(fused, kind="leaky_relu"), IN_PLACE: in_place}
    return makers.get(name, separate)
