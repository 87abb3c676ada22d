"""`python -m syncnorm bench train`: steps of a ResNet under DistributedDataParallel, by its norms.

Candidates: BatchNorm on each rank alone; SyncBatchNorm in its place; SyncBatchNorm that also adds the residual and
applies the ReLU. They take turns on the same images. A process alone trains without DistributedDataParallel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import info
from ..communicators import Communicator
from ..modules import SyncBatchNorm
from ..testing import TimedCommunicator
from . import report
from .job import Job, join
from .resnet import BLOCKS, NormFactory, ResNet, Separate
from .timing import Candidates, Effort, Timing, clock_of, interleave

__all__ = ["CANDIDATES", "Row", "Training", "main", "measure", "waiting"]

BN, SYNC, FUSED = CANDIDATES = ("BN", "SyncBN", "SyncBN fused")
STEPS = Effort(rounds=11, block=0.0)  # of one step each
QUICK_STEPS = Effort(rounds=2, block=0.0)
ON_CPU, ON_GPU, IF_QUICK = (4, 64), (32, 224), (2, 32)  # images per rank, height and width
NARROW = ((1, 1, 1, 1), 8)  # blocks and width if quick
COLUMNS = (
    "norm",
    "step ms",
    "quartiles",
    "images per second",
    "x BN",
    "norm collectives per step",
    "their share of the step",
)


class Training:
    """A model with its optimizer on one batch: a call is a step.

    Args:
        name: of CANDIDATES.
        job: its ranks are those of DistributedDataParallel.
        blocks: of the ResNet.
        width: of the ResNet.
        images: (N, 3, H, W).
    """

    def __init__(self, name: str, job: Job, blocks: tuple[int, ...], width: int, images: Tensor):
        torch.manual_seed(0)  # all ranks and candidates start alike
        self.timed = TimedCommunicator(job.group)
        model: nn.Module = ResNet(blocks, _norms(name, self.timed), width).to(job.device)
        self.model = model if job.group.size == 1 else _distributed(model, job.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.images = images
        self.labels = torch.arange(len(images), device=job.device)

    def __call__(self) -> None:
        """Train for one step."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class Row(NamedTuple):
    """How long a step took with one kind of norm, and the `share` of it that its `calls` of collectives took."""

    norm: str
    images: int  # of all ranks
    timing: Timing
    batch_norm: Timing
    calls: float
    share: float

    @property
    def noisy(self) -> bool:
        """Whether the machine had other things to do."""
        return self.timing.noisy or self.batch_norm.noisy

    def numbers(self) -> dict[str, Any]:
        """Return the row as it is written to JSON."""
        median, low, high = self.timing
        return {
            "norm": self.norm,
            "images_per_step": self.images,
            "median_ms": 1e3 * median,
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "images_per_second": self.images / median,
            "ratio": median / self.batch_norm.median,
            "norm_collectives_per_step": self.calls,
            "norm_collectives_share": self.share,
            "noisy": self.noisy,
        }

    def cells(self) -> list[str]:
        """Return the row as it is printed."""
        median, low, high = (report.digits(1e3 * seconds) for seconds in self.timing)
        rate, ratio = self.images / self.timing.median, self.timing.median / self.batch_norm.median
        spread = f"{low} to {high}"
        return [self.norm, median, spread, f"{rate:.1f}", f"{ratio:.2f}", f"{self.calls:g}", f"{self.share:.1%}"]


def main(
    files: report.Files, quick: bool = False, depth: int = 50, batch: int | None = None, size: int | None = None
) -> None:
    """Join the job, measure, print and write on rank 0. Collective on all ranks of the job.

    Args:
        files: what to write.
        quick: few steps of a narrow ResNet.
        depth: of the ResNet, one of BLOCKS.
        batch: images per rank.
        size: height and width of an image.
    """
    job = join()
    usual_batch, usual_size = IF_QUICK if quick else ON_GPU if job.device.type == "cuda" else ON_CPU
    shape = (batch or usual_batch, 3, size or usual_size, size or usual_size)
    blocks, width = NARROW if quick else (BLOCKS[depth], 64)
    rows = list(measure(job, blocks, width, shape, QUICK_STEPS if quick else STEPS))
    told = info.job()
    if job.group.rank == 0:
        what = "a narrow ResNet" if quick else f"ResNet-{depth}"
        images = f"{shape[0]} images of {shape[2]} x {shape[3]} per rank"
        title = f"training step of {what}, {images}, on {report.ranks(job.group.size)}" + report.WARNING * quick
        numbers = {"rows": [row.numbers() for row in rows]}
        report.publish_rows(report.header(told), report.Table(title, COLUMNS, [], names=1), [rows], numbers, files)


def measure(job: Job, blocks: tuple[int, ...], width: int, shape: tuple[int, ...], effort: Effort) -> Iterator[Row]:
    """Time the steps of all candidates; yield their rows. Collective on all ranks of the job."""
    generator = torch.Generator().manual_seed(job.group.rank)
    images = torch.randn(shape, generator=generator, device="cpu").to(job.device)
    trainings = {name: Training(name, job, blocks, width, images) for name in CANDIDATES}
    candidates: Candidates = trainings
    clock = clock_of(job.device)
    timings = interleave(candidates, job.group, effort, clock, together=True)
    for name, training in trainings.items():
        job.group.barrier()
        share, calls = waiting(training, training.timed, effort.rounds, clock)
        share = sum(job.group.all_gather_object(share)) / job.group.size
        yield Row(name, job.group.size * len(images), timings[name], timings[BN], calls, share)


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
    def fused(channels: int, relu: bool) -> nn.Module:
        return SyncBatchNorm(channels, process_group=group, activation="relu" if relu else None)

    def separate(channels: int, relu: bool) -> nn.Module:
        norm = nn.BatchNorm2d(channels) if name == BN else SyncBatchNorm(channels, process_group=group)
        return Separate(norm, relu)

    return fused if name == FUSED else separate


def _distributed(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap the model, without DDP's broadcast of buffers for any norm; torch 2.13 gave that option another name."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    option = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **option)  # type: ignore[arg-type]
