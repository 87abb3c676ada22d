"""Synchronized BatchNorm for PyTorch: the statistics of the whole batch, over Gloo, MPI or NCCL (experimental)."""

from . import functional, testing
from .communicators import Communicator, communicator
from .communicators.subgroups import new_subgroups
from .convert import convert_sync_batchnorm, register_conversion, revert_sync_batchnorm
from .convert.patch import patch_torch
from .errors import DesyncError, NonFiniteError, RunningStatsError, SyncNormError
from .finite import debug
from .job.init import init
from .join import join
from .modules import GroupNorm, LayerNorm, LazySyncBatchNorm, RMSNorm, SyncBatchNorm
from .population import recompute_running_stats
from .statistics import assert_running_stats_agree, sync_running_stats

__version__ = "0.1.0"

__all__ = [
    "Communicator",
    "DesyncError",
    "GroupNorm",
    "LayerNorm",
    "LazySyncBatchNorm",
    "NonFiniteError",
    "RMSNorm",
    "RunningStatsError",
    "SyncBatchNorm",
    "SyncNormError",
    "assert_running_stats_agree",
    "communicator",
    "convert_sync_batchnorm",
    "debug",
    "functional",
    "init",
    "join",
    "new_subgroups",
    "patch_torch",
    "recompute_running_stats",
    "register_conversion",
    "revert_sync_batchnorm",
    "sync_running_stats",
    "testing",
]

# Pickles name a class by its module. Public classes are named by the place where users find them.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
del _name
