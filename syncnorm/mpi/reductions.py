"""The MPI operation of each reduction of torch.distributed."""

from __future__ import annotations

import functools

import torch
from torch.distributed import ReduceOp

from .datatypes import arithmetic
from .library import MPI

__all__ = ["reduction"]

OPERATIONS = {
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.AVG: MPI.SUM,  # followed by a division
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.PRODUCT: MPI.PROD,
    ReduceOp.BAND: MPI.BAND,
    ReduceOp.BOR: MPI.BOR,
    ReduceOp.BXOR: MPI.BXOR,
}
BITWISE = {ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR}
ORDERED = {ReduceOp.MIN, ReduceOp.MAX}
LOGICAL = {
    **dict.fromkeys([ReduceOp.SUM, ReduceOp.MAX, ReduceOp.BOR], MPI.LOR),
    **dict.fromkeys([ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.BAND], MPI.LAND),
    ReduceOp.BXOR: MPI.LXOR,
}


@functools.cache
def reduction(number: int, dtype: torch.dtype) -> tuple[torch.dtype, MPI.Datatype, MPI.Op, bool]:
    """Return the dtype in which MPI reduces `dtype`, its datatype, the operation, and whether a division follows.

    The reduction is passed as a number, because torch's enumerations take a microsecond to hash and compare.
    """
    kind = ReduceOp.RedOpType(number)
    if kind not in OPERATIONS:
        raise NotImplementedError(f"expected a reduction that the mpi4py backend supports, got {kind.name}")
    if dtype == torch.bool:
        if kind not in LOGICAL:
            raise TypeError(f"expected a tensor of numbers for {kind.name}, got torch.bool")
        return dtype, MPI.C_BOOL, LOGICAL[kind], False
    if kind in BITWISE and (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"expected a tensor of integers for {kind.name}, got {dtype}")
    if kind == ReduceOp.AVG and not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"expected a floating-point or complex tensor for AVG, got {dtype}")
    if kind in ORDERED and dtype.is_complex:
        raise TypeError(f"expected a tensor of real numbers for {kind.name}, got {dtype}")
    return *arithmetic(dtype), OPERATIONS[kind], kind == ReduceOp.AVG
