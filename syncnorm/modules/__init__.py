"""The norms as modules. Each has parameters and buffers, and calls its function in `syncnorm.functional`."""

from .batch_norm import LazySyncBatchNorm, SyncBatchNorm
from .group_norm import GroupNorm
from .layer_norm import LayerNorm
from .process_group import ProcessGroupReference
from .rms_norm import RMSNorm

__all__ = ["GroupNorm", "LayerNorm", "LazySyncBatchNorm", "RMSNorm", "SyncBatchNorm"]

# Pickles of layers name this class by this module.
ProcessGroupReference.__module__ = __name__
