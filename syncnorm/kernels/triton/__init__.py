"""The kernels in Triton, for CUDA tensors: `reference` has the formulas and defines every result.

Shapes: input x, grad_output, residual and results (N, C, *), which lie in memory as (N, C, S), or with the channels
innermost as (N * S, C): both are read as they lie. What is per channel is float64, as in `reference`. Of the kernels'
arguments, each a pointer into contiguous memory:

    x, y, dx         (N, C, S) or (N * S, C), in the dtype of the input; y, dx written
    dy, dz           the same, in the dtype of the upstream gradient; dz written
    residual         the same
    signs            (⌈numel / 8⌉,) uint8, one bit for each value, in the order of memory; or one byte for each
    mask             (N * S,) uint8 or floating point, the weight of each position; None: ones
    weight, bias     (C,) of any floating dtype, or None
    moments          (2C + 1,) = [mean, M2, count]; partial moments (W, 2C + 1)
    packed           (2C + 1,) = [n·mean, M2 + n·mean², n]
    statistics       (2C + 1,) = [mean, invstd, count]
    grad_weight      (C,) = Σ dz * x̂ in float64 or float32; grad_bias = Σ dz
    sums             (2, C) = [Σ weight * dz, Σ weight * dz * x̂]; partial sums (W, 2, C) = [Σ dz, Σ dz * x̂]

A pass walks over tiles of BC channels by BP positions. A program has one block of channels and a run of `per` tiles
along N and S, and there are W runs. Reductions are deterministic: each thread sums its own values in float32 (float64
for float64 inputs), their sums are merged in float64, within the program and then over the W runs by a second kernel.
Nothing asks the device: grids follow from shapes, so a CUDA graph can hold all of it.
"""

import struct

import torch
import triton
from torch import Tensor

from ..epilogue import PLAIN, Epilogue, Saved, rounding
from ..layout import in_dense_format
from ..vectors import Packed, RawMoments, Statistics
from . import plan
from .backward import grad_input_kernel, merge_sums_kernel, reduce_grad_kernel
from .moments import merge_moments_kernel, moments_kernel, pack_kernel, unpack_kernel, update_running_kernel
from .normalize import normalize_kernel, to_bits_kernel

__all__ = ["Backward", "moments", "normalize", "pack", "unpack", "update_running"]


def moments(input: Tensor, mask: Tensor | None = None) -> RawMoments:
    """Return [mean, M2, count], (2C + 1,). One kernel, and one to merge its runs if there are several."""
    x = in_dense_format(input)
    division = plan.for_reduction(x)
    partial = _empty_float64(x, division.runs, 2 * x.shape[1] + 1)
    plan.launch(moments_kernel, division, x, _positions(mask, x), partial)
    if division.runs == 1:
        return RawMoments(partial[0])
    result = RawMoments(_empty_float64(x, partial.shape[1]))
    plan.merge_runs(merge_moments_kernel, x, partial, result)
    return result


def pack(moments: RawMoments) -> Packed:
    """Replace moments by [n·mean, M2 + n·mean², n], (2C + 1,)."""
    return Packed(plan.launch_per_channel(pack_kernel, moments))


def unpack(packed: Packed) -> RawMoments:
    """Replace `packed` by the moments, (2C + 1,), that it stands for."""
    return RawMoments(plan.launch_per_channel(unpack_kernel, packed))


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    moments: RawMoments,
    momentum: float | None,
) -> None:
    """Move the buffers in place towards mean and M2 / (n - 1), by momentum or 1 / num_batches_tracked, if n > 0."""
    with torch.cuda.device_of(running_mean):
        update_running_kernel[(1,)](
            running_mean,
            running_var,
            num_batches_tracked,
            moments,
            _bits(momentum or 0.0),
            running_mean.shape[0],
            running_mean.stride(0),
            running_var.stride(0),
            CUMULATIVE=momentum is None,
            BLOCK=plan.RUNNING_BLOCK,
            **plan.OPTIONS,
        )


def normalize(
    input: Tensor,
    moments: RawMoments,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    *,
    eps_outside: bool = False,
    epilogue: Epilogue = PLAIN,
) -> tuple[Tensor, Statistics, Tensor | None]:
    """Return y, [mean, invstd, count] and the signs of z if the epilogue keeps them. One kernel.

    Where the innermost size is no multiple of 8, the signs go through a byte each and a second kernel.
    """
    x = in_dense_format(input)
    division = plan.for_map(x)
    y = x if epilogue.inplace else torch.empty_like(x)
    statistics = Statistics(torch.empty_like(moments))
    whole_bytes = division.constants["ALIGN"] >= 8
    values = x.numel() // 8 if whole_bytes else x.numel()
    signs = torch.empty(values, dtype=torch.uint8, device=x.device) if epilogue.saves_signs else None
    pointers = (x, moments, *_contiguous(weight, bias), _like(residual, x), y, statistics, signs)
    plan.launch(
        normalize_kernel,
        division,
        *pointers,
        _bits(eps),
        EPS_OUTSIDE=eps_outside,
        ACTIVATION=epilogue.activation,
        WHOLE_BYTES=whole_bytes,
    )
    if signs is not None and not whole_bytes:
        signs = _to_bits(signs)
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
        kept = saved.signs if saved.signs is not None else _like(saved.residual, x)
        self.read = (_like(grad_output, x), x, statistics, self.weight, bias, kept, _positions(mask, x))
        relative, least = rounding(x.dtype, epilogue.activation) if epilogue.inplace else (None, None)
        self.constants = {
            "ACTIVATION": epilogue.activation,
            "KEPT_SIGNS": saved.signs is not None,
            "ROUNDING": relative,
            "LEAST_ROUNDING": least,
        }

    def reduce_grad(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.Backward.reduce_grad`. One kernel, or two as in `moments`, and casts to half precision."""
        x = self.x
        division = plan.for_reduction(x)
        sums = _empty_float64(x, 2, x.shape[1])
        wide = dtype if dtype == torch.float32 else torch.float64
        grad_weight, grad_bias = torch.empty_like(sums[0], dtype=wide), torch.empty_like(sums[0], dtype=wide)
        results = (grad_weight, grad_bias, sums)
        if division.runs == 1:
            plan.launch(reduce_grad_kernel, division, *self.read, None, *results, **self.constants)
        else:
            partial = _empty_float64(x, division.runs, 2, x.shape[1])
            plan.launch(reduce_grad_kernel, division, *self.read, partial, None, None, None, **self.constants)
            plan.merge_runs(merge_sums_kernel, x, partial, self.weight, *results)
        return grad_weight.to(dtype), grad_bias.to(dtype), sums

    def grad_input(
        self, sums: Tensor | None, *, centered: bool = True, eps_outside: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """See `reference.Backward.grad_input`. One kernel."""
        dx = torch.empty_like(self.x)
        dz = None if self.dtype_of_dz is None else torch.empty_like(self.x, dtype=self.dtype_of_dz)
        pointers = (*self.read, *_contiguous(sums), dx, dz)
        division = plan.for_map(self.x)
        plan.launch(grad_input_kernel, division, *pointers, _bits(eps_outside), CENTERED=centered, **self.constants)
        return dx, dz


def _to_bits(positive: Tensor) -> Tensor:
    bits = torch.empty(triton.cdiv(positive.numel(), 8), dtype=torch.uint8, device=positive.device)
    if len(bits):
        with torch.cuda.device_of(bits):
            programs = triton.cdiv(len(bits), plan.BITS_BLOCK)
            to_bits_kernel[(programs,)](positive, bits, len(positive), plan.BITS_BLOCK, **plan.OPTIONS)
    return bits


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
