"""The values of a tensor under a transform."""

from __future__ import annotations

import torch
from torch import _C, Tensor

__all__ = ["plain"]

_is_wrapped, _unwrapped = _C._functorch.is_functorch_wrapped_tensor, _C._functorch.get_unwrapped
_is_batch = _C._functorch.is_legacy_batchedtensor


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of torch.func, or the batch of a batched gradient (`is_grads_batched`).

    Under vmap this is the tensor of the whole batch.
    """
    while _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    if not _is_batch(tensor):
        return tensor
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return torch._remove_batch_dim(tensor, level, 1, 0)  # (B, *); the size is that of a tensor without the axis
