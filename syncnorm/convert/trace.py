"""torch.fx traces of a model's forward, for `fusion`: which modules it calls, and what reads their outputs."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modules.activated import activation_of

__all__ = ["Graph", "trace", "trace_parts"]


class Graph:
    """One trace: the calls of modules, and the nodes whose values a hook or an attribute holds."""

    def __init__(self, model: nn.Module, graph: fx.Graph, watched: set[fx.Node]):
        self.model, self.watched = model, watched
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            module = self.module(node)
            if module is not None:
                self.calls.setdefault(module, []).append(node)

    def module(self, node: Any) -> nn.Module | None:
        """Return the module that a node calls, if it calls one."""
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return self.model.get_submodule(str(node.target)) if is_call else None

    def argument(self, node: fx.Node) -> nn.Module | None:
        """Return the module whose output is the node's only argument."""
        return self.module(node.args[0]) if len(node.args) == 1 and not node.kwargs else None

    def sole_reader(self, nodes: list[fx.Node]) -> nn.Module | str | None:
        """Return what alone reads the output of a norm, given the norm's calls: a module, or the activation of a call.

        An activation is named as by `SyncBatchNorm(activation=)`.
        """
        node, *others = nodes
        if others or len(node.args) != 1 or node.kwargs or node in self.watched or len(node.users) != 1:
            return None
        (user,) = node.users
        if user.args[:1] != (node,):
            return None
        if user.op == "call_function":
            return activation_of(user.target, user.args, user.kwargs)  # type: ignore[arg-type]
        if user.op == "call_method":
            return activation_of(getattr(Tensor, str(user.target), len), user.args, user.kwargs)
        return self.module(user) if len(user.args) == 1 and not user.kwargs else None


class _Tracer(fx.Tracer):
    def __init__(self, is_closed: Callable[[nn.Module], bool]):
        super().__init__(autowrap_functions=_opaque("functions"))
        self.is_closed = is_closed
        self.watched: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = m.__module__.partition(".")[0] == "syncnorm"
        opaque = isinstance(m, (_BatchNorm, *_opaque("modules"))) or own or self.is_closed(m)
        return opaque or super().is_leaf_module(m, module_qualified_name)

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


def _opaque(what: str) -> tuple[Any, ...]:
    """Return the modules or the functions that timm, if it is there, says torch.fx cannot trace into."""
    known: list[Any] = getattr(sys.modules.get("timm.layers"), f"get_notrace_{what}", list)()
    return tuple(each for each in known if callable(each))


def trace_parts(model: nn.Module, is_closed: Callable[[nn.Module], bool]) -> tuple[list[Graph], list[nn.Module]]:
    """Return the graphs of the model, or of its largest parts that can be traced, and the modules that cannot."""
    if is_closed(model) or isinstance(model, _BatchNorm):
        return [], []
    try:
        return trace(model, is_closed), []
    except TypeError:
        graphs, untraced = [], [model]
        for child in model.children():
            more, others = trace_parts(child, is_closed)
            graphs += more
            untraced += others
        return graphs, untraced


def trace(model: nn.Module, is_closed: Callable[[nn.Module], bool]) -> list[Graph]:
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
                graphs.append(Graph(model, graph, tracer.watched))
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
