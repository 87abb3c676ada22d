"""The compiled passes that sum in fixed point: what `..fixed_point` computes, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import fixed_point, reference
from ..fixed_point import digits_of, power_of_two
from .binding import CPU, Backward, dense, functions, weights_of

__all__ = ["largest_gradient", "largest_input", "sums_of_gradient", "sums_of_input"]

_largest_input, _sums_of_input, _largest_gradient, _largest_in_double, _sums_of_gradient = functions("fixed_point", 5)
LARGEST = 500  # the exponent of x up to which x² and its origin, 3 times as large, have a float64


def largest_input(input: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `fixed_point.largest_input`."""
    return _over_input(_largest_input, input, mask, None, torch.zeros(input.shape[1], dtype=torch.float64, device=CPU))


def sums_of_input(input: Tensor, mask: Tensor | None, exponent: Tensor, of_mask: Tensor) -> Tensor:
    """See `fixed_point.sums_of_input`."""
    exponents = torch.stack([exponent, 2 * exponent]) + of_mask
    if input.dtype is torch.float64 and exponents.numel() and exponents.max() > 2 * LARGEST:
        return fixed_point.sums_of_input(input, mask, exponent, of_mask)
    sums = torch.zeros(sum(digits_of(input.dtype)), 2, input.shape[1], dtype=torch.float64, device=CPU)
    return _over_input(_sums_of_input, input, mask, 3 * power_of_two(exponents), sums)


def largest_gradient(backward: Backward) -> Tensor:
    """See `fixed_point.largest_gradient`."""
    largest = _over_gradient(_largest_gradient, backward, None, 2)
    in_double = functools.partial(_over_gradient, _largest_in_double, backward, None, 2)
    return fixed_point.with_allowance(largest, backward.x.dtype, lambda: in_double()[1])


def sums_of_gradient(backward: Backward, exponents: Tensor) -> Tensor:
    """See `fixed_point.sums_of_gradient`."""
    dtype = backward.x.dtype
    if dtype is torch.float64 and exponents.numel() and exponents.max() > 2 * LARGEST:
        given, mask, epilogue = backward.given
        return fixed_point.sums_of_gradient(reference.Backward(*given, mask=mask, epilogue=epilogue), exponents)
    return _over_gradient(_sums_of_gradient, backward, 3 * power_of_two(exponents), 2 * digits_of(dtype)[0], 2)


def _over_gradient(function: Callable[..., None], backward: Backward, origins: Tensor | None, *size: int) -> Tensor:
    """Run a pass, unless there are no values. Return its result."""
    result = torch.zeros(*size, backward.x.shape[1], dtype=torch.float64, device=CPU)
    if backward.x.numel():
        function(backward.arguments, origins, result)
    return result


def _over_input(function: Callable[..., None], input: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    """Run a pass, unless there are no values. Return the last argument, its result."""
    if input.numel():
        x, last = dense(input)
        weights = None if mask is None else weights_of(mask, x)
        function(x, last, torch.get_num_threads(), weights, *rest)
    result: Tensor = rest[-1]
    return result
