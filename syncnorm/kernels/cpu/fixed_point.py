"""The compiled passes that sum in fixed point: what `..fixed_point` computes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import fixed_point as reference
from ..epilogue import PLAIN, Epilogue, Saved
from ..fixed_point import digits_of, power_of_two
from ..vectors import Statistics
from . import binding
from .binding import CPU, dense, functions, weights_of

__all__ = ["Gradient", "largest_input", "sums_of_input"]

_largest_input, _sums_of_input, _largest_gradient, _largest_in_double, _sums_of_gradient = functions("fixed_point", 5)
LARGEST = 500  # the exponent of x up to which x² and its origin, 3 times as large, have a float64


def largest_input(input: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `fixed_point.largest_input`."""
    return _over_input(_largest_input, input, mask, None, torch.zeros(input.shape[1], dtype=torch.float64, device=CPU))


def sums_of_input(input: Tensor, mask: Tensor | None, exponent: Tensor, of_mask: Tensor) -> Tensor:
    """See `fixed_point.sums_of_input`."""
    exponents = torch.stack([exponent, 2 * exponent]) + of_mask
    if input.dtype is torch.float64 and exponents.numel() and exponents.max() > 2 * LARGEST:
        return reference.sums_of_input(input, mask, exponent, of_mask)
    sums = torch.zeros(sum(digits_of(input.dtype)), 2, input.shape[1], dtype=torch.float64, device=CPU)
    return _over_input(_sums_of_input, input, mask, 3 * power_of_two(exponents), sums)


class Gradient:
    """See `fixed_point.Gradient`."""

    def __init__(
        self,
        grad_output: Tensor,
        saved: Saved,
        statistics: Statistics,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        mask: Tensor | None = None,
        epilogue: Epilogue = PLAIN,
    ):
        self.given = grad_output, saved, statistics, weight, bias
        self.mask, self.epilogue = mask, epilogue
        self.arguments = binding.Backward(*self.given, mask=mask, epilogue=epilogue).arguments
        self.dtype, self.channels = saved.input.dtype, saved.input.shape[1]

    def largest(self) -> Tensor:
        """See `fixed_point.Gradient.largest`."""
        if not self.given[0].numel():
            return torch.zeros(2, self.channels, dtype=torch.float64, device=CPU)
        largest = self._run(_largest_gradient, None, 2)
        return reference.with_allowance(largest, self.dtype, lambda: self._run(_largest_in_double, None, 2)[1])

    def sums(self, exponents: Tensor) -> Tensor:
        """See `fixed_point.Gradient.sums`."""
        if self.dtype is torch.float64 and exponents.numel() and exponents.max() > 2 * LARGEST:
            return reference.Gradient(*self.given, mask=self.mask, epilogue=self.epilogue).sums(exponents)
        return self._run(_sums_of_gradient, 3 * power_of_two(exponents), 2 * digits_of(self.dtype)[0], 2)

    def _run(self, function: Callable[..., None], origins: Tensor | None, *size: int) -> Tensor:
        result = torch.zeros(*size, self.channels, dtype=torch.float64, device=CPU)
        if self.given[0].numel():
            function(self.arguments, origins, result)
        return result


def _over_input(function: Callable[..., None], input: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
    """Run a pass, unless there are no values. Return the last argument, its result."""
    if input.numel():
        x, last = dense(input)
        weights = None if mask is None else weights_of(mask, x)
        function(x, last, torch.get_num_threads(), weights, *rest)
    result: Tensor = rest[-1]
    return result
