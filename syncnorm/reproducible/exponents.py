"""The largest exponent over the ranks, from a sum: a message that every communicator can send.

The exponent E of a value v is the smallest integer with |v| < 2^E. Each rank adds 2^(13 E). In the sum of up to 8191 of
these the largest one decides the exponent, so the largest E can be read from the sum. A rank without values adds 0.

The range of float64 has room for 157 such numbers. So there are four float64, of which each stands for a range of
exponents, and a rank sets the one that its E falls into.

Shapes: K values; slots (4, K) float64, exponents (K,) int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.fixed_point import power_of_two

__all__ = ["MOST_RANKS", "exponents_of", "levels_in", "levels_of", "slots_of"]

SLOTS = 4
APART = 13  # bits between two exponents in a slot
IN_SLOT = 157  # exponents
MOST_RANKS = 2**APART - 1
NOT_FINITE = IN_SLOT * SLOTS - 1  # a level, as those of the exponents below
_BIAS, _MANTISSA = 1023, 52  # of float64


def levels_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the exponents of values are counted by, from 1: (K,) int64. 0: there is no value, or it is 0.

    Args:
        largest: non-negative values, (K,) float64.
        dtype: of the input. The values are such as it has, or their products.
    """
    first, step = _range(dtype)
    exponent = _field(largest) - (_BIAS - 1)
    level = exponent - first if step == 1 else torch.div(exponent - first + step - 1, step, rounding_mode="floor")
    level = level.clamp_min(1).masked_fill(largest == torch.inf, NOT_FINITE)
    return level.masked_fill(largest == 0, 0)


def slots_of(levels: Tensor) -> Tensor:
    """Return what this rank adds to the sum, (4, K)."""
    number = power_of_two(APART * (levels % IN_SLOT) - _BIAS + 1)
    here = torch.arange(SLOTS, device=levels.device).view(-1, 1) == levels // IN_SLOT
    return torch.where(here & (levels > 0), number, 0.0)


def levels_in(slots: Tensor) -> Tensor:
    """Return the largest levels, (K,), from the sum of the slots."""
    place = (_field(slots) - 1) // APART
    level = place + IN_SLOT * torch.arange(SLOTS, device=slots.device).view(-1, 1)
    return torch.where(slots > 0, level, 0).amax(0)


def exponents_of(levels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return E and whether all values are finite. Where there is no value, E is any."""
    first, step = _range(dtype)
    return first + step * levels, levels < NOT_FINITE


def _range(dtype: torch.dtype) -> tuple[int, int]:
    """Return the exponent that all smaller ones are taken for, and the step in which exponents are told apart.

    Of float32, and of products of two of them, there are 560. Of float64 there are 2098, but those below -400 do not
    matter: such values add less than 2^-800 to a variance.
    """
    return (-400, 3) if dtype == torch.float64 else (-320, 1)


def _field(values: Tensor) -> Tensor:
    """Return the exponents as float64 has them: 0 of numbers below 2^-1022, 1023 of 1."""
    return values.view(torch.int64) >> _MANTISSA
