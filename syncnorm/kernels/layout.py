"""The two dense memory formats of a tensor (N, C, *): contiguous, or with the channels innermost."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channels_last", "in_dense_format"]


def channels_last(tensor: Tensor) -> bool | None:
    """Return whether a dense tensor (N, C, *) has its channels innermost, or after N; None: it is neither."""
    if tensor.is_contiguous():
        return False
    stride, expected = tensor.stride(), tensor.shape[1]
    if stride[1] != 1:
        return None
    for axis in (*range(tensor.dim() - 1, 1, -1), 0):
        if tensor.shape[axis] != 1:
            if stride[axis] != expected:
                return None
            expected *= tensor.shape[axis]
    return True


def in_dense_format(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return a tensor (N, C, *) in a dense memory format, or in that of `like`; copied if need be."""
    if like is not None:
        same = tensor.stride() == like.stride() or channels_last(tensor) is channels_last(like)  # axes of size 1 differ
        return tensor if same else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor if channels_last(tensor) is not None else tensor.contiguous()
