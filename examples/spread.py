"""Values of several seeds, and when two of them differ clearly.

Two values differ clearly if their means are further apart than CLEAR times their joint standard deviation.
"""

import math
from typing import NamedTuple

import numpy as np

CLEAR = 2


class Value(NamedTuple):
    """Numbers, one a seed; `resolution` is the smallest spread that can be meant."""

    numbers: tuple
    resolution: float = 0.0

    @classmethod
    def over(cls, values):
        """Return the mean of values, seed by seed. All are of the same test images: it resolves no more than one."""
        return cls(tuple(np.mean([value.numbers for value in values], axis=0)), values[0].resolution)

    @property
    def mean(self):
        return float(np.mean(self.numbers))

    @property
    def spread(self):
        """The standard deviation over seeds."""
        return max(float(np.std(self.numbers, ddof=1)) if len(self.numbers) > 1 else 0.0, self.resolution)

    def clear_difference(self, other):
        """Return how far apart the means have to be for the values to differ clearly."""
        return CLEAR * math.sqrt((self.spread**2 + other.spread**2) / 2)

    def clearly_above(self, other):
        return len(self.numbers) > 1 and self.mean - other.mean > self.clear_difference(other)

    def text(self, digits, unit=""):
        spread = f" ± {self.spread:.{digits}f}" if len(self.numbers) > 1 else ""
        return f"{self.mean:.{digits}f}{spread}{unit}"


def chance(seeds):
    """Return how often two values that do not differ would differ clearly, by Student's t-test."""
    from scipy import stats

    return 2 * stats.t.sf(CLEAR * math.sqrt(seeds / 2), 2 * seeds - 2)
