"""Three vectors of (2C + 1,) float64 that mypy tells apart. Each has C values, C values, and the count."""

from __future__ import annotations

from typing import TYPE_CHECKING, NewType

from torch import Tensor

__all__ = ["Packed", "RawMoments", "Statistics", "first", "second"]

if TYPE_CHECKING:
    RawMoments = NewType("RawMoments", Tensor)  # [mean, M2, count], with M2 = Σ (x - mean)²
    Packed = NewType("Packed", Tensor)  # [n·mean, M2 + n·mean², n]: what the ranks sum
    Statistics = NewType("Statistics", Tensor)  # [mean, invstd, count]: what backward needs
else:  # torch.compile does not trace a NewType

    def _as_it_is(tensor):
        return tensor

    RawMoments = Packed = Statistics = _as_it_is


def first(vector: RawMoments | Statistics) -> Tensor:
    """Return the mean, (C,)."""
    return vector[: len(vector) // 2]


def second(vector: RawMoments | Statistics) -> Tensor:
    """Return M2 or invstd, (C,)."""
    return vector[len(vector) // 2 : -1]
