"""Whether the whole batch has one value per channel, of which there is no variance. Then every rank raises.

The number is known when the code runs. So torch.compile records the check as an operator, through which the moments go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from . import operators
from .kernels import Packed
from .moments import Moments

__all__ = ["error", "refuse"]


def error(shape: Sequence[int], is_masked: bool, rank: int, ranks: int) -> ValueError:
    """Return the error for an input of this shape on a rank."""
    return ValueError(
        f"Expected more than 1 value per channel when training, got input size {tuple(shape)}"
        + (" and a mask" if is_masked else "")
        + (f" on rank {rank} and 1 value on all {ranks} ranks" if ranks > 1 else "")
    )


def refuse(moments: Moments, shape: Sequence[int], is_masked: bool, rank: int, ranks: int) -> Moments:
    """Return the moments in code that torch.compile records. The code raises the error when it runs.

    It reads the count, and waits for the device to have it.
    """
    place = -1 if moments.stamp is None else -3
    values = torch.ops.syncnorm.refuse_one_value.default(moments.values, place, shape, is_masked, rank, ranks)
    return replace(moments, values=cast(Packed, values))


def _refuse_one_value(values: Tensor, place: int, shape: list[int], is_masked: bool, rank: int, ranks: int) -> Tensor:
    if values[place] == 1:
        raise error(shape, is_masked, rank, ranks)
    return values.clone()


operators.define(
    "refuse_one_value(Tensor values, int place, SymInt[] shape, bool is_masked, int rank, int ranks) -> Tensor",
    _refuse_one_value,
)
