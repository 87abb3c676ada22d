"""Numbers of 106 bits, as the unevaluated sum of two float64: Dekker, A floating-point technique, 1971."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["DoubleDouble"]


class DoubleDouble(NamedTuple):
    """high + low, where low is at most half a unit in the last place of high.

    Operations have a relative error of some 2^-104.
    """

    high: Tensor
    low: Tensor

    @classmethod
    def sum(cls, one: Tensor, other: Tensor) -> DoubleDouble:
        """Return the exact sum of two float64."""
        high = one + other
        moved = high - one
        return cls(high, (one - (high - moved)) + (other - moved))

    @classmethod
    def product(cls, one: Tensor, other: Tensor) -> DoubleDouble:
        """Return the exact product of two float64."""
        product = one * other
        (one, one_low), (other, other_low) = _halves(one), _halves(other)
        return cls(product, ((one * other - product) + one * other_low + one_low * other) + one_low * other_low)

    def plus(self, other: DoubleDouble) -> DoubleDouble:
        """Return the sum."""
        high, low = self.sum(self.high, other.high)
        return self.sum(high, low + (self.low + other.low))

    def minus(self, other: DoubleDouble) -> DoubleDouble:
        """Return the difference."""
        return self.plus(DoubleDouble(-other.high, -other.low))

    def times(self, other: DoubleDouble) -> DoubleDouble:
        """Return the product."""
        high, low = self.product(self.high, other.high)
        return self.sum(high, low + (self.high * other.low + self.low * other.high))

    def over(self, divisor: Tensor) -> DoubleDouble:
        """Return the quotient by a float64."""
        first = self.high / divisor
        rest = self.minus(self.product(first, divisor))
        return self.sum(first, (rest.high + rest.low) / divisor)

    def scaled(self, power_of_two: float) -> DoubleDouble:
        """Return the product with a power of two."""
        return DoubleDouble(self.high * power_of_two, self.low * power_of_two)


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return two numbers of 26 bits each, whose sum is the value."""
    moved = value * (2.0**27 + 1)
    high = moved - (moved - value)
    return high, value - high
