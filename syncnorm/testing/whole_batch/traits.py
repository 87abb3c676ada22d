"""What the layers of a model do in one process that a shard of a batch cannot reproduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .reference import buffers, first_tensor, layers

__all__ = ["MIXES", "RANDOM", "traits_of"]

RANDOM = "random"  # the layer's output differs from call to call
MIXES = "mixes"  # the layer's output for a sample depends on the others


def traits_of(model: nn.Module, call: Any, samples: int) -> dict[str, str]:
    """Return RANDOM or MIXES by layer, if it is one of them.

    Each layer is called again, on the same input and on half of it.

    Args:
        model: in training mode. It is of no use afterwards.
        call: runs its forward pass on the whole batch.
        samples: the size of the batch.
    """
    arguments: dict[str, Any] = {}
    traits: dict[str, str] = {}
    for name, module in layers(model):

        def before(module: nn.Module, args: Any, kwargs: Any, *, name: str = name) -> None:
            arguments[name] = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, *, name: str = name) -> None:
            found = first_tensor(output)
            if found is not None and (trait := _trait(module, arguments[name], found, samples)):
                traits[name] = trait

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)
    with torch.no_grad():
        call()
    return traits


def _trait(module: nn.Module, arguments: Any, output: Tensor, samples: int) -> str:
    half = max(1, samples // 2)
    halves = pytree.tree_map_only(Tensor, lambda tensor: tensor[:half] if len(tensor) == samples else tensor, arguments)
    before = buffers(module)
    try:
        with torch.random.fork_rng(devices=[]):
            again, part = first_tensor(_forward(module, arguments)), first_tensor(_forward(module, halves))
    except Exception:  # a module that takes no other batch
        return ""
    finally:
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])
    if again is None or part is None or not torch.allclose(again, output, equal_nan=True):
        return RANDOM
    if part.shape[1:] != output.shape[1:] or torch.allclose(part, output[: len(part)], equal_nan=True):
        return ""
    return MIXES


def _forward(module: nn.Module, arguments: Any) -> Any:
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, arguments)  # which the module may overwrite
    return module.forward(*args, **kwargs)
