"""The compiled kernels.

The library has functions of Python (objects.h) that read tensors themselves. A call takes less than a microsecond, in
which ctypes would not convert the arguments. The library is compiled without Python and without torch. It shares
torch's threads, because the OpenMP library that it needs is the one that torch has loaded.

Shapes are those of `reference`. A tensor that is dense neither as (N, C, *) nor as (N, *, C) is copied.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..epilogue import ACTIVATIONS, PLAIN, Epilogue, Saved
from ..layout import channels_last, in_dense_format
from ..vectors import Packed, RawMoments, Running, Stamp, StampError, Statistics
from .library import LIBRARY, OTHER_VERSION, load_with_lock

__all__ = ["CPU", "ISA", "Backward", "agree", "dense", "functions", "moments", "normalize", "weights_of"]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {name: code for code, name in enumerate(ACTIVATIONS)}


_library = load_with_lock()
_library.syncnorm_isa.restype = ctypes.c_char_p
ISA: str = os.environ.get("SYNCNORM_ISA") or _library.syncnorm_isa().decode()
if ISA not in ("avx512", "avx2", "base"):
    raise RuntimeError(f"expected SYNCNORM_ISA to be one of avx512, avx2, base, got {ISA}")

CPU = torch.device("cpu")  # which torch.set_default_device does not change


def functions(name: str, count: int) -> Iterator[Callable[..., Any]]:
    """Return the functions of the library in the table of this name, for the instruction set."""
    of_number = getattr(_library, f"syncnorm_{name}_{ISA}", None)
    if of_number is None:
        raise RuntimeError(f"expected functions for {ISA} in {LIBRARY}, got none: {OTHER_VERSION}")
    of_number.argtypes, of_number.restype = [ctypes.py_object, ctypes.c_int64], ctypes.py_object
    return (of_number(_KNOWN, number) for number in range(count))


_API = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # of DLPack
_KNOWN = (_API, None, True, Tensor, Parameter, MemoryError, StampError, RuntimeError, *DTYPES, torch.uint8, torch.int64)
_moments, _normalize, _reduce_grad, _grad_input, agree = functions("function", 5)


def moments(input: Tensor, mask: Tensor | None = None, *, stamp: Stamp | None = None) -> RawMoments | Packed:
    """See `reference.moments`."""
    x, last = dense(input)
    length = 2 * x.shape[1] + (1 if stamp is None else 3)
    result = torch.empty(length, dtype=torch.float64, device=CPU)
    weights = None if mask is None else weights_of(mask, x)
    _moments(x, last, torch.get_num_threads(), weights, result, stamp)
    return RawMoments(result)


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
    """See `reference.normalize`."""
    x, last = dense(input)
    signs, inplace = None, epilogue.inplace
    if residual is not None:
        residual = in_dense_format(residual, like=x)
        if epilogue.saves_signs:
            signs = torch.empty((1, (x.numel() + 7) // 8), dtype=torch.uint8, device=CPU)
    y = x if inplace else torch.empty_like(x)
    statistics = moments if overwrite and stamp is None else moments.new_empty(2 * x.shape[1] + 1)
    moved = None if running is None else _counted_in_int64(running)
    _normalize(
        *(x, last, torch.get_num_threads(), y, moments, stamp, weight, bias, eps, eps_outside),
        *(_ACTIVATIONS[epilogue.activation], residual, signs, inplace, statistics, moved),
    )
    if running is not None and moved is not None and moved is not running:
        running.take(moved)
    if inplace:
        y = input if x is input else input.copy_(x)
    return y, Statistics(statistics), signs


class Backward:
    """See `reference.Backward`."""

    __slots__ = "arguments", "given", "has_residual", "statistics", "weight", "x"

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
        self.given = (grad_output, saved, statistics, weight, bias), mask, epilogue
        input, signs, residual = saved
        x, last = dense(input)
        dy = grad_output
        same_layout = dy.stride() == x.stride() if last else dy.is_contiguous()
        if not same_layout or dy.dtype is not x.dtype or dy._is_zerotensor():
            dy = torch.empty_like(x).copy_(dy)
        if residual is not None:
            residual = in_dense_format(residual, like=x).to(x.dtype)
        if statistics.dtype is not torch.float64 or not statistics.is_contiguous():  # a hook of autograd has made it so
            statistics = Statistics(statistics.double().contiguous())
        if signs is not None:
            signs = signs.to(torch.uint8).contiguous()
        self.arguments = (
            *(x, last, torch.get_num_threads(), dy, statistics, weight, bias),
            *(_ACTIVATIONS[epilogue.activation], residual, signs, epilogue.inplace),
            None if mask is None else weights_of(mask, x),
        )
        self.x, self.statistics, self.weight = x, statistics, weight
        self.has_residual = residual is not None or signs is not None

    def reduce_grad(
        self, dtype: torch.dtype = torch.float64, *, stamp: Stamp | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.Backward.reduce_grad`."""
        channels = self.x.shape[1]
        sums = self.statistics.new_empty(2 * channels + (0 if stamp is None else 2))
        weight = self.weight
        if weight is not None and weight.dtype is dtype:
            grad_weight = torch.empty_like(weight)
        else:
            grad_weight = torch.empty(channels, dtype=dtype, device=CPU)
        grad_bias = torch.empty_like(grad_weight)
        _reduce_grad(self.arguments, grad_weight, grad_bias, sums, stamp)
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
        _grad_input(self.arguments, sums, stamp, centered, eps_outside, dx, dz)
        return dx, dz


def dense(tensor: Tensor) -> tuple[Tensor, bool]:
    """Return the tensor, dense, and whether its channels are last."""
    if tensor.is_contiguous():
        return tensor, False
    last = channels_last(tensor)
    return (tensor.contiguous(), False) if last is None else (tensor, last)


def _counted_in_int64(running: Running) -> Running:
    batches = running.batches
    return running if batches is None or batches.dtype is torch.int64 else running._replace(batches=batches.long())


def weights_of(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask as (N, S) weights in the dtype of the arithmetic."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return mask.expand(len(x), 1, *x.shape[2:]).to(dtype).contiguous()
