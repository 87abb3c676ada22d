"""Tensors of all ranks side by side in memory, as MPI's collectives of unequal parts take them."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..communicators.contiguous import write_back
from .buffers import message, stage

__all__ = ["Parts"]


class Parts:
    """Tensors, one for each rank, of any sizes, side by side in memory."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None):
        self.tensors = tensors
        self.counts = [t.numel() for t in tensors]
        self.flat = torch.cat([stage(t, dtype).flatten() for t in tensors])
        buffer, datatype = message(self.flat)
        self.message = [buffer, self.counts, datatype]

    def write_back(self) -> list[Tensor]:
        """Copy what MPI left here to the tensors."""
        parts = zip(self.tensors, self.flat.split(self.counts), strict=True)
        return [write_back(tensor, part.view(tensor.shape)) for tensor, part in parts]
