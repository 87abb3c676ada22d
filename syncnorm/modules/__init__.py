"""The norms as modules: parameters, buffers, and one call of `syncnorm.functional`."""

from .batch_norm import LazySyncBatchNorm, SyncBatchNorm
from .group_norm import GroupNorm
from .layer_norm import LayerNorm
from .process_group import ProcessGroupReference
from .rms_norm import RMSNorm

__all__ = ["GroupNorm", "LayerNorm", "LazySyncBatchNorm", "RMSNorm", "SyncBatchNorm"]

# Layers refer to their process group by this class, and pickles to the class by this name.
ProcessGroupReference.__module__ = __name__
