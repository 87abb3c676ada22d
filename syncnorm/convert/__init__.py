"""Convert a model's BatchNorm layers to SyncBatchNorm, and back to exactly what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from ..communicators import ProcessGroupLike
from ..modules import SyncBatchNorm
from ..modules.batch_norm import ORIGIN, class_after_conversion
from ..modules.process_group import ProcessGroupReference
from . import fusion
from .checks import check_convertible, check_revertible
from .surgery import become, replace

__all__ = ["convert_sync_batchnorm", "register_conversion", "revert_sync_batchnorm"]

Converter = Callable[[Any, ProcessGroupLike], nn.Module]

_registered: dict[type[nn.Module], Converter] = {}
_FUSED = "_took_over"  # attribute of a layer that took over the activation after it


def convert_sync_batchnorm(
    module: nn.Module, process_group: ProcessGroupLike = None, *, fuse: bool = False
) -> nn.Module:
    """Return `module` with every BatchNorm layer in it replaced by a `SyncBatchNorm`.

    Replaced are BatchNorm1d, 2d and 3d, their Lazy forms, torch.nn.SyncBatchNorm, subclasses of them that keep their
    forward, and classes given to `register_conversion`. The new layer is an instance of the class that it was, with
    its methods and its check of the input: isinstance(layer, nn.BatchNorm2d) still holds. The exception is
    torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on CPUs: it becomes a plain SyncBatchNorm. The new
    layer has the same parameter and buffer objects, hooks (whose handles go on working), training flag and other
    attributes; a layer that stands in several places is converted once. InstanceNorm and everything else stays.
    Containers are changed in place; the result is `module` itself unless that is a BatchNorm layer.

    With `fuse`, a layer that nothing but an activation module reads takes it over: nn.ReLU, nn.LeakyReLU of slope 0.01,
    nn.SiLU or nn.GELU(approximate="tanh"). Outputs and gradients stay the same, for a pass over the data less each way
    and, but for ReLU, a tensor less that backward keeps. An activation module that is called after such layers only
    becomes nn.Identity. An nn.ReLU that is called elsewhere too, as in torchvision's ResNet, goes on there, and passes
    on what such a layer has activated (outside of a graph it computes again, to the same result). Left alone are
    functions (F.relu), other activation modules that are called elsewhere too, layers that are called twice or whose
    output a hook sees, and relu(bn(x) + identity), which a forward has to say itself:
    SyncBatchNorm(channels, activation="relu")(x, residual=identity). All this is read from torch.fx traces of the
    model's forward, in training and eval: its other methods are not looked at, nor the branch that a forward takes for
    a Tensor alone (isinstance(x, Tensor) is false in a trace). What reads a layer of the result by itself, such as a
    hook that is set later, sees its output activated. Code that folds a norm into the convolution before it would drop
    the activation. It gets a TypeError when it reads the norm's `eps`: call `revert_sync_batchnorm` first.

    Args:
        module: the model, or one layer. Convert before DistributedDataParallel wraps it, `fully_shard` shards it, or
            torch.jit or torch.export turns it into a graph.
        process_group: of the new layers, as in `SyncBatchNorm`, and of those that are SyncBatchNorm already; where it
            is None, these and a torch.nn.SyncBatchNorm keep their own.
        fuse: let layers take over the activations that follow them.

    Collectives: none.

    Raises:
        TypeError: `module` is no torch.nn.Module; a BatchNorm has a forward of its own or an attribute of the name of
            one of SyncBatchNorm's; a layer is parametrized, compiled or sharded; a scripted, traced or exported part of
            the model computes a BatchNorm; `fuse` is set and torch.fx cannot trace the model. Nothing was changed.
    """
    check_convertible(module, _is_registered)
    if not fuse or isinstance(module, _BatchNorm) or _is_registered(module):  # a layer alone has nothing after it
        return replace(module, lambda layer: _to_sync(layer, process_group), _is_registered, {})
    norms, activations = fusion.find_fusions(module, _can_take_over, _is_registered)

    def exchange(layer: nn.Module) -> nn.Module:
        if layer in activations:
            return _replace_activation(layer, activations[layer])
        new = _to_sync(layer, process_group)
        if layer in norms:
            new.activation = norms[layer]  # type: ignore[assignment]
            new.__dict__[_FUSED] = True
        return new

    return replace(module, exchange, _is_registered, {})


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Return `module` with every layer that `convert_sync_batchnorm` made turned back into its original class.

    Activations that layers took over are theirs no longer, and again modules of their own.

    Parameters and buffers, as trained since, stay the same objects; so do hooks and attributes. A lazy layer that met
    its first input in between becomes the BatchNorm that it would have become. A SyncBatchNorm that was constructed
    as one stays, and so does what a registered converter made, or torch.jit and torch.export. Collectives: none.

    Raises:
        TypeError: `module` is no torch.nn.Module; a converted layer was parametrized, compiled or sharded since then,
            or its forward or class was replaced. Nothing was changed.
    """
    check_revertible(module)
    return replace(module, _from_sync, lambda layer: False, {})


