"""The job that a benchmark runs in: its ranks, each with one thread unless told otherwise, and their device."""

from __future__ import annotations

import inspect
import os
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..communicators import Communicator
from ..job.init import init
from ..job.launcher import detect_launcher

__all__ = ["Job", "distributed", "join"]


class Job(NamedTuple):
    """All ranks of the job, and the device that this one computes on."""

    group: Communicator
    device: torch.device


def join() -> Job:
    """Join the job that this process was launched in, or be alone. Collective on all ranks of the job.

    Ranks compute on CUDA devices where there are any. Each rank has as many threads as OMP_NUM_THREADS says, or one.
    A process alone with a CUDA device has a NCCL group of its own, which torch.nn.SyncBatchNorm asks for. If NCCL
    cannot make one, a warning says so, and the process has none.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if not torch.cuda.is_available():
        return Job(init(), torch.device("cpu"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if detect_launcher().launcher == "none" and dist.is_nccl_available():
        try:
            return Job(init("nccl"), device)
        except RuntimeError as error:
            warnings.warn(f"torch.nn.SyncBatchNorm is not timed, since NCCL failed: {error}", stacklevel=2)
    return Job(init(), device)


def distributed(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap the model, without DDP's broadcast of buffers for any norm; torch 2.13 gave that option another name."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    option = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **option)  # type: ignore[arg-type]
