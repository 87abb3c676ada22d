"""How long ranks wait for the slowest of them, if their computing times vary.

A step has L collectives of norms, with equal parts of the computing between them. The times of these parts are
independent and normal, with a standard deviation of σ / sqrt(L), so that those of whole steps have σ. In each
collective, the ranks of a group wait for the slowest one. At the end of the step, all ranks wait for the slowest group.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

__all__ = ["deviation_of_maximum", "expected_maximum", "waiting"]


def waiting(sigma: float, points: int, group: int, ranks: int) -> float:
    """Return how many seconds a step is longer than that of a rank which waits for no other.

        L E[k] s + E[p / k] D[k] s sqrt(L),    s = σ / sqrt(L)

    E[k] and D[k] are the mean and the standard deviation of the largest of k standard normal numbers.

    Args:
        sigma: σ, the standard deviation of the computing time of a step, in seconds.
        points: L, the number of collectives of norms in a step.
        group: k, the number of ranks that wait for each other in each of them. 1: they have none.
        ranks: p, of the job.
    """
    group = min(group, ranks)
    points = max(1, points)
    of_part = sigma / math.sqrt(points)
    within_groups = points * expected_maximum(group) * of_part
    at_the_end = expected_maximum(-(-ranks // group)) * deviation_of_maximum(group) * of_part * math.sqrt(points)
    return within_groups + at_the_end


def expected_maximum(count: int) -> float:
    """Return the mean of the largest of `count` standard normal numbers. It grows as sqrt(2 ln(count))."""
    return _moments(count)[0]


def deviation_of_maximum(count: int) -> float:
    """Return the standard deviation of the largest of `count` standard normal numbers."""
    return _moments(count)[1]


@lru_cache
def _moments(count: int) -> tuple[float, float]:
    """Integrate x and (x - mean)^2 over the density k φ(x) Φ(x)^(k - 1). φ and Φ are those of the normal distribution.

    The trapezoidal rule converges exponentially for such a function, which vanishes at both ends.
    """
    if count == 1:
        return 0.0, 1.0
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, device="cpu")
    density = count * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * torch.special.ndtr(x) ** (count - 1)
    mean = torch.trapezoid(x * density, x)
    variance = torch.trapezoid((x - mean).square() * density, x)
    return float(mean), float(variance.sqrt())
