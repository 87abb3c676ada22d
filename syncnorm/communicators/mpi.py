"""An mpi4py communicator: MPI collectives directly on the memory of the tensors.

CPU tensors are handed to MPI without a copy. CUDA tensors too where the MPI library says that it is CUDA-aware;
elsewhere they pass through pinned host memory. Tensors that are strided, or whose dtype MPI has no type for
(float16 and bfloat16 are summed in float32), pass through a contiguous copy.

Importing this module imports mpi4py, which initializes MPI.
"""

from __future__ import annotations

import ctypes
import functools
import time
from datetime import timedelta
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

__all__ = ["MpiCommunicator"]

DATATYPES = {
    torch.float64: MPI.DOUBLE,
    torch.float32: MPI.FLOAT,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.int64: MPI.INT64_T,
    torch.int32: MPI.INT32_T,
    torch.int16: MPI.INT16_T,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
}
_ABANDONED: list[Any] = []  # what timed out, since MPI may still write to its memory
WITHOUT_DATATYPE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # dtype -> summed in


class MpiCommunicator:
    """The ranks of an `mpi4py.MPI.Comm`.

    Args:
        comm: an intracommunicator that this process is a member of (not `MPI.COMM_NULL`).
        timeout: raise TimeoutError, naming the operation, when its peers have not come after this time; None: wait.
            With a timeout tensors travel by MPI's non-blocking collectives. A group that timed out is of no more use.
    """

    def __init__(self, comm: MPI.Comm, timeout: timedelta | None = None):
        self.comm = comm
        self.timeout = timeout
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks in place: one `MPI_Allreduce`."""
        dtype = WITHOUT_DATATYPE.get(tensor.dtype, tensor.dtype)
        if dtype not in DATATYPES:
            raise TypeError(f"expected a tensor of a dtype that MPI can sum, got {tensor.dtype}")
        message = _stage(tensor, dtype)
        self._run("Allreduce", MPI.IN_PLACE, message, datatype=DATATYPES[dtype])
        return _write_back(tensor, message)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Replace `tensor` by that of `root` in place: one `MPI_Bcast`."""
        message = _stage(tensor, tensor.dtype)
        self._run("Bcast", message, root=root)
        return _write_back(tensor, message)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks: one `MPI_Allgather`."""
        message = _stage(tensor, tensor.dtype)
        gathered = message.new_empty((self.size, *message.shape))
        self._run("Allgather", message, gathered)
        return list(gathered.to(tensor.device).unbind(0))

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks, pickled on the way: one `MPI_Allgatherv` and one of the sizes."""
        gathered: list[Any] = self.comm.allgather(obj)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks: one `MPI_Barrier`."""
        self._run("Barrier")

    def _run(self, function: str, *messages: Any, datatype: MPI.Datatype = MPI.BYTE, **options: Any) -> None:
        """Call the MPI function on the memory of the messages: blocking, or under the timeout as it is non-blocking."""
        arguments = [[_memory(message), datatype] if isinstance(message, Tensor) else message for message in messages]
        if self.timeout is None:
            getattr(self.comm, function)(*arguments, **options)
            return
        request = getattr(self.comm, "I" + function.lower())(*arguments, **options)
        limit = self.timeout.total_seconds()
        deadline = time.monotonic() + limit
        while not request.Test():
            if time.monotonic() > deadline:
                _ABANDONED.append((request, messages))
                raise TimeoutError(
                    f"MPI_{function} on rank {self.rank} of {self.size} waited {limit:g} s for its peers"
                )
            time.sleep(0)  # ranks may share a core

    def __repr__(self) -> str:
        return f"MpiCommunicator(rank={self.rank}, size={self.size})"


def _stage(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return contiguous memory that MPI can read and write: the tensor's own wherever that is possible."""
    tensor = tensor.detach()
    if tensor.is_cuda:
        if not cuda_aware():
            pinned = torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
            return pinned.copy_(tensor)
        message = tensor.to(dtype).contiguous()
        torch.cuda.current_stream(tensor.device).synchronize()  # MPI knows nothing of CUDA streams
        return message
    return tensor.to(dtype).contiguous()


def _write_back(tensor: Tensor, message: Tensor) -> Tensor:
    """Copy the result to the tensor, unless MPI wrote it there already."""
    if message.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(message)
    return tensor


def _memory(tensor: Tensor) -> MPI.buffer:
    """The bytes of a contiguous tensor as mpi4py takes them."""
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())


@functools.cache
def cuda_aware() -> bool:
    """Whether the MPI library reads and writes CUDA memory (`MPIX_Query_cuda_support`, Open MPI and MPICH)."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return query is not None and bool(query())
