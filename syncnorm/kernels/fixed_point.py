"""Sums in fixed point, in plain PyTorch operations: the same bits in whatever order the terms are added.

A sum of floating-point numbers depends on its order, because each addition rounds. Sums of integers do not. So each
term v is scaled by a power of two to |v| < 1, and cut into digits of 51 bits:

    v = q0 2^-51 + q1 2^-102 + ...        q0 = round(v 2^51), ties to even, |q0| <= 2^51; |q1|, ... <= 2^50

The digits are integers, whose sums are exact. What is below the last digit is rounded off, for each term by itself.
So neither the order of the terms nor their division among ranks and threads changes the sum.

One digit is enough for float32. It holds all bits of an x that is at most 2^27 times smaller than the largest one, and
all bits of an x² where x is at most 4 times smaller. So it is exact where the mean is large, and M2 = Σ x² - (Σ x)² / n
cancels. Terms of float64 have two digits, squares three.

A sum of digits is passed on as two float64, [high, low] with high * 2^36 + low: both are integers, and exact on up to
2^13 ranks and for up to 2^38 terms.

Shapes: as in `reference`; exponents int64, each E of values |v| <= 2^E; L digits of x and K of x², 1 and 1 or, for
float64, 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import reference
from .vectors import halves

__all__ = [
    "DIGIT",
    "LOW_BITS",
    "digits_of",
    "largest_gradient",
    "largest_input",
    "power_of_two",
    "sum_of",
    "sums_of_gradient",
    "sums_of_input",
    "times_power_of_two",
    "with_allowance",
]

DIGIT = 51  # bits
LOW_BITS = 36
ROUNDING = 2.0**-20  # what float32 adds to x - mean is far less than this part of what it cannot hold of the mean
LEAST_PRODUCT = 2.0**-100  # of float32, whose rounding is relative
_PART = 17  # bits: a digit is added up in three parts, so that 64 bits hold the sum of 2^46 of them


def digits_of(dtype: torch.dtype) -> tuple[int, int]:
    """Return L and K, the digits of a term of an input of this dtype, and of its square."""
    return (2, 3) if dtype == torch.float64 else (1, 1)


def largest_input(input: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return max |x| where the mask is not 0, (C,) float64. It is infinite where such an x is NaN or infinite."""
    return _largest(input if mask is None else torch.where(mask == 0, 0, input))


def sums_of_input(input: Tensor, mask: Tensor | None, exponent: Tensor, of_mask: Tensor) -> Tensor:
    """Return the sums of the digits of w x and w x², (L + K, 2, C) float64.

    Args:
        input: (N, C, *).
        mask: what expands to (N, 1, *), or None: w = 1.
        exponent: of x, (C,).
        of_mask: of w, ().
    """
    levels, of_squares = digits_of(input.dtype)
    value = _scaled(_counted(input, mask), exponent)
    square = value.square()
    zero = value.new_zeros(())
    rest = _error_of_square(value, square) if of_squares > 1 else zero
    if mask is not None:
        weight = mask.to(reference.compute_dtype(input)).double()
        value, square, rest = value * weight, square * weight, rest * weight
    value, square, rest = (times_power_of_two(term, -of_mask) for term in (value, square, rest))
    return torch.stack([*_sums_of_digits(value, zero, levels), *_sums_of_digits(square, rest, of_squares)])


def largest_gradient(backward: reference.Backward) -> Tensor:
    """Return max |dz|, and what |dz * (x - mean)| does not exceed, (2, C) float64.

    They are infinite where a value is NaN or infinite. The second one is computed in the dtype of the arithmetic,
    unless it is too large or too small for that, and doubled: an allowance for all rounding.
    """
    dz, magnitude = backward.dz, backward.centered.abs()
    if not backward.epilogue.inplace:  # else x - mean is not computed from the mean
        mean, _ = halves(backward.statistics)
        magnitude = magnitude + reference.per_channel((mean - mean.to(dz.dtype)).abs() * ROUNDING, dz)
    largest = torch.stack([_largest(dz), _largest(dz * magnitude)])
    return with_allowance(largest, dz.dtype, lambda: _largest(_product(backward)))


def sums_of_gradient(backward: reference.Backward, exponents: Tensor) -> Tensor:
    """Return the sums of the digits of dz and dz * (x - mean), (2L, 2, C) float64. Exponents of both: (2, C)."""
    levels, _ = digits_of(backward.input.dtype)
    terms = backward.dz.double(), _product(backward)
    scaled = [_scaled(term, exponent) for term, exponent in zip(terms, exponents, strict=True)]
    zero = scaled[0].new_zeros(())
    return torch.stack([sum for term in scaled for sum in _sums_of_digits(term, zero, levels)])


