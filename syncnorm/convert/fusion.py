"""Find activations that the preceding norm can absorb, from torch.fx traces of the model."""

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
    """The replacements to make.

    Attributes:
        norms: the activation that each of these norms absorbs.
        activations: for each activation module, the class that replaces it.
    """

    norms: dict[nn.Module, str]
    activations: dict[nn.Module, type[nn.Module]]


class ReLUIfNeeded(nn.ReLU):
    """A ReLU that returns the output of a norm with activation="relu" as it is, since it would not change it.

    It recognizes such an output by its autograd graph. Without a graph it computes the ReLU again, with the same
    result: relu(relu(x)) = relu(x).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return max(input, 0)."""
        return input if _made_by_relu(input) else super().forward(input)


def find_fusions(
    model: nn.Module, is_norm: Callable[[nn.Module], bool], is_closed: Callable[[nn.Module], bool]
) -> Fusion:
    """Return the norms in `model` that are followed only by an activation module.

    Such a norm is called once, and only the activation reads its output: no other operation, no hook and no attribute
    of a module. This must hold in training and eval, with and without optional arguments. An activation module that is
    also called after something else, or inside a module that is not traced, has to be an nn.ReLU. The model is not
    changed.

    Args:
        model: its forward is traced, but not into closed modules and modules of torch.nn.
        is_norm: whether a module can absorb an activation.
        is_closed: whether a module and all of its children must be left unchanged.

    Raises:
        TypeError: torch.fx cannot trace the model.
    """
    after: dict[nn.Module, set[nn.Module | None]] = {}  # of a norm. None: something else follows
    before: dict[nn.Module, set[nn.Module | None]] = {}  # of an activation
    for graph in _trace(model, is_closed):
        for module, nodes in graph.calls.items():
            if is_norm(module):
                after.setdefault(module, set()).add(graph.sole_activation(nodes))
            elif _name(module) is not None:
                before.setdefault(module, set()).update(graph.argument(node) for node in nodes)
            for inner in module.modules():
                if inner is not module and _name(inner) is not None:  # called where nothing is traced
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


class _Graph:
    """One trace: the calls of modules, and the nodes whose values a hook or an attribute holds."""

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
        """Return the activation module that is the only reader of the output of one norm, given the norm's calls."""
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
    """Return the graphs of training and eval, each with and without optional arguments."""
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
                        raise TypeError("its forward was replaced")  # fx would trace the forward of its class
                    graph = tracer.trace(model, arguments)
                except Exception as error:
                    raise TypeError(
                        f"expected a model that torch.fx can trace with fuse=True, got {type(model).__qualname__}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                for module in model.modules():
                    fx.node.map_aggregate(list(vars(module).values()), tracer._watch)  # values that forward has stored
                graphs.append(_Graph(model, graph, tracer.watched))
    return graphs


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules. A forward may set some, and tracing adds constants to the root."""
    before = [(module, vars(module).copy()) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
