"""The predicted time of a step: computing, the messages of the norms, waiting, and the gradients' all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .explain import Costs
from .trace import Trace

__all__ = [
    "BN",
    "GLOBAL",
    "LOCAL",
    "NODE",
    "TORCH",
    "TWO_LEVELS",
    "Prediction",
    "Step",
    "Variant",
    "of_block",
    "variants",
]

BN, LOCAL = "BatchNorm", "GroupNorm, LayerNorm, RMSNorm"
GLOBAL, NODE, TWO_LEVELS = (
    "SyncBatchNorm, all ranks",
    "SyncBatchNorm, each node",
    "SyncBatchNorm, all ranks in two levels",
)
TORCH = "torch.nn.SyncBatchNorm"
BLOCKS = (2, 4, 8, 16, 32)


class Variant(NamedTuple):
    """A way to normalize.

    Attributes:
        name: as it is printed.
        group: the number of ranks that share statistics. None: all of them.
        messages: returns the seconds of all messages of a step over a group of so many ranks.
    """

    name: str
    group: int | None
    messages: Callable[[Step, int], float] | None


class Step(NamedTuple):
    """A training step of a rank.

    Attributes:
        trace: what it sends.
        batch: samples of a rank.
        costs: of computing and communication.
    """

    trace: Trace
    batch: int
    costs: Costs

    def predict(self, variant: Variant, ranks: int) -> Prediction:
        """Return how long a step takes on so many ranks."""
        group = min(variant.group or ranks, ranks)
        costs = self.costs
        is_converted = variant.messages is not None and variant.name != TORCH
        collectives = self.trace.collectives_of_torch() if variant.name == TORCH else len(self.trace.messages())
        return Prediction(
            variant.name,
            ranks,
            group,
            samples=1 if variant.name == LOCAL else self.batch * group,
            reference=costs.compute,
            compute=costs.converted if is_converted else costs.compute,
            messages=variant.messages(self, group) if variant.messages and group > 1 else 0.0,
            waiting=costs.noise.waiting(collectives, group, ranks),
            gradients=costs.gradients.gradients(self.trace.gradient_bytes, ranks),
        )


class Prediction(NamedTuple):
    """The step of one variant on a number of ranks. Times are in seconds.

    Attributes:
        variant: its name.
        ranks: of the job.
        group: ranks that share statistics.
        samples: of which each statistic is taken.
        reference: computing with BatchNorm.
        compute: computing with this variant.
        messages: the collectives of the norms.
        waiting: for the slowest rank.
        gradients: their all-reduce.
    """

    variant: str
    ranks: int
    group: int
    samples: int
    reference: float
    compute: float
    messages: float
    waiting: float
    gradients: float

    @property
    def step(self) -> float:
        """The whole step. Nothing overlaps."""
        return self.compute + self.messages + self.waiting + self.gradients

    @property
    def efficiency(self) -> float:
        """The computing time with BatchNorm over the time of the step."""
        return self.reference / self.step

    def numbers(self) -> dict[str, Any]:
        """Return the prediction as it is written to JSON."""
        times = {
            f"{name}_ms": 1e3 * getattr(self, name) for name in ("compute", "messages", "waiting", "gradients", "step")
        }
        counts = {"variant": self.variant, "ranks": self.ranks, "group": self.group, "samples": self.samples}
        return {**counts, **times, "efficiency": self.efficiency}


def variants(ranks: int, ranks_per_node: int) -> list[Variant]:
    """Return the variants that differ on so many ranks."""
    blocks = [k for k in BLOCKS if k < ranks and k != ranks_per_node]
    nodes = 1 < ranks_per_node < ranks
    return [
        Variant(BN, 1, None),
        *map(of_block, blocks),
        *([Variant(NODE, ranks_per_node, _all_reduces)] if nodes else []),
        Variant(GLOBAL, None, _all_reduces),
        *([Variant(TWO_LEVELS, None, _two_levels)] if nodes else []),
        Variant(TORCH, None, _as_torch),
        Variant(LOCAL, 1, None),
    ]


def of_block(ranks: int) -> Variant:
    """Return the variant that synchronizes blocks of so many consecutive ranks."""
    return Variant(f"SyncBatchNorm, groups of {ranks}", ranks, _all_reduces)


def _all_reduces(step: Step, group: int) -> float:
    return sum(step.costs.statistics.all_reduce(size, group) for size in step.trace.messages())


def _two_levels(step: Step, group: int) -> float:
    return sum(step.costs.statistics.two_levels(size, group) for size in step.trace.messages())


def _as_torch(step: Step, group: int) -> float:
    """Forward an all-gather of 2C + 1 float32, backward an all-reduce of 2C. Without its wait for the GPU."""
    network = step.costs.statistics
    forward = sum(network.all_gather(4 * (2 * call.channels + 1), group) for call in step.trace.calls)
    backward = [call.channels for call in step.trace.calls if call.backward]
    return forward + sum(network.all_reduce(4 * 2 * channels, group) for channels in backward)