def _product(backward: reference.Backward) -> Tensor:
    """Return dz * (x - mean) in float64."""
    dz, x, mask = backward.dz.double(), backward.input, backward.mask
    if backward.epilogue.inplace:
        return dz * backward.centered.double()
    mean, _ = halves(backward.statistics)
    centered = x.double() - reference.per_channel(mean, dz)
    return dz * (centered if mask is None else torch.where((mask == 0) & (dz == 0), 0, centered))


def with_allowance(largest: Tensor, dtype: torch.dtype, in_double: Callable[[], Tensor]) -> Tensor:
    """Return max |dz| and the bound of |dz * (x - mean)|, (2, C), from these computed in `dtype`.

    Where float32 has no such product, it is that of `in_double`.
    """
    of_dz, of_product = largest
    bound = of_product
    if dtype != torch.float64:
        unknown = (of_dz > 0) & of_dz.isfinite() & ((of_product < LEAST_PRODUCT) | of_product.isinf())
        if is_compiling() or not unknown.is_cpu or unknown.any():  # a GPU is not waited for
            bound = torch.where(unknown, in_double(), bound)
    return torch.stack([of_dz, 2 * bound])


def sum_of(values: Tensor) -> Tensor:
    """Return the sum of the first digits of all values, |v| < 1, as [high, low], (2,) float64."""
    return _sums_of_digits(values.double().reshape(-1, 1), values.new_zeros(()).double(), 1)[0].view(2)


def _counted(input: Tensor, mask: Tensor | None) -> Tensor:
    """Return x in float64, 0 where the mask is: there it may hold anything."""
    x = input.double()
    return x if mask is None else torch.where(mask == 0, 0, x)


def _largest(values: Tensor) -> Tensor:
    if values.numel() == 0:
        return torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    largest = values.abs().amax(reference.reduced_axes(values)).double()
    return torch.where(largest.isfinite(), largest, torch.inf)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^E in float64, for -1022 <= E <= 1023, exactly."""
    return ((exponent + 1023) << 52).view(torch.float64)


def times_power_of_two(values: Tensor, exponent: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return values * 2^E in float64, for |E| <= 2000, exactly unless the result has no float64.

    `dtype`: of the input. Unless that is float64, |E| is at most 1000.
    """
    if dtype != torch.float64:
        return values * power_of_two(exponent)
    first = exponent.clamp(-1000, 1000)
    return values * power_of_two(first) * power_of_two(exponent - first)


def _scaled(values: Tensor, exponent: Tensor) -> Tensor:
    """Return values, (N, C, *), in units of 2^E, (C,)."""
    return times_power_of_two(values, -exponent.view(1, -1, *[1] * (values.dim() - 2)))


def _error_of_square(value: Tensor, square: Tensor) -> Tensor:
    """Return value² - square, where square is the rounded value², to the 106th bit of value² (Dekker, 1971)."""
    high = (value.view(torch.int64) & -(2**27)).view(torch.float64)
    low = value - high
    return ((high * high - square) + 2 * (high * low)) + low * low


def _sums_of_digits(value: Tensor, rest: Tensor, levels: int) -> list[Tensor]:
    """Return the sums of so many digits of value + rest, as [high, low], (2, C) each."""
    sums, origin = [], 3.0
    for level in range(levels):
        rounded = (value + origin) - origin  # to a multiple of 2^-51 of the origin's
        sums.append(_sum_of_integers((rounded * 2.0 ** (DIGIT * (level + 1))).long()))
        value = value - rounded
        value = value + rest if level == 0 else value
        origin *= 2.0**-DIGIT
    return sums


def _sum_of_integers(digits: Tensor) -> Tensor:
    axes, most = reference.reduced_axes(digits), 2**_PART - 1
    high = (digits >> 2 * _PART).sum(axes)
    middle = ((digits >> _PART) & most).sum(axes)
    low = (digits & most).sum(axes)
    middle = middle + (low >> _PART)  # from here on low and middle have _PART bits each
    high, low, middle = high + (middle >> _PART), low & most, middle & most
    rest = 2 * _PART - LOW_BITS  # -2: two bits of high go to low
    low = ((high & (2**-rest - 1)) << 2 * _PART) + (middle << _PART) + low
    return torch.stack([high >> -rest, low]).double()
