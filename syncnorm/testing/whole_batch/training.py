"""The training that one process does with whole batches, and each rank with its shards of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..split import even_sizes, sample_counts
from .building import build_model

__all__ = ["Observer", "Plan", "Range", "build", "call", "part", "shards", "size", "train", "trained_outputs"]

# A tensor, a tuple of positional arguments or a dict of keyword arguments. The first axis is that of the samples.
Batch = Any
Range = tuple[int, int]  # of the samples of a shard


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        build: a function that returns the model, or "MODULE:FUNCTION". MODULE may be the path of a file.
        batches: the whole batch of each step.
        learning_rate: of plain stochastic gradient descent.
        seed: of the initial weights, of the splits and of upstream gradients.
    """

    build: Callable[[], nn.Module] | str
    batches: tuple[Batch, ...]
    learning_rate: float
    seed: int


class Observer(Protocol):
    """What is told of each step, in this order."""

    def begin(self, step: int, samples: Range) -> None:
        """A step with these samples of the whole batch begins."""
        ...

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The forward pass has ended. Return the gradients of the loss with respect to the outputs."""
        ...

    def end(self, gradients: dict[str, Tensor]) -> None:
        """The backward pass has ended, with these gradients of the parameters, summed over the ranks."""
        ...


def build(plan: Plan, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """Return the model in training mode, without dropout."""
    model = build_model(plan.build, plan.seed)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.to(device, dtype)


def size(batch: Batch) -> int:
    """Return the number of samples of a batch."""
    counts = sample_counts(batch)
    if len(counts) != 1:
        raise ValueError(f"expected tensors with the same number of samples in a batch, got {counts}")
    return counts[0]


def shards(plan: Plan, world_size: int, split: str) -> list[list[Range]]:
    """Return the samples of each rank in each step.

    With "even" the shards' sizes differ by at most one. With "random" they are of any size. With "empty" one rank has
    no sample: another one in each step. The only rank of a group of one has all of them.
    """
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    ranges: list[list[Range]] = [[] for _ in range(world_size)]
    for step, batch in enumerate(plan.batches):
        samples = size(batch)
        if split == "random":
            cuts = sorted(torch.randint(samples + 1, (world_size - 1,), generator=generator, device="cpu").tolist())
        else:
            sizes = even_sizes(samples, world_size if split == "even" else world_size - 1)
            if split == "empty":
                sizes.insert(step % world_size, 0)
            cuts = list(itertools.accumulate(sizes))[:-1]
        for of_rank, begin, end in zip(ranges, [0, *cuts], [*cuts, samples], strict=True):
            of_rank.append((begin, end))
    return ranges


def train(
    model: nn.Module,
    plan: Plan,
    dtype: torch.dtype,
    device: str,
    ranges: Sequence[Range],
    observer: Observer,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> None:
    """Train on a shard of each batch. The loss is linear in the outputs, and so a sum over the samples."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for step, (batch, samples) in enumerate(zip(plan.batches, ranges, strict=True)):
        torch.manual_seed(plan.seed + step)
        observer.begin(step, samples)
        outputs = trained_outputs(model, part(batch, samples, dtype, device))
        model.zero_grad(set_to_none=True)
        upstream = zip(observer.upstream(outputs), outputs, strict=True)
        torch.autograd.backward(outputs, [dy.to(y) for dy, y in upstream])
        gradients = {
            name: sum_over_ranks(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in parameters.items()
        }
        observer.end(gradients)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.sub_(plan.learning_rate * gradients[name])


def trained_outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return the tensors in the output of the model for a batch that require a gradient: at least one."""
    outputs = [
        leaf for leaf in pytree.tree_leaves(call(model, batch)) if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if not outputs:
        raise TypeError("expected a model with a tensor that requires a gradient in its output, got none")
    return outputs


def part(batch: Batch, samples: Range, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """Return these samples of a batch, floating-point ones in this dtype."""

    def of_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf[slice(*samples)].to(device)
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    return pytree.tree_map(of_leaf, batch)


def call(model: nn.Module, batch: Batch) -> Any:
    """Return the output of the model for a batch."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(batch) if isinstance(batch, Tensor) else model(*batch)
