"""Contiguous copies of tensors, because collectives need contiguous memory, and copies back of the results."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_contiguous", "write_back"]


def as_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor's values in contiguous memory: its own memory if possible."""
    if tensor.is_contiguous() and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg()):
        return tensor  # the path of a layer, where each operation of torch would be measurable
    return tensor.detach().resolve_conj().resolve_neg().contiguous()  # materializes lazy conj and neg views


def write_back(tensor: Tensor, message: Tensor) -> Tensor:
    """Copy the result of a collective from `message` to the tensor, unless they share memory. Return the tensor."""
    if message is not tensor and message.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(message)
    return tensor
