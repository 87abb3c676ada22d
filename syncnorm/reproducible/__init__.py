"""Moments and sums of gradients whose bits do not depend on how the batch is divided over ranks and threads.

They are added up in fixed point (`kernels.fixed_point`), which takes two all-reduces where one takes floating point:

1. the exponent of the largest value of each channel, which gives all ranks the same scale;
2. the sums of the digits, integers in float64.

What follows from the sums is computed on each rank in the same way, M2 = Σ x² - (Σ x)² / n in numbers of 106 bits.

Shapes: input (N, C, *); exponents as in `exponents`; digits (levels, 2, C).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import finite, kernels, transforms
from ..exchange import Exchange
from ..kernels import Backward, FixedPoint, RawMoments, StampError, Statistics, fixed_point, halves
from ..kernels.fixed_point import times_power_of_two
from ..moments import Moments
from .double_double import DoubleDouble
from .exponents import MOST_RANKS, exponents_of, levels_in, levels_of, slots_of

__all__ = ["NOT_DIFFERENTIABLE", "moments_in_fixed_point", "sums_in_fixed_point"]

NOT_DIFFERENTIABLE = (
    "expected no transform of torch.func, no forward-mode AD, no tracer and no backward with create_graph=True for a "
    "norm with reproducible=True, got one: it would have to differentiate rounding. Set reproducible=False for it"
)
OF_MASK = -60, 1000  # exponents
BELOW_ONE = 1 - 2.0**-53  # gives a weight of 1 the exponent 0


def moments_in_fixed_point(
    input: Tensor,
    mask: Tensor | None,
    *others: Tensor | None,
    exchange: Exchange,
    centered: bool = True,
    checks: bool = False,
) -> Moments:
    """Return the moments of the inputs of all ranks, (N, C, *) each, weighted by the mask. See `Moments.of`.

    Collectives: on more than one rank, an all-reduce of 4C + 6 float64 and one of 4C + 4, for float64 input 10C + 4.

    Raises:
        NonFiniteError: on all ranks, with `checks`, if the input of a rank has NaN or Inf.
        RuntimeError: a transform or a tracer is active.
    """
    if transforms.active():
        raise RuntimeError(NOT_DIFFERENTIABLE)
    chosen = kernels.select(input, mask, *others)
    _, passes = kernels.with_fixed_point(chosen)
    dtype = input.dtype
    largest = passes.largest_input(input, mask)  # (C,)
    of_mask = largest.new_ones(1) if mask is None else _largest_weight(mask).to(largest)
    exponent, is_finite = _largest_exponent(torch.cat([largest, of_mask * BELOW_ONE]), dtype, exchange, backward=False)
    exponent, of_mask, is_finite = exponent[:-1], exponent[-1].clamp(*OF_MASK), is_finite[:-1] & is_finite[-1]
    digits = passes.sums_of_input(input, mask, exponent, of_mask)
    message = torch.cat([digits.flatten(), _count(input, mask, of_mask)])
    message = _summed(message, exchange, backward=False)
    count = _number(message[-2:].view(1, 2, 1))
    digits, (levels, _) = message[:-2].view_as(digits), fixed_point.digits_of(dtype)
    values = _moments(
        _number(digits[:levels]), _number(digits[levels:]), count, exponent, of_mask, dtype, centered=centered
    )
    values[:-1].view(2, -1).masked_fill_(~is_finite, torch.nan)
    if checks:
        finite.check(values, torch.cat([largest, largest]), input, exchange, backward=False)
    return Moments(RawMoments(values), None, chosen, centered=centered)


def sums_in_fixed_point(
    passes: FixedPoint,
    backward: Backward,
    grad_output: Tensor,
    input: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    *,
    dtype: torch.dtype,
    exchange: Exchange,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `Backward.reduce_grad` does: this rank's gradients of weight and bias, and the sums of all ranks.

    The weight has to be the same on all ranks.

    Collectives: on more than one rank, an all-reduce of 8C + 2 float64 and one of 4C + 2, for float64 input 8C + 2.
    """
    of_input, channels = input.dtype, input.shape[1]
    largest = passes.largest_gradient(backward)  # (2, C), of dz and dz * (x - mean)
    exponent, is_finite = _largest_exponent(largest.flatten(), of_input, exchange, backward=True)
    digits = passes.sums_of_gradient(backward, exponent.view(2, channels))
    summed = _summed(digits, exchange, backward=True)
    _, invstd = halves(statistics)

    def unscaled(digits: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.cat([_number(of).high for of in digits.view(2, -1, 2, channels)])  # (2C,)
        sums = times_power_of_two(sums, exponent, of_input).masked_fill(~is_finite, torch.nan)
        return sums[:channels], sums[channels:] * invstd

    of_bias, of_weight = own = unscaled(digits)
    total = own if summed is digits else unscaled(summed)
    sums = torch.cat([sum if weight is None else sum * weight for sum in total])
    if finite.checks():
        finite.check(sums, largest.flatten(), grad_output, exchange, backward=True)
    return of_weight.to(dtype), of_bias.to(dtype), sums


def _largest_exponent(
    largest: Tensor, dtype: torch.dtype, exchange: Exchange, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """Return the exponents of the largest values of all ranks, and whether they are finite. Issues one all-reduce."""
    levels = levels_of(largest, dtype)
    if exchange.size > 1:
        levels = levels_in(_summed(slots_of(levels), exchange, backward=backward))
    return exponents_of(levels, dtype)


def _summed(message: Tensor, exchange: Exchange, *, backward: bool) -> Tensor:
    """Return the sum of a message over the ranks. Issues one all-reduce, with the stamp of the call."""
    stamp = exchange.stamp(backward=backward)
    if stamp is None:
        return message
    if exchange.size > MOST_RANKS:
        raise RuntimeError(f"expected at most {MOST_RANKS} ranks with reproducible=True, got {exchange.size}")
    stamped = torch.cat([message.flatten(), *kernels.reference.tail(stamp, message)])
    summed = exchange.all_reduce(stamped, backward=backward)
    try:
        matches = kernels.reference.check(summed, stamp)
    except StampError:
        raise exchange.mismatch(backward=backward) from None
    summed = summed if matches is None else torch.where(matches, summed, 0)
    return summed[:-2].view_as(message)


def _largest_weight(mask: Tensor) -> Tensor:
    return mask.double().amax().view(1) if mask.numel() else mask.new_zeros(1).double()


def _count(input: Tensor, mask: Tensor | None, of_mask: Tensor) -> Tensor:
    """Return the sum of the weights as digits [high, low], (2,)."""
    if mask is None:
        positions = len(input) * input.shape[2:].numel()
        high = positions * fixed_point.power_of_two(fixed_point.DIGIT - fixed_point.LOW_BITS - of_mask)
        return torch.stack([high, torch.zeros_like(high)])
    weights = mask.to(kernels.reference.compute_dtype(input)).expand(len(input), 1, *input.shape[2:])
    return fixed_point.sum_of(weights.double() * fixed_point.power_of_two(-of_mask))


def _number(digits: Tensor) -> DoubleDouble:
    """Return the sums that digits stand for, (K,), from (levels, 2, K)."""
    total = None
    for level, (high, low) in enumerate(digits):
        of_level = DoubleDouble.sum(high * 2.0**fixed_point.LOW_BITS, low).scaled(
            2.0 ** -(fixed_point.DIGIT * (level + 1))
        )
        total = of_level if total is None else total.plus(of_level)
    assert total is not None
    return total


def _moments(
    sum: DoubleDouble,
    sum_of_squares: DoubleDouble,
    count: DoubleDouble,
    exponent: Tensor,
    of_mask: Tensor,
    dtype: torch.dtype,
    *,
    centered: bool,
) -> Tensor:
    """Return [mean, M2, count], (2C + 1,), from Σ w x, Σ w x² and Σ w, which are in units of 2^exponent of x and w."""
    zero = torch.zeros_like(sum.high)
    mean = sum.over(torch.where(count.high > 0, count.high, 1)) if centered else DoubleDouble(zero, zero)
    m2 = sum_of_squares.minus(sum.times(mean)).high.clamp_min(0)
    m2 = times_power_of_two(times_power_of_two(m2, exponent, dtype), exponent, dtype)
    values = [times_power_of_two(mean.high, exponent, dtype)]
    return torch.cat([*values, *(times_power_of_two(sum, of_mask, dtype) for sum in (m2, count.high))])
