"""Replace modules inside a model, and replace the class of a module while keeping its contents."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook

__all__ = ["become", "replace"]


def replace(
    module: nn.Module,
    exchange: Callable[[nn.Module], nn.Module],
    is_closed: Callable[[nn.Module], bool],
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    """Exchange `module` and its descendants, except those of closed modules. Each is exchanged once."""
    if module not in done:
        done[module] = new = exchange(module)
        if not is_closed(module):
            for name, child in new._modules.items():
                if child is not None:
                    new._modules[name] = replace(child, exchange, is_closed, done)
    return done[module]


def become(layer: nn.Module, kind: type[nn.Module]) -> Any:
    """Return a module of another class with the contents of `layer`. Hook tables are shared, so handles stay valid."""
    new = object.__new__(kind)
    new.__dict__.update(layer.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = layer.__dict__[name].copy()
    for name, value in new.__dict__.items():
        if name.endswith("_hooks"):
            for key, hook in value.items():
                value[key] = _rebind(hook, layer, new)
        elif inspect.ismethod(value) and value.__self__ is layer:  # such as a `train` that was set on the layer
            new.__dict__[name] = types.MethodType(value.__func__, new)
    return new


def _rebind(hook: Any, layer: nn.Module, new: nn.Module) -> Any:
    """Return the hook, bound to `new` if it was bound to `layer`."""
    if isinstance(hook, _WrappedHook):
        return _WrappedHook(_rebind(hook.hook, layer, new), new if hook.with_module else None)
    if inspect.ismethod(hook) and hook.__self__ is layer and hasattr(new, hook.__name__):
        return getattr(new, hook.__name__)
    return hook
