"""The MPI datatype of each torch dtype."""

from __future__ import annotations

import torch

from .library import MPI

__all__ = ["ARITHMETIC", "TRANSPORT", "arithmetic"]

ARITHMETIC = {
    torch.float64: MPI.DOUBLE,
    torch.float32: MPI.FLOAT,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
    torch.int16: MPI.INT16_T,
    torch.int8: MPI.INT8_T,
    torch.uint64: MPI.UINT64_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint8: MPI.UINT8_T,
}
REPLACED = {  # dtypes without an MPI datatype -> the dtype that they are reduced in
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.complex32: torch.complex64,
}
TRANSPORT = {1: MPI.BYTE, 2: MPI.INT16_T, 4: MPI.INT32_T, 8: MPI.INT64_T, 16: MPI.C_DOUBLE_COMPLEX}  # by item size


def arithmetic(dtype: torch.dtype) -> tuple[torch.dtype, MPI.Datatype]:
    """Return the dtype in which MPI reduces tensors of `dtype`, and its MPI datatype; TypeError if there is none."""
    computed = REPLACED.get(dtype, dtype)
    if computed not in ARITHMETIC:
        raise TypeError(f"expected a tensor of a dtype that MPI can sum, got {dtype}")
    return computed, ARITHMETIC[computed]
