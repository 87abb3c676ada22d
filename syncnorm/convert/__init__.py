"""Convert a model's BatchNorm layers to SyncBatchNorm, and back to their original classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from .. import arguments
from ..communicators import ProcessGroupLike
from ..modules import SyncBatchNorm
from ..modules.batch_norm import class_after_conversion
from ..modules.known import ORIGIN
from ..modules.process_group import ProcessGroupReference
from . import fusion
from .checks import check_convertible, check_revertible
from .surgery import become, replace

__all__ = ["convert_sync_batchnorm", "register_conversion", "revert_sync_batchnorm"]

Converter = Callable[[Any, ProcessGroupLike], nn.Module]

_registered: dict[type[nn.Module], Converter] = {}
_FUSED = "_took_over"  # attribute of a layer that absorbed the activation after it
_FUSE = False, True, "auto"


def convert_sync_batchnorm(
    module: nn.Module,
    process_group: ProcessGroupLike = None,
    *,
    fuse: bool | Literal["auto"] = False,
    reproducible: bool = False,
) -> nn.Module:
    """Return `module` with every BatchNorm layer in it replaced by a `SyncBatchNorm`.

    These layers are replaced: BatchNorm1d, 2d and 3d, their Lazy forms, torch.nn.SyncBatchNorm, subclasses of them that
    keep their forward, and classes passed to `register_conversion`. So are timm's BatchNormAct2d and SyncBatchNormAct,
    with the activation and the dropout in them, and the NaiveSyncBatchNorm of detectron2 and mmdet3d. InstanceNorm and
    all other layers are kept. Containers are changed in place. The result is `module` itself, unless that is a
    BatchNorm layer.

    The new layer is an instance of the original class, with its methods and its check of the input:
    isinstance(layer, nn.BatchNorm2d) still holds. The exception is torch.nn.SyncBatchNorm, which
    DistributedDataParallel rejects on CPUs. It becomes a plain SyncBatchNorm. The new layer has the same parameter and
    buffer objects, hooks, training flag and other attributes, and handles of hooks stay valid. A layer that occurs
    several times in the model is converted once.

    With `fuse`, a layer absorbs an activation if nothing else reads the layer's output: nn.ReLU, nn.LeakyReLU with
    slope 0.01, nn.SiLU or nn.GELU(approximate="tanh"), or one of the functions and methods of Tensor that compute them,
    such as F.relu. Outputs and gradients stay the same. Forward and backward each save a pass over the data and, except
    for ReLU, backward saves one tensor less. An activation module that is called only after such layers becomes
    nn.Identity. An nn.ReLU that is also called elsewhere, as in torchvision's ResNet, still works there and returns the
    output of such a layer unchanged. (Without an autograd graph it computes the ReLU again, with the same result.) A
    function is still called, and returns the output of such a layer as it is: until then, that output is a subclass of
    Tensor.

    `fuse` does not change:

    - activation modules other than nn.ReLU that are also called elsewhere;
    - layers that are called twice or whose output a hook reads;
    - relu(bn(x) + identity). Write this in the forward as
      SyncBatchNorm(channels, activation="relu")(x, residual=identity).

    `fuse` reads torch.fx traces of the model's forward, in training and eval. It does not see other methods of the
    model, nor a branch that the forward takes only for a Tensor (isinstance(x, Tensor) is false in a trace). After the
    conversion, a hook that is registered on a fused layer sees the activated output. Code that folds a norm into the
    preceding convolution would drop the activation. It gets a TypeError when it reads the norm's `eps`. Call
    `revert_sync_batchnorm` first.

    Args:
        module: the model, or one layer. Convert it before DistributedDataParallel wraps it, `fully_shard` shards it, or
            torch.jit or torch.export turns it into a graph.
        process_group: of the new layers and of existing SyncBatchNorm layers, as in `SyncBatchNorm`. If it is None,
            existing SyncBatchNorm and torch.nn.SyncBatchNorm layers keep their own.
        fuse: let layers absorb the activations that follow them. "auto": take models that torch.fx cannot trace, too.
            The largest parts that it can trace are fused, and a warning names the forwards and layers that are left.
        reproducible: as in `SyncBatchNorm`, for the new layers and for existing SyncBatchNorm layers. If it is False,
            existing layers keep their own.

    Collectives: none.

    Raises:
        ValueError: `fuse` is not one of False, True and "auto".
        TypeError: `module` is not a torch.nn.Module; a BatchNorm has its own forward, or an attribute with the name of
            one of SyncBatchNorm's; a layer splits its batch on purpose, as lightly's SplitBatchNorm; a layer is
            parametrized, compiled or sharded; a scripted, traced or exported part of the model computes a BatchNorm;
            `fuse` is set and torch.fx cannot trace the model. The model is unchanged.
    """
    if fuse not in _FUSE:
        raise ValueError(f"expected fuse to be one of {_FUSE}, got {fuse!r}")
    arguments.check_flags(reproducible=reproducible)
    check_convertible(module, _is_registered)
    converted = _converted(module, process_group, fuse)
    for layer in converted.modules() if reproducible else ():
        if isinstance(layer, SyncBatchNorm):
            layer.reproducible = True
    return converted


def _converted(module: nn.Module, process_group: ProcessGroupLike, fuse: bool | Literal["auto"]) -> nn.Module:
    if not fuse or _is_registered(module):
        return replace(module, lambda layer: _to_sync(layer, process_group), _is_registered, {})
    found = fusion.find_fusions(module, _can_absorb, _is_registered, in_parts=fuse == "auto")
    if found.untraced:
        _warn_of_those_left(module, found)

    def exchange(layer: nn.Module) -> nn.Module:
        if layer in found.activations:
            return _replace_activation(layer, found.activations[layer])
        new = _to_sync(layer, process_group)
        if layer in found.norms:
            new.activation = found.norms[layer]  # type: ignore[assignment]
            new.__dict__[_FUSED] = True
            if layer in found.called:
                new.calls_function = True  # type: ignore[assignment]
        return new

    return replace(module, exchange, _is_registered, {})


def _warn_of_those_left(model: nn.Module, found: fusion.Fusion) -> None:
    """Warn of the forwards that torch.fx cannot trace, and of the norms which therefore absorb nothing."""
    left = [name for name, layer in model.named_modules() if _can_absorb(layer) and layer not in found.norms]
    names = {layer: name or "the model" for name, layer in model.named_modules()}
    warnings.warn(
        f"torch.fx cannot trace the forward of {', '.join(names[layer] for layer in found.untraced)}; these layers "
        f"were converted without an activation: {', '.join(left) or 'none'}",
        stacklevel=3,
    )


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Return `module` with every layer that `convert_sync_batchnorm` made turned back into its original class.

    Activations that layers absorbed become separate modules again.

    Parameters and buffers, with their current values, stay the same objects, and so do hooks and attributes. A lazy
    layer that has seen its first input becomes the BatchNorm that it would have become. Layers that were constructed as
    SyncBatchNorm are kept, and so are the results of registered converters, torch.jit and torch.export.

    Collectives: none.

    Raises:
        TypeError: `module` is not a torch.nn.Module; a converted layer has been parametrized, compiled or sharded, or
            its forward or class has been replaced. The model is unchanged.
    """
    check_revertible(module)
    return replace(module, _from_sync, lambda layer: False, {})


