"""Check that a model can be converted or reverted. Errors name the layer that cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils.parametrize import is_parametrized

from ..modules import SyncBatchNorm, known
from ..modules.batch_norm import class_after_conversion
from ..modules.known import ORIGIN

__all__ = ["check_convertible", "check_revertible"]

_OWN_NAMES = (  # attributes that SyncBatchNorm.forward reads
    *("activation", "inplace", "check_finite", "reproducible", "process_group", "_group"),
)
_FSDP, _COMPILED = "_fsdp_wrapped_module", "_orig_mod"  # attributes that hold a wrapped module
_TRAINING = 5  # position of this argument in torch's batch_norm functions


def check_convertible(module: nn.Module, is_closed: Callable[[nn.Module], bool]) -> None:
    """Raise TypeError unless every BatchNorm in `module`, outside closed modules, can become a SyncBatchNorm."""
    _check_is_module(module)
    closed = tuple(f"{path}." if path else "" for path, layer in module.named_modules() if is_closed(layer))
    for path, layer in module.named_modules():
        if is_closed(layer) or path.startswith(closed):
            continue
        kind = type(layer)
        if _is_graph_with_batch_norm(layer):
            raise TypeError(
                "expected a model whose BatchNorm layers are modules, got a scripted, traced or exported graph at "
                f"{_place(path)}: {kind.__qualname__}; convert the model before torch.jit, torch.export or torch.fx"
            )
        if not isinstance(layer, _BatchNorm) or isinstance(layer, SyncBatchNorm):
            continue
        if tie := _tie(path, layer):
            what = f"a {tie} one ({_TIES[tie].convert})"
        elif reason := known.reason_against(kind):
            raise TypeError(
                f"expected BatchNorm layers that can be synchronized, got one at {_place(path)}: {kind.__qualname__}; "
                f"{reason}; replace it by torch.nn.BatchNorm2d first"
            )
        elif known.parts_after(kind) is None or "forward" in vars(layer):
            what = "one with its own forward"
        elif name := _conflicting_name(layer):
            what = f"one with an attribute {name!r}, which SyncBatchNorm also uses,"
        else:
            class_after_conversion(kind, is_lazy=isinstance(layer, _LazyNormBase))  # raises if there cannot be one
            continue
        raise TypeError(
            f"expected BatchNorm layers with torch's forward, got {what} at {_place(path)}: {kind.__qualname__}; "
            f"register a converter with syncnorm.register_conversion({kind.__qualname__}, converter)"
        )


def check_revertible(module: nn.Module) -> None:
    """Raise TypeError if a converted layer in `module` has been changed so that it cannot be reverted."""
    _check_is_module(module)
    for path, layer in module.named_modules():
        if ORIGIN not in vars(layer):
            continue
        if tie := _tie(path, layer):
            what, remedy = f"a {tie} one", _TIES[tie].revert
        elif "forward" in vars(layer):
            what, remedy = "one whose forward was replaced", "delete the forward attribute of the layer first"
        elif isinstance(layer, SyncBatchNorm) and type(layer) is not class_after_conversion(
            vars(layer)[ORIGIN][0], is_lazy=isinstance(layer, _LazyNormBase)
        ):
            what, remedy = "one whose class was replaced", "restore the class that the conversion gave it first"
        else:
            continue
        raise TypeError(
            f"expected layers as convert_sync_batchnorm made them, got {what} at {_place(path)}: "
            f"{type(layer).__qualname__}; {remedy}"
        )


def _check_is_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__qualname__}")


def _place(path: str) -> str:
    return repr(path or "the root")


class _Remedy(NamedTuple):
    """What to do about a layer that cannot be replaced, because something else refers to it."""

    convert: str
    revert: str


_TIES = {
    "parametrized": _Remedy(
        "convert before parametrizing", "remove its parametrizations first and register them again afterwards"
    ),
    "sharded": _Remedy(
        "convert before fully_shard and parallelize_module",
        "load the full state dict into a model that is not sharded and revert that model",
    ),
    "compiled": _Remedy("convert before torch.compile", "revert the model that was passed to torch.compile"),
}


def _tie(path: str, layer: nn.Module) -> str | None:
    """Return the key in `_TIES` that applies to the layer at this path, if any."""
    names = path.split(".")
    if is_parametrized(layer):
        return "parametrized"
    if any(hasattr(parameter, "device_mesh") for parameter in layer.parameters()) or _FSDP in names:  # DTensor
        return "sharded"
    if names[-1] == _COMPILED or layer._compiled_call_impl is not None:
        return "compiled"
    return None


def _conflicting_name(layer: nn.Module) -> str | None:
    """Return an attribute of a BatchNorm layer that SyncBatchNorm.forward would mistake for its own, if any."""
    names = [name for name in _OWN_NAMES if hasattr(layer, name)]
    if isinstance(layer, nn.SyncBatchNorm):
        names.remove("process_group")
    return names[0] if names else None


def _is_graph_with_batch_norm(module: nn.Module) -> bool:
    """Return whether the module is a graph that calls the function batch_norm, other than with training=False."""
    if isinstance(module, torch.jit.ScriptModule):
        graphs = [module._c._get_method(name).inlined_graph for name in module._c._method_names()]
        calls = [node for graph in graphs for node in graph.findAllNodes("aten::batch_norm")]
        return any(list(node.inputs())[_TRAINING].toIValue() is not False for node in calls)
    graph = getattr(module, "graph", None)
    return isinstance(graph, fx.Graph) and any(_trains_batch_norm(node) for node in graph.nodes)


def _trains_batch_norm(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    if node.op != "call_function" or "batch_norm" not in name or "no_training" in name or "no_update" in name:
        return False
    training = node.args[_TRAINING] if len(node.args) > _TRAINING else node.kwargs.get("training", False)
    return training is not False
