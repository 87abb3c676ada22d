"""The BatchNorm classes of other libraries with a forward of their own, and what a SyncBatchNorm does in their place.

They are known by their paths, so nothing is imported for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["ORIGIN", "forward_of", "parts_after", "parts_of", "reason_against"]

ORIGIN = "_converted_from"  # attribute of a converted layer: its original class and torch process group

_SYNCHRONIZED: tuple[str, ...] = ()  # nothing follows: their forward only synchronizes
_ACTIVATED = ("drop", "act")  # children that the forward calls after the norm, in this order
_PARTS = {  # by the path of the class that has the forward
    "syncnorm.SyncBatchNorm": (),
    "timm.layers.norm_act.BatchNormAct2d": _ACTIVATED,
    "timm.layers.norm_act.SyncBatchNormAct": _ACTIVATED,
    "timm.models.layers.norm_act.BatchNormAct2d": _ACTIVATED,  # timm before 0.9
    "timm.models.layers.norm_act.SyncBatchNormAct": _ACTIVATED,
    "timm_3d.layers.norm_act.BatchNormAct3d": _ACTIVATED,
    "timm_3d.layers.norm_act.SyncBatchNormAct": _ACTIVATED,
    "detectron2.layers.batch_norm.NaiveSyncBatchNorm": _SYNCHRONIZED,
    "mmdet3d.models.layers.norm.NaiveSyncBatchNorm1d": _SYNCHRONIZED,
    "mmdet3d.models.layers.norm.NaiveSyncBatchNorm2d": _SYNCHRONIZED,
    "mmdet3d.ops.norm.NaiveSyncBatchNorm1d": _SYNCHRONIZED,  # mmdet3d before 1.0
    "mmdet3d.ops.norm.NaiveSyncBatchNorm2d": _SYNCHRONIZED,
}
_REFUSED = {
    "lightly.models.batchnorm.SplitBatchNorm": "it splits its batch on purpose, and its buffers have values per split",
}


def parts_after(kind: type[nn.Module]) -> tuple[str, ...] | None:
    """Return the names of the children that the forward of a class calls after the norm. None: it is not known."""
    if kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return ()
    return _PARTS.get(_path_of_forward(kind))


def parts_of(layer: nn.Module) -> tuple[str, ...] | None:
    """Return what `parts_after` does for the class of a layer, or for the class that it had before its conversion."""
    return parts_after(vars(layer).get(ORIGIN, (type(layer), None))[0])


def reason_against(kind: type[nn.Module]) -> str | None:
    """Return why layers of a class must not be synchronized, if there is a reason."""
    return _REFUSED.get(_path_of_forward(kind))


def forward_of(base: type[Any], parts: tuple[str, ...]) -> Callable[..., Any]:
    """Return the forward of a class that calls `base.forward`, and then these children."""

    def forward(self: Any, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """Normalize `input`, (N, C, *), as `SyncBatchNorm.forward`, then call what followed in the original class."""
        if isinstance(input, fx.Proxy) and self._fits_one_node(input):
            return self._as_node(input, residual=residual, mask=mask)
        output = base.forward(self, input, residual=residual, mask=mask)
        for name in parts:
            part = self._modules.get(name)
            output = output if part is None else part(output)
        return output

    return forward


def _path_of_forward(kind: type[nn.Module]) -> str:
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    return f"{owner.__module__}.{owner.__qualname__}"