def register_conversion(original: type[nn.Module], converter: Converter) -> None:
    """Teach `convert_sync_batchnorm` a class of layers.

    Args:
        original: converted are modules of exactly this class.
        converter: called with the module and the process group; returns the module to put in its place. It may return
            a module that holds a SyncBatchNorm, or the module itself to leave it alone with all that it holds.

    Raises:
        TypeError: `original` is no class, or `converter` cannot be called.
    """
    if not (isinstance(original, type) and callable(converter)):
        raise TypeError(f"expected a class and a function that converts its modules, got {original!r}, {converter!r}")
    _registered[original] = converter


def _is_registered(layer: nn.Module) -> bool:
    return type(layer) in _registered


def _to_sync(layer: nn.Module, process_group: ProcessGroupLike) -> nn.Module:
    if type(layer) in _registered:
        made = _registered[type(layer)](layer, process_group)
        if not isinstance(made, nn.Module):
            raise TypeError(f"expected a module from the converter of {type(layer).__qualname__}, got {made!r}")
        return made
    if isinstance(layer, SyncBatchNorm) and process_group is not None:
        layer.process_group = process_group
    if isinstance(layer, SyncBatchNorm) or not isinstance(layer, _BatchNorm):
        return layer
    new: SyncBatchNorm = become(layer, class_after_conversion(type(layer), is_lazy=isinstance(layer, _LazyNormBase)))
    own = new.__dict__.pop("process_group", None)  # a torch.nn.SyncBatchNorm's
    new.process_group = own if process_group is None else process_group
    new.__dict__[ORIGIN] = type(layer), ProcessGroupReference(own)
    return new


def _can_take_over(layer: nn.Module) -> bool:
    if isinstance(layer, SyncBatchNorm):
        own_forward = type(layer).forward is not SyncBatchNorm.forward or "forward" in vars(layer)
        return layer.activation is None and not layer.inplace and not own_forward
    return isinstance(layer, _BatchNorm) and not _is_registered(layer)


def _replace_activation(activation: nn.Module, kind: type[nn.Module]) -> nn.Module:
    new: nn.Module = become(activation, kind)
    new.__dict__[ORIGIN] = type(activation), ProcessGroupReference(None)
    return new


def _from_sync(layer: nn.Module) -> nn.Module:
    if ORIGIN not in layer.__dict__:
        if layer.__dict__.pop(_FUSED, False):  # constructed as a SyncBatchNorm
            layer.activation = None  # type: ignore[assignment]
        return layer
    kind, own = layer.__dict__[ORIGIN]
    if issubclass(kind, _LazyNormBase) and not isinstance(layer, _LazyNormBase):
        kind = kind.cls_to_become
    old: nn.Module = become(layer, kind)
    of_ours = ("_group", "activation", "inplace") if isinstance(layer, SyncBatchNorm) else ()  # nn.ReLU has an inplace
    for name in (ORIGIN, _FUSED, *of_ours):
        old.__dict__.pop(name, None)
    if issubclass(kind, nn.SyncBatchNorm):
        old.process_group = own.given
    return old
