"""Tensors as MPI messages: a buffer and a datatype.

MPI reads and writes the memory of CPU tensors directly. It does the same for CUDA tensors if the MPI library is
CUDA-aware. Otherwise they are copied through pinned host memory. Strided tensors, and tensors of a dtype that MPI
cannot sum, are copied to contiguous memory first.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .datatypes import TRANSPORT
from .library import MPI

__all__ = ["cuda_aware", "memory_at", "message", "stage"]

memory_at = MPI.buffer.fromaddress  # does not keep the memory alive


def message(tensor: Tensor, datatype: MPI.Datatype | None = None) -> list[Any]:
    """Return contiguous memory in mpi4py's form. Without a datatype, the elements are only moved, never reduced."""
    if datatype is None:
        datatype = TRANSPORT[tensor.element_size()]
    return [memory_at(tensor.data_ptr(), tensor.nbytes), datatype]


def stage(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return contiguous memory that MPI can read and write: the tensor's own if possible."""
    dtype = dtype or tensor.dtype
    tensor = tensor.resolve_conj().resolve_neg()  # materialize lazy conj and neg views
    if tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.to(dtype).contiguous()
    if not cuda_aware():
        return torch.empty(tensor.shape, dtype=dtype, device="cpu", pin_memory=True).copy_(tensor)
    staged = tensor.to(dtype).contiguous()
    torch.cuda.current_stream(tensor.device).synchronize()  # MPI is not aware of CUDA streams
    return staged


@functools.cache
def cuda_aware() -> bool:
    """Return whether the MPI library reads and writes CUDA memory (`MPIX_Query_cuda_support`, Open MPI and MPICH)."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())
