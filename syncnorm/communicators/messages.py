"""Tensors as MPI messages: a buffer and a datatype.

CPU tensors are handed to MPI without a copy. CUDA tensors too where the MPI library says that it is CUDA-aware;
elsewhere they pass through pinned host memory. Tensors that are strided, or whose dtype MPI cannot sum, pass through a
contiguous copy.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .library import MPI

__all__ = ["ARITHMETIC", "arithmetic", "cuda_aware", "memory_at", "message", "overdue", "stage", "wait_until"]

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
REPLACED = {  # what MPI has no type for -> what it is computed in
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.complex32: torch.complex64,
}
TRANSPORT = {1: MPI.BYTE, 2: MPI.INT16_T, 4: MPI.INT32_T, 8: MPI.INT64_T, 16: MPI.C_DOUBLE_COMPLEX}  # by item size
memory_at = MPI.buffer.fromaddress  # refers to memory, does not keep it alive


def arithmetic(dtype: torch.dtype) -> tuple[torch.dtype, MPI.Datatype]:
    """Return the dtype in which MPI computes with tensors of `dtype`, and its datatype; TypeError if there is none."""
    computed = REPLACED.get(dtype, dtype)
    if computed not in ARITHMETIC:
        raise TypeError(f"expected a tensor of a dtype that MPI can sum, got {dtype}")
    return computed, ARITHMETIC[computed]


def message(tensor: Tensor, datatype: MPI.Datatype | None = None) -> list[Any]:
    """Return contiguous memory as mpi4py takes it. Without a datatype its elements are moved, not computed with."""
    if datatype is None:
        datatype = TRANSPORT[tensor.element_size()]
    return [memory_at(tensor.data_ptr(), tensor.nbytes), datatype]


def stage(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return contiguous memory that MPI can read and write: the tensor's own wherever that is possible."""
    dtype = dtype or tensor.dtype
    tensor = tensor.resolve_conj().resolve_neg()  # views whose memory is another number
    if tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.to(dtype).contiguous()
    if not cuda_aware():
        return torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=True).copy_(tensor)
    dense = tensor.to(dtype).contiguous()
    torch.cuda.current_stream(tensor.device).synchronize()  # MPI knows nothing of CUDA streams
    return dense


def wait_until(is_complete: Callable[[], bool], limit: timedelta, who: str) -> None:
    """Return when `is_complete` says so; after `limit` raise TimeoutError, naming `who` waited."""
    deadline = time.monotonic() + limit.total_seconds()
    while not is_complete():
        if time.monotonic() > deadline:
            raise TimeoutError(overdue(who, limit))
        os.sched_yield()  # ranks may share a core


def overdue(who: str, limit: timedelta) -> str:
    """Return what is said of a call whose peers have not come in time."""
    return f"{who} waited {limit.total_seconds():g} s for its peers, then its timeout expired"


@functools.cache
def cuda_aware() -> bool:
    """Whether the MPI library reads and writes CUDA memory (`MPIX_Query_cuda_support`, Open MPI and MPICH)."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())
