"""The launch of a kernel. The first with arguments of certain types compiles it, later ones find the result."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor

from .plan import OPTIONS

__all__ = ["launch"]

# Triton 3.2 leaves constants out of what a compiled kernel is called with.
_CALLS_WITH_CONSTANTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
_ALIGNMENT = 16  # bytes: what Triton compiles for, if it finds all addresses to be multiples
_LARGEST = 2**31 - 1  # number that Triton passes as an int32
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    constants: tuple[Any, ...],
    integers: tuple[int, ...] = (),
) -> None:
    """Launch a kernel on the device of its first tensor. Its parameters are tensors, integers, sizes and constants.

    Triton looks at each argument of a launch to find the compiled kernel, which takes longer than the launch itself.
    Here the dtypes and the constants tell which one it will find, unless an address is not aligned or a size is large.
    So this function looks them up, and calls the compiled kernel with addresses.

    Args:
        kernel: the jitted function.
        programs: to launch.
        tensors: on one device, contiguous in the kernel's sense.
        sizes: not negative; Triton passes them as int32 or int64.
        constants: compile-time constants.
        integers: what the kernel declares as int64, such as float64 values by their bits.
    """
    assert tensors[0] is not None
    device = tensors[0].get_device()
    if device < 0:  # in the interpreter
        kernel[(programs,)](*tensors, *integers, *sizes, *constants, **OPTIONS)
        return
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(kernel, programs, tensors, sizes, constants, integers)
        return
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    usual = reduce(or_, addresses) % _ALIGNMENT == 0 and max(sizes) <= _LARGEST
    key = id(kernel), device, constants, *[None if tensor is None else tensor.dtype for tensor in tensors]
    compiled = _compiled.get(key) if usual else None
    if compiled is not None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled[programs, 1, 1](*addresses, *integers, *sizes, *constants, stream=stream)
        return
    found = kernel[(programs,)](*tensors, *integers, *sizes, *constants, **OPTIONS)
    if usual and _CALLS_WITH_CONSTANTS:
        _compiled[key] = found
