"""The signs of values as bits, in the order of a dense tensor's memory.

The memory is R runs of equal length V. Row r of the bits, (R, ⌈V / 8⌉) uint8, belongs to run r: bit i % 8 of byte
i // 8 tells whether value i of the run is positive. The bits that fill the last byte of a row may be anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .layout import channels_last

__all__ = ["from_bits", "to_bits"]


def to_bits(positive: Tensor, like: Tensor, rows: int = 1) -> Tensor:
    """Return a bool tensor (N, C, *) as bits in the order of the memory of `like`, which is dense."""
    length = like.numel() // max(rows, 1)
    flat = (positive.movedim(1, -1) if channels_last(like) else positive).reshape(rows, length)
    octets = F.pad(flat, (0, -length % 8)).view(rows, (length + 7) // 8, 8)
    return (octets * (1 << torch.arange(8, device=flat.device))).sum(2).to(torch.uint8)


def from_bits(bits: Tensor, like: Tensor) -> Tensor:
    """Return the bool tensor of the shape of `like`, which is dense, that the bits stand for."""
    rows = len(bits)
    octets = (bits.unsqueeze(-1) >> torch.arange(8, device=bits.device, dtype=torch.uint8)) & 1
    flat = octets.flatten(1)[:, : like.numel() // max(rows, 1)].reshape(-1).bool()
    return flat.view(like.movedim(1, -1).shape).movedim(-1, 1) if channels_last(like) else flat.view(like.shape)
