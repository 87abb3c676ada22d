"""The passes over the data. An implementation is a module with the functions of `Kernels`; `select` picks one.

`reference`, made of torch's own operations, defines what they compute. Kernels import nothing of the package outside of
this folder: they know tensors alone.

By default, `select` takes the fastest implementation for the device: `cpu` for CPU tensors, `triton` for CUDA tensors,
and the reference where that cannot be used. On CUDA it then warns once.

SYNCNORM_KERNELS=reference, cpu or triton chooses one. It is read once. If that implementation cannot be imported, or
does not support a tensor's device or dtype, or ROCm, `select` raises. Four cases use the reference whatever the choice
is, because no compiled kernel could do what they ask for:

- torch.compile, torch.export and torch.jit.trace: their compiler has to see torch's operations, and generates its own
  kernels from them.
- The transforms of torch.func, forward-mode AD, batched gradients and double backward: they differentiate or batch each
  operation. The callers of `select` decide this, by `transforms.active`.
- Tensor subclasses, such as DTensor and FakeTensor: they need not have memory of their own to read.
- Meta tensors: they have no values, so only shapes and dtypes are computed.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import NoneType
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from . import fixed_point, flags, reference
from .epilogue import ACTIVATIONS, PLAIN, Epilogue, Saved
from .plain import plain
from .vectors import Packed, RawMoments, Running, Stamp, StampError, Statistics, halves

__all__ = [
    "ACTIVATIONS",
    "PLAIN",
    "Backward",
    "Epilogue",
    "FixedPoint",
    "Kernels",
    "Packed",
    "RawMoments",
    "Running",
    "Saved",
    "Stamp",
    "StampError",
    "Statistics",
    "fixed_point",
    "flags",
    "halves",
    "of_cpu",
    "plain",
    "quick_check",
    "reference",
    "select",
    "with_fixed_point",
]


class Kernels(Protocol):
    """What an implementation has. Inputs are (N, C, *) in any memory format; `reference` has the formulas."""

    def moments(self, input: Tensor, mask: Tensor | None = None, *, stamp: Stamp | None = None) -> RawMoments | Packed:
        """Input -> [mean, M2, count], or with a stamp packed for the all-reduce [n·mean, M2 + n·mean², n, h, h²]."""
        ...

    def normalize(
        self,
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
        """Input and moments -> y, [mean, invstd, count], and the signs of z if the epilogue saves them.

        With a stamp, the moments are packed sums over its ranks. Updates the running statistics. An error leaves them
        unchanged. So does a mismatch of the stamp: it raises StampError, or on a GPU it sets the flag of the device.
        With `overwrite` the statistics may take the memory of the moments.
        """
        ...

    def Backward(  # noqa: N802
        self,
        grad_output: Tensor,
        saved: Saved,
        statistics: Statistics,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        mask: Tensor | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> Backward:
        """Gradient, what forward saved, [mean, invstd, count] -> the passes before and after the collective."""
        ...


class Backward(Protocol):
    """The passes of the backward."""

    def reduce_grad(
        self, dtype: torch.dtype = torch.float64, *, stamp: Stamp | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> gradients of weight and bias; sums = [Σ weight * dz, Σ weight * dz * x̂], with a stamp [sums, h, h²]."""
        ...

    def grad_input(
        self,
        sums: Tensor | None,
        *,
        stamp: Stamp | None = None,
        centered: bool = True,
        eps_outside: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Those sums of all shards -> dx, and dz if a residual was there. Checks the stamp as `normalize` does."""
        ...


class FixedPoint(Protocol):
    """The passes whose sums have the same bits in any order. `fixed_point` has the formulas."""

    def largest_input(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Input -> max |x|, (C,)."""
        ...

    def sums_of_input(self, input: Tensor, mask: Tensor | None, exponent: Tensor, of_mask: Tensor) -> Tensor:
        """Input, exponents of x and w -> digits of Σ w x and Σ w x², (L + K, 2, C)."""
        ...

    def largest_gradient(self, backward: Any) -> Tensor:
        """`Backward` of the same implementation -> what |dz| and |dz * (x - mean)| do not exceed, (2, C)."""
        ...

    def sums_of_gradient(self, backward: Any, exponents: Tensor) -> Tensor:
        """The same, and exponents of both, (2, C) -> digits of the sums, (2L, 2, C)."""
        ...


def with_fixed_point(kernels: Kernels) -> tuple[Kernels, FixedPoint]:
    """Return an implementation with passes in fixed point, and these: the given one, or on GPUs the reference."""
    own = getattr(kernels, "fixed_point", None)
    return (reference, fixed_point) if own is None else (kernels, own)


def select(tensor: Tensor, *others: Tensor | None) -> Kernels:
    """Return the implementation for a tensor; `others` are what else goes in.

    Raises:
        RuntimeError: SYNCNORM_KERNELS names no implementation, or one that cannot be imported or cannot be used for
            tensors of that device and dtype.
    """
    if not _PLAIN.issuperset(map(type, (tensor, *others))) or torch.compiler.is_dynamo_compiling():
        return reference
    return _implementation("cpu" if tensor.is_cpu else tensor.device.type, tensor.dtype)  # the type takes its time


@functools.cache
def quick_check() -> Callable[..., bool]:
    """Return a function that tells in 0.4 µs whether the tensors of a batch norm fit together, if it can.

    It is called with the input, running_mean, running_var, weight, bias and num_batches_tracked, of which all but the
    input may be None. It returns True if they are plain tensors on the CPU, all but the last one floating point, the
    input (N, C, *), the vectors (C,), and the last one of one value. False: they may fit together or not.
    """
    try:
        return getattr(_implementation("cpu", torch.float32), "agree", _cannot_tell)
    except RuntimeError:  # of SYNCNORM_KERNELS. `select` raises it, for the tensors that it concerns
        return _cannot_tell


def _cannot_tell(*tensors: Tensor | None) -> bool:
    return False


def of_cpu(dtype: torch.dtype) -> Kernels:
    """Return the implementation for plain tensors on the CPU. Raises as `select` does."""
    return _implementation("cpu", dtype)


_PLAIN = {Tensor, Parameter, NoneType}
_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}
_OF_DTYPE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INSTALL = {"reference": "syncnorm", "cpu": "--no-cache-dir --force-reinstall --no-deps syncnorm", "triton": "triton"}


