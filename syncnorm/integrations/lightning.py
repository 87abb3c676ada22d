"""Lightning: a plugin that converts the BatchNorm layers of a LightningModule while the Trainer fits it."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.plugins import LayerSync
from torch import nn

from ..communicators import ProcessGroupLike
from ..convert import convert_sync_batchnorm, revert_sync_batchnorm

__all__ = ["SyncNormLayerSync"]


class SyncNormLayerSync(LayerSync):  # type: ignore[misc]
    """Let `lightning.pytorch.Trainer` convert BatchNorm layers to `syncnorm.SyncBatchNorm`, and back after training.

    Pass it as a plugin, and leave out sync_batchnorm=True, with which Lightning would convert to torch's layers::

        Trainer(plugins=[SyncNormLayerSync()], strategy="ddp", devices=2)

    Lightning calls `apply` before it wraps the module, and `revert` when it has finished. Only its strategies for
    DistributedDataParallel and FSDP do. With others, such as DeepSpeed, convert the layers in the module's `__init__`.

    Args:
        process_group: as in `syncnorm.convert_sync_batchnorm`.
        fuse: as there.

    Collectives: none.
    """

    def __init__(self, process_group: ProcessGroupLike = None, *, fuse: bool | Literal["auto"] = False):
        self.process_group = process_group
        self.fuse = fuse

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers of a module. Errors are those of `syncnorm.convert_sync_batchnorm`."""
        return convert_sync_batchnorm(model, self.process_group, fuse=self.fuse)

    def revert(self, model: nn.Module) -> nn.Module:
        """Give the layers their original classes again. Errors are those of `syncnorm.revert_sync_batchnorm`."""
        return revert_sync_batchnorm(model)
