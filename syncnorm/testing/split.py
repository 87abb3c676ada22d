"""The shard of a batch that belongs to a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from ..communicators import ProcessGroupLike, communicator

__all__ = ["even_sizes", "sample_counts", "split_batch"]

Batch = TypeVar("Batch")


def sample_counts(batch: object) -> list[int]:
    """Return the different numbers of samples of the tensors of a batch, which should be one."""
    return sorted({len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)})


def even_sizes(total: int, parts: int) -> list[int]:
    """Return sizes that add up to the total, and differ by at most one."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def split_batch(batch: Batch, sizes: Sequence[int] | None = None, process_group: ProcessGroupLike = None) -> Batch:
    """Return this rank's shard of a batch that all ranks have. Issues no collective.

    Args:
        batch: a tensor, or tensors in tuples, lists and dicts. The first axis of each is that of the samples.
        sizes: the number of samples of each rank. None: sizes that differ by at most one.
        process_group: as in `syncnorm.communicator`.

    Raises:
        ValueError: the tensors have different numbers of samples, or the sizes do not add up to it.
    """
    group = communicator(process_group)
    counts = sample_counts(batch)
    if len(counts) != 1:
        raise ValueError(f"expected tensors with the same number of samples, got {counts}")
    (total,) = counts
    if sizes is None:
        sizes = even_sizes(total, group.size)
    if len(sizes) != group.size or sum(sizes) != total or min(sizes) < 0:
        raise ValueError(f"expected {group.size} sizes that add up to {total}, got {list(sizes)}")
    begin = sum(sizes[: group.rank])
    part = slice(begin, begin + sizes[group.rank])
    shard: Batch = pytree.tree_map_only(Tensor, lambda tensor: tensor[part], batch)
    return shard
