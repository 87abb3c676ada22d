"""Explain measured times by the model of the cost.

All-reduces are measured back to back over a range of message sizes, which gives latencies and bandwidths, and once more
with computing in between, as in a step. There they can take longer: ranks wait for the slowest one, and threads of a
backend have to wake up.

If a node has more ranks than cores, a rank that waits leaves its core to the others, so that nothing is lost until all
have computed. What counts is then the slowest rank, and what all-reduces add to it. They may even add less than they
take back to back, since some ranks compute while others wait.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..bench.timing import Timing
from .network import Network
from .trace import Trace
from .waiting import Noise, expected_maximum

__all__ = [
    "COMPUTING",
    "CONVERTED",
    "PARTS",
    "PARTS_SUMMED",
    "SUMMED",
    "Costs",
    "Samples",
    "explain",
    "of_slowest",
    "over_ranks",
]

# What is timed. The first two and PARTS do not communicate.
COMPUTING, CONVERTED, SUMMED = "computing", "computing, converted", "computing, then the gradients' all-reduce"
PARTS, PARTS_SUMMED = "parts of computing", "parts of computing, with an all-reduce after each"

Samples = Sequence[Mapping[str, Sequence[float]]]  # seconds by rank, candidate and round


class Costs(NamedTuple):
    """What a step costs. Times are in seconds.

    Attributes:
        compute: of a rank with BatchNorm, without communication and without waiting.
        converted: the same for the converted model in a group of one rank.
        noise: how the time of a step varies from rank to rank.
        statistics: the network that messages of norms see.
        gradients: the network that gradients see.
    """

    compute: float
    converted: float
    noise: Noise
    statistics: Network
    gradients: Network


def explain(samples: Samples, trace: Trace, messages: Network, gradients: Network, shares_cores: bool) -> Costs:
    """Return the costs with which the predictions of what was timed are closest to the samples.

    Args:
        samples: of all that is named above. PARTS and PARTS_SUMMED only if a step has messages.
        trace: what a step sends.
        messages: the network on which all-reduces of the norms take what they take back to back.
        gradients: the same for those of gradients.
        shares_cores: whether a node has more ranks than cores.
    """
    ranks, count = len(samples), len(trace.messages())
    mean = over_ranks(samples)
    slowest = {name: timing.median for name, timing in of_slowest(samples).items()}
    computes = slowest if shares_cores else mean
    in_step = slowest[SUMMED] - slowest[COMPUTING]
    gradients = gradients.scaled(max(1.0, in_step / gradients.gradients(trace.gradient_bytes, ranks)))

    largest = expected_maximum(ranks)
    of_step = (slowest[COMPUTING] - computes[COMPUTING]) / largest
    noise = Noise(0.0, of_step)
    included = 0.0  # in the computing of the slowest rank
    if count:
        added = slowest[PARTS_SUMMED] - computes[PARTS]
        back_to_back = count * messages.all_reduce(statistics.mean(trace.messages()), ranks)
        waits = max(0.0, added - back_to_back) / largest
        if shares_cores:
            noise = Noise.beyond_slowest(waits, count)
            included = largest * noise.of_parts
        else:
            noise = Noise.of(of_step, waits, count)
        left = added - (noise.waiting(count, ranks, ranks) - included)  # for the messages, which wake up threads, too
        messages = messages.scaled(max(left, min(added, back_to_back)) / back_to_back)
    return Costs(computes[COMPUTING] - included, computes[CONVERTED] - included, noise, messages, gradients)


def over_ranks(samples: Samples) -> dict[str, float]:
    """Return the mean over the ranks of their medians."""
    return {name: statistics.mean(statistics.median(of_rank[name]) for of_rank in samples) for name in samples[0]}


def of_slowest(samples: Samples) -> dict[str, Timing]:
    """Return the timing of the slowest rank of each round."""
    return {
        name: Timing.of([*map(max, zip(*(of_rank[name] for of_rank in samples), strict=True))]) for name in samples[0]
    }
