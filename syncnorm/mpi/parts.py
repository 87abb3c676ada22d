"""Tensors of all ranks, concatenated for MPI's collectives with unequal counts."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..communicators.contiguous import write_back
from .buffers import message, stage

__all__ = ["Parts"]


class Parts:
    """Tensors of any sizes, one for each rank, concatenated in memory."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None):
        self.tensors = tensors
        self.counts = [t.numel() for t in tensors]
        self.flat = torch.cat([stage(t, dtype).flatten() for t in tensors])
        buffer, datatype = message(self.flat)
        self.message = [buffer, self.counts, datatype]

    def write_back(self) -> list[Tensor]:
        """Copy the parts that MPI received back to the tensors."""
        parts = zip(self.tensors, self.flat.split(self.counts), strict=True)
        return [write_back(tensor, part.view(tensor.shape)) for tensor, part in parts]
