"""Which activations can be computed by the norm before them: what a torch.fx trace of the model shows."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd import Normalize

__all__ = ["Fusion", "ReLUIfNeeded", "find_fusions"]


class Fusion(NamedTuple):
    """What to put in whose place.

    Attributes:
        norms: the activation that each of these norms takes over.
        activations: for each activation module, the class to take its place.
    """

    norms: dict[nn.Module, str]
    activations: dict[nn.Module, type[nn.Module]]


class ReLUIfNeeded(nn.ReLU):
    """A ReLU that passes on the output of a norm with activation="relu", which it would not change.

    It knows it by the graph. Where there is none it computes, and the result is the same: relu(relu(x)) = relu(x).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return max(input, 0)."""
        return input if _made_by_relu(input) else super().forward(input)


def find_fusions(
    model: nn.Module, is_norm: Callable[[nn.Module], bool], is_closed: Callable[[nn.Module], bool]
) -> Fusion:
    """Return which of the norms in `model` are followed by an activation module and nothing else.

    Such a norm is called once, and nothing but the activation reads its output: no other operation, no hook, no
    attribute of a module, in training and eval, with optional arguments and without. An activation module that is also
    called after something else, or held by a module that the trace does not look into, has to be an nn.ReLU. The model
    is not changed.

    Args:
        model: traced is its forward; closed modules and those of torch.nn are not looked into.
        is_norm: whether a module is one that can take over an activation.
        is_closed: whether a module is to be left alone with all that it holds.

    Raises:
        TypeError: torch.fx cannot trace the model.
    """
    after: dict[nn.Module, set[nn.Module | None]] = {}  # a norm and what follows it, None: something else
    before: dict[nn.Module, set[nn.Module | None]] = {}  # an activation and what goes before it
    for graph in _trace(model, is_closed):
        for module, nodes in graph.calls.items():
            if is_norm(module):
                after.setdefault(module, set()).add(graph.sole_activation(nodes))
            elif _name(module) is not None:
                before.setdefault(module, set()).update(graph.argument(node) for node in nodes)
            for inner in module.modules():
                if inner is not module and _name(inner) is not None:  # called where the trace does not look
                    before.setdefault(inner, set()).add(None)
    sole = {norm: next(iter(followers)) for norm, followers in after.items() if len(followers) == 1}
    pairs = [(norm, activation) for norm, activation in sole.items() if activation is not None]
    paired = {norm for norm, _ in pairs}
    elsewhere = {activation for activation, modules in before.items() if not modules <= paired}
    pairs = [(n, activation) for n, activation in pairs if type(activation) is nn.ReLU or activation not in elsewhere]
    return Fusion(
        {norm: str(_name(activation)) for norm, activation in pairs},
        {activation: ReLUIfNeeded if activation in elsewhere else nn.Identity for _, activation in pairs},
    )


def _name(module: nn.Module) -> str | None:
    """Return the name that `SyncBatchNorm(activation=)` has for what the module computes."""
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
    """Return whether a tensor is known to be the output of a norm with activation="relu", not changed since."""
    if torch.compiler.is_compiling():
        return False
    node: Any = tensor.grad_fn
    by_us = isinstance(node, Normalize._backward_cls)
    return by_us and node.config.epilogue.activation == "relu" and tensor._version == 0


class _Graph:
    """One trace: the modules that were called, and the nodes whose values a hook has seen."""

    def __init__(self, model: nn.Module, graph: fx.Graph, watched: set[fx.Node]):
        self.model, self.watched = model, watched
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            module = self.module(node)
            if module is not None:
                self.calls.setdefault(module, []).append(node)

    def module(self, node: Any) -> nn.Module | None:
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return self.model.get_submodule(str(node.target)) if is_call else None

    def argument(self, node: fx.Node) -> nn.Module | None:
        """Return the module whose output is the node's only argument."""
        return self.module(node.args[0]) if len(node.args) == 1 and not node.kwargs else None

    def sole_activation(self, nodes: list[fx.Node]) -> nn.Module | None:
        """Return the activation module that alone reads what these calls of one norm give."""
        node, *others = nodes
        if others or len(node.args) != 1 or node.kwargs or node in self.watched or len(node.users) != 1:
            return None
        (user,) = node.users
        module = self.module(user)
        return module if module is not None and _name(module) and user.args == (node,) and not user.kwargs else None


class _Tracer(fx.Tracer):
    def __init__(self, is_closed: Callable[[nn.Module], bool]):
        super().__init__()
        self.is_closed = is_closed
        self.watched: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = m.__module__.partition(".")[0] == "syncnorm"
        return isinstance(m, _BatchNorm) or own or self.is_closed(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        see_output = bool(m._forward_hooks or m._backward_hooks or m._backward_pre_hooks)
        if see_output or m._forward_pre_hooks:
            fx.node.map_aggregate((args, kwargs, output if see_output else None), self._watch)
        return output

    def _watch(self, value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            self.watched.add(value.node)
        return value


def _trace(model: nn.Module, is_closed: Callable[[nn.Module], bool]) -> list[_Graph]:
    """Return the graphs of training and eval, each with optional arguments and without them."""
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    graphs = []
    with _unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for training in (True, False):
            for module in model.modules():
                vars(module)["training"] = training
            for arguments in [{}, defaults] if defaults else [{}]:
                tracer = _Tracer(is_closed)
                try:
                    if "forward" in vars(model):
                        raise TypeError("its forward was replaced")  # fx would trace that of its class
                    graph = tracer.trace(model, arguments)
                except Exception as error:
                    raise TypeError(
                        f"expected a model that torch.fx can trace, for fuse=True, got {type(model).__qualname__}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                for module in model.modules():
                    fx.node.map_aggregate(list(vars(module).values()), tracer._watch)  # what forward has kept
                graphs.append(_Graph(model, graph, tracer.watched))
    return graphs


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give the modules their attributes back: a forward may set some, and a trace gives the root its constants."""
    before = [(module, vars(module).copy()) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