@functools.cache
def _implementation(device: str, dtype: torch.dtype) -> Kernels:
    asked = os.environ.get("SYNCNORM_KERNELS")
    name = asked or _OF_DEVICE.get(device, "reference")
    if name not in _INSTALL:
        raise RuntimeError(f"expected SYNCNORM_KERNELS to be one of {', '.join(_INSTALL)}, got {name}")
    if name == "reference" or device == "meta":
        return reference
    problem, cause = _unsupported(name, device, dtype), None
    if problem is None:
        try:
            return cast(Kernels, importlib.import_module(f".{name}", __name__))
        except ImportError as error:
            problem, cause = f"cannot be imported ({error}): pip install {_INSTALL[name]}", error
    if asked:
        raise RuntimeError(f"SYNCNORM_KERNELS={name}, but the {name} kernels {problem}") from cause
    if device == "cuda":
        _warn_once(f"CUDA tensors use the slow reference kernels: the {name} kernels {problem}")
    return reference


def _unsupported(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Return what the kernels of that name do not support, if there is anything."""
    if name != _OF_DEVICE.get(device) and not (name == "triton" and device == "cpu" and _interpreted()):
        return f"do not support {device} tensors"
    if dtype not in _OF_DTYPE:
        return f"do not support {dtype}"
    if device == "cuda" and torch.version.hip is not None:
        return "do not support ROCm"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _interpreted() -> bool:
    """Return whether Triton is told to interpret its kernels, which it does on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
