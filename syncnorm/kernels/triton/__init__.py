"""The kernels in Triton, for CUDA tensors: `reference` has the formulas and defines every result.

Shapes: input x, grad_output, residual and results (N, C, *), which lie in memory as (N, C, S), or with the channels
innermost as (N * S, C): both are read as they lie. What is per channel is float64, as in `reference`. Of the kernels'
arguments, each a pointer into contiguous memory:

    x, y, dx         (N, C, S) or (N * S, C), in the dtype of the input; y, dx written
    dy, dz           the same, in the dtype of the upstream gradient; dz written
    residual         the same
    signs            (R, ⌈V / 8⌉) uint8, one bit for each value, for R runs of V contiguous values
    mask             (N * S,) uint8 or floating point, the weight of each position; None: ones
    weight, bias     (C,) of any floating dtype, or None
    moments          (2C + 1,) = [mean, M2, count], or packed with a stamp (2C + 3,) = [n·mean, M2 + n·mean², n, h, h²]
    flag             (2,) int64, the first is written where a stamp does not match: see `flags`
    number, ranks    of the stamp
    statistics       (2C + 1,) = [mean, invstd, count]
    grad_weight      (C,) = Σ dz * x̂ of any floating dtype; grad_bias = Σ dz
    sums             (2C,) = [Σ weight * dz, Σ weight * dz * x̂], with a stamp (2C + 2,) = [sums, h, h²]
    partial          per block of channels (W, 2, BC): mean and M2, with counts (W,), or Σ dz and Σ dz * x̂
    counters         one int32 per block of channels, 0

A pass walks over tiles of BC channels by BP positions. A program has one block of channels and a run of tiles, each W
tiles after the last one, where W is the number of runs. Reductions are deterministic: each thread sums its own values
in float32 (float64 for float64 inputs), and their sums are merged in float64, within the program and then over the W
runs, by the last program of the block to finish, in the order of the runs. So a step is two kernels forward and two
backward.

Nothing reads the device: grids follow from shapes, so a CUDA graph can hold all of it.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .. import flags
from ..epilogue import PLAIN, Epilogue, Saved, rounding
from ..layout import in_dense_format
from ..signs import from_bits, to_bits
from ..vectors import Packed, RawMoments, Running, Stamp, Statistics
from . import plan
from .backward import grad_input_kernel, reduce_grad_kernel
from .launch import launch
from .moments import moments_kernel
from .normalize import normalize_kernel
from .workspace import counters

__all__ = ["Backward", "moments", "normalize"]

_NO_STAMP = 0, 0


def moments(input: Tensor, mask: Tensor | None = None, *, stamp: Stamp | None = None) -> RawMoments | Packed:
    """Return [mean, M2, count], (2C + 1,), or with a stamp packed, (2C + 3,). One kernel."""
    x = in_dense_format(input)
    division = plan.for_reduction(x)
    result = RawMoments(_empty_float64(x, 2 * x.shape[1] + (1 if stamp is None else 3)))
    tensors = (x, _positions(mask, x), result, *_workspace(x, division, counts=1))
    launch(
        moments_kernel,
        division.programs,
        tensors,
        division.sizes,
        (*division.constants, plan.UNROLL, division.rows, stamp is not None),
        (0 if stamp is None else stamp.number,),
    )
    return result


def normalize(
    input: Tensor,
    moments: RawMoments | Packed,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    *,
    stamp: Stamp | None = None,
    eps_outside: bool = False,
    epilogue: Epilogue = PLAIN,
    running: Running | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Statistics, Tensor | None]:
    """Return y, [mean, invstd, count] and the signs of z if the epilogue keeps them. One kernel.

    It updates the running statistics too. All memory is allocated before, so an error leaves them unchanged.
    """
    x = in_dense_format(input)
    division = plan.for_map(x)
    y = x if epilogue.inplace else torch.empty_like(x)
    statistics = Statistics(_empty_float64(x, 2 * x.shape[1] + 1))
    signs = None
    if epilogue.saves_signs:
        signs = torch.empty(division.lines, division.bytes, dtype=torch.uint8, device=x.device)
    moved = None if running is None else running.contiguous()
    mean, var, batches, momentum = moved or (None, None, None, None)
    launch(
        normalize_kernel,
        division.programs + (running is not None),
        (
            x,
            moments,
            *_contiguous(weight, bias),
            _like(residual, x),
            y,
            statistics,
            signs,
            mean,
            var,
            batches,
            _flag(stamp, x),
        ),
        division.sizes,
        (
            *division.constants,
            stamp is not None,
            eps_outside,
            epilogue.activation,
            running is not None and momentum is None,
            plan.RUNNING_CHANNELS,
        ),
        (_bits(eps), _bits(momentum or 0.0), *(stamp or _NO_STAMP)),
    )
    if running is not None and moved is not None:
        running.take(moved)
    if epilogue.inplace:
        y = input if y is input else input.copy_(y)
    return y, statistics, signs


class Backward:
    """See `reference.Backward`."""

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
        self.x = x = in_dense_format(saved.input)
        self.weight, bias = _contiguous(weight, bias)
        self.dtype_of_dz = grad_output.dtype if saved.has_residual else None
        kept = _like(saved.residual, x) if saved.signs is None else _rows_of_signs(saved.signs, x)
        self.read = (_like(grad_output, x), x, statistics, self.weight, bias, kept, _positions(mask, x))
        relative, least = rounding(x.dtype, epilogue.activation) if epilogue.inplace else (None, None)
        self.constants = (epilogue.activation, saved.signs is not None, relative, least)

    def reduce_grad(
        self, dtype: torch.dtype = torch.float64, *, stamp: Stamp | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.Backward.reduce_grad`. One kernel."""
        x = self.x
        division = plan.for_reduction(x)
        sums = _empty_float64(x, 2 * x.shape[1] + (0 if stamp is None else 2))
        grad_weight = torch.empty(x.shape[1], dtype=dtype, device=x.device)
        grad_bias = torch.empty_like(grad_weight)
        tensors = (*self.read, grad_weight, grad_bias, sums, *_workspace(x, division))
        constants = (*division.constants, plan.UNROLL, division.rows, *self.constants, stamp is not None)
        number = 0 if stamp is None else stamp.number
        launch(reduce_grad_kernel, division.programs, tensors, division.sizes, constants, (number,))
        return grad_weight, grad_bias, sums

    def grad_input(
        self,
        sums: Tensor | None,
        *,
        stamp: Stamp | None = None,
        centered: bool = True,
        eps_outside: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """See `reference.Backward.grad_input`. One kernel."""
        dx = torch.empty_like(self.x)
        dz = None if self.dtype_of_dz is None else torch.empty_like(self.x, dtype=self.dtype_of_dz)
        division = plan.for_map(self.x)
        launch(
            grad_input_kernel,
            division.programs,
            (*self.read, *_contiguous(sums), dx, dz, _flag(stamp, self.x)),
            division.sizes,
            (*division.constants, *self.constants, centered),
            (_bits(eps_outside), *(stamp or _NO_STAMP)),
        )
        return dx, dz


def _flag(stamp: Stamp | None, x: Tensor) -> Tensor | None:
    """Return the flag that a kernel sets if the stamp does not match."""
    return None if stamp is None else flags.of_device(x.get_device())


def _workspace(x: Tensor, division: plan.Division, counts: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """Return memory for the partial results of the runs, each a pair per channel and some counts, and counters."""
    if division.runs == 1:
        return None, None
    _, _, _, channels, _, _ = division.constants
    return (
        _empty_float64(x, division.programs * (2 * channels + counts)),
        counters(x.get_device(), division.blocks),
    )


def _rows_of_signs(signs: Tensor, x: Tensor) -> Tensor:
    """Return the signs in the rows that `normalize` here writes, if another implementation wrote them."""
    lines = plan.for_map(x).lines
    return signs if len(signs) == lines else to_bits(from_bits(signs, x), x, lines)


def _bits(value: float) -> int:
    """Return a float64 as an integer: Triton passes no floating-point argument but float32."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _empty_float64(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else in_dense_format(tensor, like=x)


def _positions(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the mask for each position, (N * S,): the order is the same in both memory formats."""
    if mask is None:
        return None
    mask = mask.expand(x.shape[0], 1, *x.shape[2:]).contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask
