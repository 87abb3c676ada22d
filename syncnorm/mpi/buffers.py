"""Tensors as MPI messages: a buffer and a datatype.

CPU tensors are handed to MPI without a copy. CUDA tensors too where the MPI library says that it is CUDA-aware;
elsewhere they pass through pinned host memory. Tensors that are strided, or whose dtype MPI cannot sum, pass through a
contiguous copy.
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

memory_at = MPI.buffer.fromaddress  # refers to memory, does not keep it alive


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


@functools.cache
def cuda_aware() -> bool:
    """Whether the MPI library reads and writes CUDA memory (`MPIX_Query_cuda_support`, Open MPI and MPICH)."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())
