"""Keep a forked child of a rank from using or freeing its parent's process groups and stores.

They depend on threads and connections that fork does not copy. A child that frees a group when it exits waits forever
for threads that it does not have. `syncnorm.mpi.forks` does the same for MPI.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch.distributed as dist

__all__ = ["REFUSAL", "is_inherited", "keep"]

REFUSAL = (
    "expected a collective in the process that joined the job, got one in a forked child of it: train in the parent "
    "process, or call eval() on the model in the child"
)

_kept: list[Any] = []  # objects of other modules that a child must not free
_inherited: list[Any] = []  # in a child: its parent's process groups


def keep(held: Any) -> Any:
    """Return the argument. A forked child will never free it."""
    _kept.append(held)
    return held


def is_inherited(group: dist.ProcessGroup | None) -> bool:
    """Return whether a process group (None: the default one) was made by the parent of this forked process."""
    return bool(_inherited) and any((group or dist.group.WORLD) is other for other in _inherited)


def _in_child() -> None:
    if dist.is_available():
        _inherited.extend(dist.distributed_c10d._world.pg_map)
    for held in (_inherited, _kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))  # it outlives the interpreter


os.register_at_fork(after_in_child=_in_child)