def register_conversion(original: type[nn.Module], converter: Converter) -> None:
    """Register a function by which `convert_sync_batchnorm` converts a class of layers.

    Args:
        original: modules of exactly this class are converted.
        converter: called with the module and the process group. It returns the replacement, which may contain a
            SyncBatchNorm. If it returns the module itself, that module and all of its children are left unchanged.

    Raises:
        TypeError: `original` is not a class, or `converter` is not callable.
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
            raise TypeError(f"expected the converter of {type(layer).__qualname__} to return a module, got {made!r}")
        return made
    if isinstance(layer, SyncBatchNorm) and process_group is not None:
        layer.process_group = process_group
    if isinstance(layer, SyncBatchNorm) or not isinstance(layer, _BatchNorm):
        return layer
    new: SyncBatchNorm = become(layer, class_after_conversion(type(layer), is_lazy=isinstance(layer, _LazyNormBase)))
    own = new.__dict__.pop("process_group", None)  # of a torch.nn.SyncBatchNorm
    new.process_group = own if process_group is None else process_group
    new.__dict__[ORIGIN] = type(layer), ProcessGroupReference(own)
    new.eps = vars(new)["eps"]
    return new


def _can_absorb(layer: nn.Module) -> bool:
    if not isinstance(layer, _BatchNorm) or _is_registered(layer) or "forward" in vars(layer):
        return False
    if isinstance(layer, SyncBatchNorm) and (layer.activation is not None or layer.inplace):
        return False
    return fusion.followed_by_activation_at_most(layer)


def _replace_activation(activation: nn.Module, kind: type[nn.Module]) -> nn.Module:
    new: nn.Module = become(activation, kind)
    new.__dict__[ORIGIN] = type(activation), ProcessGroupReference(None)
    return new


def _from_sync(layer: nn.Module) -> nn.Module:
    if ORIGIN not in layer.__dict__:
        if layer.__dict__.pop(_FUSED, False):  # constructed as a SyncBatchNorm
            layer.activation = None  # type: ignore[assignment]
            layer.__dict__.pop("calls_function", None)
        return layer
    kind, own = layer.__dict__[ORIGIN]
    if issubclass(kind, _LazyNormBase) and not isinstance(layer, _LazyNormBase):
        kind = kind.cls_to_become
    old: nn.Module = become(layer, kind)
    is_norm = isinstance(layer, SyncBatchNorm)  # else an activation; nn.ReLU has inplace too
    of_ours = (
        ("_group", "_eps", "activation", "inplace", "check_finite", "calls_function", "reproducible") if is_norm else ()
    )
    for name in (ORIGIN, _FUSED, *of_ours):
        old.__dict__.pop(name, None)
    if issubclass(kind, nn.SyncBatchNorm):
        old.process_group = own.given
    return old
