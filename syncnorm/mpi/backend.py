"""mpi4py as a backend of torch.distributed, under the name "mpi4py".

PyTorch's wheels have no MPI backend. Importing this module registers one and issues no collective. The default group
uses it after `syncnorm.init("mpi")`, and after `import syncnorm.mpi_backend` followed by
`torch.distributed.init_process_group("mpi4py")`. Under mpirun, the address of rank 0 is broadcast over MPI.
"""

from __future__ import annotations

import importlib
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..job.launcher import RENDEZVOUS
from .library import MPI
from .process_group import BACKEND, DEVICES, MpiProcessGroup
from .rendezvous import export_rendezvous
from .work import MpiFuture, MpiWork

__all__ = ["BACKEND", "MpiProcessGroup", "MpiWork"]


def _create(options: Any, _: Any) -> MpiProcessGroup:
    """Create a process group for torch.distributed. Only its members call this."""
    world = MPI.COMM_WORLD
    ranks = list(options.global_ranks_in_group) or list(range(world.Get_size()))
    if options.group_size != len(ranks) or world.Get_rank() != ranks[options.group_rank]:
        raise RuntimeError(
            f"expected torch.distributed's ranks to equal those of MPI.COMM_WORLD, got rank {options.group_rank} of "
            f"{options.group_size} on rank {world.Get_rank()} of {world.Get_size()}: pass MPI's rank and world size"
        )
    tag = zlib.crc32(str(options.group_id).encode()) % 2**15  # distinguishes groups made at the same time
    return MpiProcessGroup(world.Create_group(world.Get_group().Incl(ranks), tag), options.timeout, options.store)


def _env_rendezvous(url: str, **options: Any) -> Iterator[Any]:
    """Handle env:// for torch.distributed. If the variables are not set, all ranks first set them over MPI."""
    if not os.environ.keys() >= {*RENDEZVOUS}:
        export_rendezvous(MPI.COMM_WORLD)
        url = re.sub(r"\b(rank|world_size)=-1&?", "", url)  # torch's placeholders for unset variables
    yield from _torch_env_rendezvous(url, **options)


def _leave_out_of_graphs(*classes: type) -> None:
    """Exclude the methods of these classes from torch.compile. C++ calls them inside compiled regions."""
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameExecStrategy(dynamo._FrameAction.SKIP, dynamo._FrameAction.SKIP)
    for cls in classes:
        for function in vars(cls).values():
            if hasattr(function, "__code__"):
                dynamo.set_code_exec_strategy(function.__code__, skip)


_leave_out_of_graphs(MpiWork, MpiFuture, MpiProcessGroup)
_handlers = importlib.import_module("torch.distributed.rendezvous")._rendezvous_handlers  # hidden by a function
_torch_env_rendezvous = _handlers["env"]
_handlers["env"] = _env_rendezvous
dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=DEVICES)
