"""Synchronized BatchNorm for Lightning's Trainer."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ..communicators import ProcessGroupLike
from ..convert import convert_sync_batchnorm, revert_sync_batchnorm

try:
    from lightning.pytorch.plugins import LayerSync
except ImportError:
    try:
        from pytorch_lightning.plugins import LayerSync
    except ImportError:
        raise RuntimeError("expected Lightning, found none: pip install lightning") from None

__all__ = ["SyncNormLayerSync"]


class SyncNormLayerSync(LayerSync):  # type: ignore[misc, unused-ignore]
    """Let a Trainer with several ranks convert the BatchNorm layers of its model, and convert them back afterwards.

    ::

        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", plugins=[SyncNormLayerSync()])

    Args:
        process_group: as in `syncnorm.convert_sync_batchnorm`.
        fuse: as in `syncnorm.convert_sync_batchnorm`.

    Collectives: those of the layers.
    """

    def __init__(self, process_group: ProcessGroupLike = None, *, fuse: bool | Literal["auto"] = False):
        self.process_group = process_group
        self.fuse = fuse

    def apply(self, model: Any) -> nn.Module:
        """Return the model with its layers converted. The Trainer calls this before DistributedDataParallel."""
        return convert_sync_batchnorm(model, self.process_group, fuse=self.fuse)

    def revert(self, model: Any) -> nn.Module:
        """Return the model with its original layers. The Trainer calls this when it has finished."""
        return revert_sync_batchnorm(model)
