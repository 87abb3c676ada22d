"""Collectives work on contiguous memory; other tensors pass through a copy and get their result back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_contiguous", "write_back"]


def as_contiguous(tensor: Tensor) -> Tensor:
    """Return contiguous memory that holds the numbers of the tensor: its own wherever that is possible."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()  # views whose memory is another number first


def write_back(tensor: Tensor, message: Tensor) -> Tensor:
    """Copy what a collective left in `message` to the tensor, unless that is the same memory; return the tensor."""
    if message is not tensor and message.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(message)
    return tensor
