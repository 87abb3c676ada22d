"""What a forked child of a rank has of its parent's job: it may neither use it nor free it.

Process groups and stores work by threads and connections that fork does not copy. A child that frees a group when it
exits waits for ever for threads that it does not have. `syncnorm.mpi.forks` does the same for MPI.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch.distributed as dist

__all__ = ["REFUSAL", "is_inherited", "keep"]

REFUSAL = (
    "expected a collective in the process that joined the job, got one in a forked child of it: train in the rank "
    "itself, or call eval() on the model in the child"
)

_kept: list[Any] = []  # what other modules hold that a child must not free
_inherited: list[Any] = []  # in a child: its parent's process groups


def keep(held: Any) -> Any:
    """Return what was given; a forked child will never free it."""
    _kept.append(held)
    return held


def is_inherited(group: dist.ProcessGroup | None) -> bool:
    """Return whether a process group (None: the default one) was made by a parent of this process."""
    return bool(_inherited) and any((group or dist.group.WORLD) is other for other in _inherited)


def _in_child() -> None:
    if dist.is_available():
        _inherited.extend(dist.distributed_c10d._world.pg_map)
    for held in (_inherited, _kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))  # it outlives the interpreter


os.register_at_fork(after_in_child=_in_child)
