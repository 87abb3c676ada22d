"""How long ranks wait for the slowest of them, because their computing times vary.

A step has L collectives of norms, with equal parts of the computing between them. The times of the parts are normal,
with noise from two sources: one that is drawn anew for each part, and one that is the same in all parts of a step. In
each collective, the ranks of a group wait for the slowest one. So the first source costs in each collective, and the
second one once in a step. At the end of the step, all ranks wait for the slowest group.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

__all__ = ["Noise", "deviation_of_maximum", "expected_maximum"]


class Noise(NamedTuple):
    """How the computing time of a step varies from rank to rank and step to step.

    Attributes:
        of_parts: the standard deviation of the step, in seconds, from the source that is drawn anew in each part.
        of_steps: the same from the source that stays for a step.
    """

    of_parts: float
    of_steps: float = 0.0

    @classmethod
    def of(cls, step: float, waits: float, points: int) -> Noise:
        """Return the noise that explains how long ranks wait.

        It solves sqrt(L) σ + τ = waits, with σ² + τ² = step². There is a solution if `waits` is from `step` to
        sqrt(L + 1) `step`. Below, τ is the mean of both measurements. Above, it is the noise with which ranks wait
        longest.

        Args:
            step: the standard deviation of the computing time of a step, in seconds.
            waits: for how long ranks wait in a step with L collectives, in units of E[p].
            points: L.
        """
        if waits <= step:
            return cls(0.0, (waits + step) / 2)
        waits = min(waits, math.sqrt(points + 1) * step)
        root = math.sqrt(max(0.0, (points + 1) * step**2 - waits**2))
        of_parts = (math.sqrt(points) * waits - root) / (points + 1)
        return cls(of_parts, waits - math.sqrt(points) * of_parts)

    @classmethod
    def beyond_slowest(cls, waits: float, points: int) -> Noise:
        """Return the noise of parts with which ranks wait so long beyond the computing of the slowest one.

        It solves sqrt(L) σ - σ = waits. Arguments are those of `of`.
        """
        return cls(waits / (math.sqrt(points) - 1) if points > 1 else 0.0)

    @property
    def total(self) -> float:
        """The standard deviation of a step from both sources."""
        return math.hypot(self.of_parts, self.of_steps)

    def waiting(self, points: int, group: int, ranks: int) -> float:
        """Return how many seconds a step is longer than that of a rank which waits for no other.

            L E[k] σ / sqrt(L) + sqrt((E[p / k] D[k] σ)² + (E[p] τ)²)

        E[k] and D[k] are the mean and the standard deviation of the largest of k standard normal numbers, σ is
        `of_parts` and τ is `of_steps`.

        Args:
            points: L, the number of collectives of norms in a step.
            group: k, the number of ranks that wait for each other in each of them. 1: they have none.
            ranks: p, of the job.
        """
        group = min(group, ranks)
        in_groups = math.sqrt(max(1, points)) * expected_maximum(group) * self.of_parts
        at_the_end = expected_maximum(-(-ranks // group)) * deviation_of_maximum(group) * self.of_parts
        return in_groups + math.hypot(at_the_end, expected_maximum(ranks) * self.of_steps)


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
