"""The compiled kernels, called by ctypes.

The library uses neither Python nor torch. It shares torch's threads, because the OpenMP library that it needs is the
one that torch has loaded.

Shapes are those of `reference`. A tensor that is dense neither as (N, C, *) nor as (N, *, C) is copied.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from ..epilogue import ACTIVATIONS, PLAIN, Epilogue, Saved
from ..layout import channels_last, in_dense_format
from ..vectors import Packed, RawMoments, Running, Stamp, StampError, Statistics
from .library import check_layouts, load

__all__ = ["ISA", "Backward", "moments", "normalize"]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {name: code for code, name in enumerate(ACTIVATIONS)}


_library = load()
_library.syncnorm_isa.restype = ctypes.c_char_p
ISA: str = os.environ.get("SYNCNORM_ISA") or _library.syncnorm_isa().decode()
if ISA not in ("avx512", "avx2", "base"):
    raise RuntimeError(f"expected SYNCNORM_ISA to be one of avx512, avx2, base, got {ISA}")

# The structs of arguments.h. Arguments travel as one of them: a ctypes call of 16 arguments costs more than to pack it.
_SHAPE, _PARAMETERS, _EPILOGUE = "6q", "PPq", "qPPq"
_STAMP = "2q"
_RUNNING = "PPqPqd"
_BACKWARD = _SHAPE + "PPP" + _PARAMETERS + _EPILOGUE + "P"
_LAYOUTS = {
    "Shape": _SHAPE,
    "Parameters": _PARAMETERS,
    "Epilogue": _EPILOGUE,
    "Stamp": _STAMP,
    "Running": _RUNNING,
    "MomentsArguments": _SHAPE + "PPP" + _STAMP,
    "NormalizeArguments": _SHAPE + "PPP" + _STAMP + _PARAMETERS + "dq" + _EPILOGUE + "P" + _RUNNING,
    "BackwardArguments": _BACKWARD,
    "ReduceGradArguments": _BACKWARD + "qPPP" + _STAMP,
    "GradInputArguments": _BACKWARD + "P" + _STAMP + "qdPP",
}


check_layouts(_LAYOUTS)


def _function(name: str, arguments: str) -> Callable[..., None]:
    call = getattr(_library, f"syncnorm_{ISA}_{name}")
    call.argtypes = [ctypes.c_char_p]
    pack = struct.Struct(_LAYOUTS[arguments]).pack

    def function(*values: float) -> None:
        failure = call(pack(*values))
        if failure:
            raise _error(failure, name)

    return function


def _error(failure: int, name: str) -> Exception:
    """Return the exception for what a function of the library returns if it fails."""
    if failure == _MISMATCH:
        return StampError()
    return MemoryError(f"expected memory for the intermediate sums of {name}, got none")


_MISMATCH = 2  # Failure in arguments.h
_NO_STAMP = 0, 0
_moments = _function("moments", "MomentsArguments")
_normalize = _function("normalize", "NormalizeArguments")
_reduce_grad = _function("reduce_grad", "ReduceGradArguments")
_grad_input = _function("grad_input", "GradInputArguments")


def moments(input: Tensor, mask: Tensor | None = None, *, stamp: Stamp | None = None) -> RawMoments | Packed:
    """See `reference.moments`."""
    x, shape = _dense(input)
    weights = _weights(mask, x)
    length = 2 * shape[1] + (1 if stamp is None else 3)
    result = RawMoments(torch.empty(length, dtype=torch.float64, device="cpu"))
    _moments(*shape, x.data_ptr(), _pointer(weights), result.data_ptr(), *(stamp or _NO_STAMP))
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
) -> tuple[Tensor, Statistics, Tensor | None]:
    """See `reference.normalize`."""
    x, shape = _dense(input)
    weight, bias, parameters = _parameters(weight, bias)
    signs, inplace = None, epilogue.inplace
    if residual is not None:
        residual = in_dense_format(residual, like=x)
        if epilogue.saves_signs:
            signs = torch.empty((1, (x.numel() + 7) // 8), dtype=torch.uint8, device="cpu")
    y = x if inplace else torch.empty_like(x)
    statistics = Statistics(torch.empty(2 * shape[1] + 1, dtype=torch.float64, device="cpu"))
    pointers = (x.data_ptr(), y.data_ptr(), moments.data_ptr(), *(stamp or _NO_STAMP))
    what_follows = (_ACTIVATIONS[epilogue.activation], _pointer(residual), _pointer(signs), inplace)
    moved = None if running is None else _that_kernels_can_move(running)
    _normalize(
        *(*shape, *pointers, *parameters, eps, eps_outside, *what_follows, statistics.data_ptr()),
        *(_NOT_RUNNING if moved is None else _running(moved)),
    )
    if running is not None and moved is not None and moved is not running:
        running.take(moved)
    if inplace:
        y = input if x is input else input.copy_(x)
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
        x, shape = _dense(saved.input)
        dy = grad_output
        if dy.stride() != x.stride() or dy.dtype != x.dtype:
            dy = torch.empty_like(x).copy_(dy)
        weight, bias, parameters = _parameters(weight, bias)
        residual = None if saved.residual is None else in_dense_format(saved.residual, like=x)
        weights = _weights(mask, x)
        self.arguments = (
            *(*shape, dy.data_ptr(), x.data_ptr(), statistics.data_ptr(), *parameters),
            *(_ACTIVATIONS[epilogue.activation], _pointer(residual), _pointer(saved.signs), epilogue.inplace),
            _pointer(weights),
        )
        self.x, self.channels, self.has_residual = x, shape[1], saved.has_residual
        self.alive = dy, statistics, weight, bias, residual, saved.signs, weights  # as long as the pointers

    def reduce_grad(
        self, dtype: torch.dtype = torch.float64, *, stamp: Stamp | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.Backward.reduce_grad`."""
        length = 2 * self.channels + (0 if stamp is None else 2)
        sums = torch.empty(length, dtype=torch.float64, device="cpu")
        grad_weight = torch.empty(self.channels, dtype=dtype, device="cpu")
        grad_bias = torch.empty_like(grad_weight)
        pointers = (grad_weight.data_ptr(), grad_bias.data_ptr(), sums.data_ptr())
        _reduce_grad(*self.arguments, DTYPES[dtype], *pointers, *(stamp or _NO_STAMP))
        return grad_weight, grad_bias, sums

    def grad_input(
        self,
        sums: Tensor | None,
        *,
        stamp: Stamp | None = None,
        centered: bool = True,
        eps_outside: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """See `reference.Backward.grad_input`."""
        dx = torch.empty_like(self.x)
        dz = torch.empty_like(self.x) if self.has_residual else None
        options = (*(stamp or _NO_STAMP), centered, eps_outside)
        _grad_input(*self.arguments, _pointer(sums), *options, dx.data_ptr(), _pointer(dz))
        return dx, dz


def _dense(tensor: Tensor) -> tuple[Tensor, tuple[int, int, int, bool, int, int]]:
    """Return the tensor, dense, and its Shape: N, C, S, channels_last, dtype, threads."""
    last = False if tensor.is_contiguous() else channels_last(tensor)
    if last is None:
        tensor, last = tensor.contiguous(), False
    shape, values = tensor.shape, tensor.numel()
    n, c = shape[0], shape[1]
    s = values // (n * c) if values else shape[2:].numel()
    return tensor, (n, c, s, last, DTYPES[tensor.dtype], torch.get_num_threads())


def _parameters(
    weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, tuple[int, int, int]]:
    """Return weight and bias, contiguous and of one dtype, and their Parameters."""
    if weight is not None:
        weight = weight.contiguous()
        if bias is None:
            return weight, None, (weight.data_ptr(), 0, DTYPES[weight.dtype])
        if bias.dtype != weight.dtype:
            both = torch.promote_types(weight.dtype, bias.dtype)
            weight, bias = weight.to(both), bias.to(both)
        bias = bias.contiguous()
        return weight, bias, (weight.data_ptr(), bias.data_ptr(), DTYPES[weight.dtype])
    if bias is None:
        return None, None, (0, 0, 0)
    bias = bias.contiguous()
    return None, bias, (0, bias.data_ptr(), DTYPES[bias.dtype])


_NOT_RUNNING = (0, 0, -1, 0, False, 0.0)


def _that_kernels_can_move(running: Running) -> Running:
    """Return the buffers, or copies of them if they are not contiguous and of the usual dtypes."""
    mean, var, batches, momentum = running
    if (
        mean.dtype in (torch.float32, torch.float64)
        and mean.dtype == var.dtype
        and mean.is_contiguous()
        and var.is_contiguous()
        and (batches is None or batches.dtype == torch.int64)
    ):
        return running
    counted = None if batches is None else batches.to(torch.int64, copy=True)
    return Running(mean.double().contiguous().clone(), var.double().contiguous().clone(), counted, momentum)


def _running(running: Running) -> tuple[int, int, int, int, bool, float]:
    mean, var, batches, momentum = running
    return (
        *(mean.data_ptr(), var.data_ptr(), DTYPES[mean.dtype], _pointer(batches)),
        *(momentum is None, momentum or 0.0),
    )


def _weights(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the mask as (N, S) weights in the dtype of the arithmetic."""
    if mask is None:
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return mask.expand(len(x), 1, *x.shape[2:]).to(dtype).contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
