"""Three vectors of (2C + 1,) float64 that mypy tells apart. Each has C values, C values, and the count."""

from __future__ import annotations

from typing import TYPE_CHECKING, NewType

from torch import Tensor

__all__ = ["Packed", "RawMoments", "Statistics", "halves"]

if TYPE_CHECKING:
    RawMoments = NewType("RawMoments", Tensor)  # [mean, M2, count], with M2 = Σ (x - mean)²
    Packed = NewType("Packed", Tensor)  # [n·mean, M2 + n·mean², n]: what the ranks sum
    Statistics = NewType("Statistics", Tensor)  # [mean, invstd, count]: what backward needs
else:  # torch.compile does not trace a NewType

    def _as_it_is(tensor):
        return tensor

    RawMoments = Packed = Statistics = _as_it_is


def halves(vector: RawMoments | Packed | Statistics) -> tuple[Tensor, Tensor]:
    """Return the two vectors of C values, (C,) each, without the count."""
    one, other = vector[:-1].view(2, -1).unbind()
    return one, other
