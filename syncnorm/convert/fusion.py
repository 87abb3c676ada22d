"""Find activations that the preceding norm can absorb."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd import Normalize
from ..modules import known
from .trace import Graph, trace, trace_parts

__all__ = ["Fusion", "ReLUIfNeeded", "find_fusions", "followed_by_activation_at_most"]

Reader = nn.Module | str | None  # of a norm's output: an activation module, the name of a function, or anything else


class Fusion(NamedTuple):
    """The replacements to make.

    Attributes:
        norms: the activation that each of these norms absorbs.
        activations: for each activation module, the class that replaces it.
        called: the norms whose activation the model calls as a function.
        untraced: the modules whose forward torch.fx cannot trace.
    """

    norms: dict[nn.Module, str]
    activations: dict[nn.Module, type[nn.Module]]
    called: set[nn.Module]
    untraced: list[nn.Module]


class ReLUIfNeeded(nn.ReLU):
    """A ReLU that returns the output of a norm with activation="relu" as it is, since it would not change it.

    It recognizes such an output by its autograd graph. Without a graph it computes the ReLU again, with the same
    result: relu(relu(x)) = relu(x).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return max(input, 0)."""
        return input if _made_by_relu(input) else super().forward(input)


def find_fusions(
    model: nn.Module,
    is_norm: Callable[[nn.Module], bool],
    is_closed: Callable[[nn.Module], bool],
    *,
    in_parts: bool = False,
) -> Fusion:
    """Return the norms in `model` that are followed only by an activation.

    Such a norm has the activation inside, as timm's BatchNormAct2d. Or it is called once, and only an activation module
    or function reads its output: no other operation, no hook and no attribute of a module. This must hold in training
    and eval, with and without optional arguments. An activation module that is also called after something else, or
    inside a module that is not traced, has to be an nn.ReLU. The model is not changed.

    Args:
        model: its forward is traced, but not into closed modules and modules of torch.nn.
        is_norm: whether a module can absorb an activation.
        is_closed: whether a module and all of its children must be left unchanged.
        in_parts: if torch.fx cannot trace the model, trace the largest parts of it that it can.

    Raises:
        TypeError: torch.fx cannot trace the model, and `in_parts` is false.
    """
    graphs: list[Graph] = []
    untraced: list[nn.Module] = []
    if not isinstance(model, _BatchNorm):  # nothing follows a single layer
        graphs, untraced = trace_parts(model, is_closed) if in_parts else (trace(model, is_closed), [])
    inner = {norm: act for norm in model.modules() if is_norm(norm) and (act := _activation_inside(norm)) is not None}
    after: dict[nn.Module, set[Reader]] = {norm: {activation} for norm, activation in inner.items()}
    before: dict[nn.Module, set[nn.Module | None]] = {}  # of an activation. None: it is called after something else
    for norm, activation in inner.items():
        before.setdefault(activation, set()).add(norm)
    for graph in graphs:
        for module, nodes in graph.calls.items():
            if is_norm(module) and module not in inner:
                after.setdefault(module, set()).add(_activation(graph.sole_reader(nodes)))
            elif _name(module) is not None:
                before.setdefault(module, set()).update(graph.argument(node) for node in nodes)
            for part in module.modules():
                if part is not module and part is not inner.get(module) and _name(part) is not None:
                    before.setdefault(part, set()).add(None)  # called where nothing is traced
    for module in untraced:
        for child in module.children():
            for part in child.modules() if is_closed(child) else [child]:
                after.setdefault(part, set()).add(None)
                before.setdefault(part, set()).add(None)
    sole = {norm: next(iter(readers)) for norm, readers in after.items() if len(readers) == 1}
    pairs = [(norm, reader) for norm, reader in sole.items() if isinstance(reader, nn.Module)]
    paired = {norm for norm, _ in pairs}
    elsewhere = {activation for activation, modules in before.items() if not modules <= paired}
    pairs = [(n, activation) for n, activation in pairs if type(activation) is nn.ReLU or activation not in elsewhere]
    called = {norm: reader for norm, reader in sole.items() if isinstance(reader, str)}
    return Fusion(
        {norm: str(_name(activation)) for norm, activation in pairs} | called,
        {activation: ReLUIfNeeded if activation in elsewhere else nn.Identity for _, activation in pairs},
        set(called),
        untraced,
    )


def _activation(reader: Reader) -> Reader:
    """Return what reads a norm's output if it is an activation that the norm can absorb."""
    return reader if isinstance(reader, str) or (reader is not None and _name(reader)) else None


def followed_by_activation_at_most(norm: nn.Module) -> bool:
    """Return whether the forward of a norm does nothing after normalizing but call an activation it can absorb."""
    return not known.parts_of(norm) or len(_parts(norm)) == (_activation_inside(norm) is not None)


def _activation_inside(norm: nn.Module) -> nn.Module | None:
    """Return the activation module that the forward of a norm calls, if that is all it does after normalizing."""
    parts = _parts(norm)
    return parts[0] if len(parts) == 1 and _name(parts[0]) is not None and not _is_watched(parts[0]) else None


def _parts(norm: nn.Module) -> list[nn.Module]:
    """Return the modules that the forward of a norm calls after normalizing, if they do anything."""
    parts = [norm._modules.get(name) for name in known.parts_of(norm) or ()]
    return [part for part in parts if part is not None and type(part) is not nn.Identity]


def _is_watched(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def _name(module: nn.Module) -> str | None:
    """Return what `SyncBatchNorm(activation=)` calls the activation that the module computes, if any."""
    if "forward" in vars(module):
        return None
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.LeakyReLU and module.negative_slope == 0.01:
        return "leaky_relu"
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return None


def _made_by_relu(tensor: Tensor) -> bool:
    """Return whether a tensor is known to be the unchanged output of a norm with activation="relu"."""
    if torch.compiler.is_compiling():
        return False
    node: Any = tensor.grad_fn
    is_ours = isinstance(node, Normalize._backward_cls)
    return is_ours and node.config.epilogue.activation == "relu" and tensor._version == 0
