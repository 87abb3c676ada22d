"""What one process does with the whole batches: each layer's outputs, gradients and buffers, in each step."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .training import Range

__all__ = ["Reference", "buffers", "calls", "first_tensor", "layers", "state", "watch"]

After = Callable[[str, nn.Module, Any, Any], None]


def watch(model: nn.Module, after: After) -> None:
    """Call `after` with the name, the module, its (args, kwargs) and its output, after each call of a layer.

    Layers are modules without submodules, or with parameters or buffers of their own.
    """
    for name, module in layers(model):

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, *, name: str = name) -> None:
            after(name, module, (args, kwargs), output)

        module.register_forward_hook(hook, with_kwargs=True)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and the module of each layer."""
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own or not any(True for _ in module.children()):
            yield name, module


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters and buffers by name."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()} | buffers(model)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers by name."""
    return {name: tensor.detach().clone() for name, tensor in model.named_buffers()}


def first_tensor(output: Any) -> Tensor | None:
    """Return the first floating-point tensor of an output, which is compared."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    return None


class Reference:
    """Observes one process, and keeps `record`, which torch.save writes."""

    def __init__(self, model: nn.Module, seed: int):
        self.model = model
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.record: dict[str, Any] = {"initial": state(model), "steps": []}
        watch(model, self._after)

    def begin(self, step: int, samples: Range) -> None:
        """See Observer."""
        self._samples = samples[1]
        self.record["steps"].append({"samples": self._samples, "outputs": {}})

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """See Observer. The gradients are random."""
        normal = functools.partial(torch.randn, generator=self.generator, dtype=torch.float64, device="cpu")
        given = [normal(y.shape) / self._samples for y in outputs]
        self.record["steps"][-1] |= {"upstream": given, "buffers": buffers(self.model)}
        return given

    def end(self, gradients: dict[str, Tensor]) -> None:
        """See Observer."""
        self.record["steps"][-1]["gradients"] = {name: gradient.clone() for name, gradient in gradients.items()}

    def _after(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        if (found := first_tensor(output)) is not None:
            self.record["steps"][-1]["outputs"].setdefault(name, []).append(found.detach().clone())


def calls(step: dict[str, Any]) -> Counter[str]:
    """Return how often each layer was called in a step of the record."""
    return Counter({name: len(outputs) for name, outputs in step["outputs"].items()})
