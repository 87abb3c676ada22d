"""Communicators: this process alone, a `torch.distributed` process group, or an mpi4py communicator.

`communicator` resolves any supported `process_group` argument.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch.distributed as dist

from .compiled import handle_of, register
from .local import LocalCommunicator
from .protocol import Collectives, Communicator

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "ALONE",
    "Collectives",
    "Communicator",
    "LocalCommunicator",
    "ProcessGroupLike",
    "communicator",
    "has_default",
    "register_group_type",
    "set_default",
    "uncounted",
]

ProcessGroupLike: TypeAlias = "dist.ProcessGroup | DeviceMesh | MPI.Comm | Collectives | None"

_AVAILABLE = dist.is_available()
_default: Communicator | None = None  # made by syncnorm.init(), if not torch.distributed's default group
_default_group: dist.ProcessGroup | None = None  # torch.distributed's default group when _default was set
ALONE = LocalCommunicator()  # this process, which communicates with no other
_made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # the communicator of each group, by id
_of_world: tuple[weakref.ref[dist.ProcessGroup], Communicator] | None = None  # the default group and its communicator
_known: set[type] = {LocalCommunicator}  # our own classes seen so far: skips isinstance on a protocol (15 µs)
_PACKAGE = __name__.rpartition(".")[0] + "."
_resolvers: dict[type[dist.ProcessGroup], Callable[[Any], Communicator]] = {}


def set_default(made: Communicator | None, default_group: dist.ProcessGroup | None = None) -> None:
    """Set the communicator that `process_group=None` stands for.

    Args:
        made: the communicator, or None to unset it.
        default_group: torch.distributed's default group of the same ranks. Destroying it unsets the communicator.
    """
    global _default, _default_group
    _default, _default_group = made, default_group


def has_default() -> bool:
    """Return whether `set_default` has set a communicator that is still in use."""
    return _current_default() is not None


def _current_default() -> Communicator | None:
    return _default if _default_group is None or _default_group is dist.group.WORLD else None


def uncounted(group: Communicator) -> Communicator:
    """Return the group for collectives that are not part of a step: the communicator inside a counting one."""
    below: Communicator = getattr(group, "uncounted", group)
    return below


def communicator(process_group: ProcessGroupLike = None) -> Communicator:
    """Return the communicator that `process_group` stands for. Issues no collective.

    Args:
        process_group: a `torch.distributed.ProcessGroup`, a one-dimensional `DeviceMesh`, an `mpi4py.MPI.Comm`, or a
            `Communicator`, which is returned unchanged and may lack `split`. None stands for the communicator of
            `syncnorm.init()`, else torch.distributed's default group, else this process alone.

    Raises:
        ValueError: this rank is not a member of the group, or the mesh has more than one dimension.
        TypeError: `process_group` is something else, or a group of torchft, whose members change.
    """
    if type(process_group) in _known:
        return process_group  # type: ignore[return-value]
    if process_group is None:
        made = _current_default()
        if made is not None:
            return made
        world = dist.group.WORLD if _AVAILABLE else None
        return ALONE if world is None else _of_process_group(world)
    if _AVAILABLE:
        if isinstance(process_group, dist.ProcessGroup):
            return _of_process_group(process_group)
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
            raise ValueError(
                f"expected a process group that this rank is a member of, got one without rank {dist.get_rank()}"
            )
        if isinstance(process_group, _device_mesh_type()):
            return _of_process_group(_group_of_mesh(process_group))
    if any(kind.__module__ == "mpi4py.MPI" for kind in type(process_group).__mro__):
        from ..mpi.communicator import of_comm

        return of_comm(process_group)  # type: ignore[arg-type]
    if handle_of(process_group) is not None:  # seen before: torch.compile cannot trace what follows
        return process_group  # type: ignore[return-value]
    if isinstance(process_group, Collectives) and not isinstance(process_group, type):
        if type(process_group).__module__.startswith(_PACKAGE):
            _known.add(type(process_group))
        register(process_group)
        return process_group  # type: ignore[return-value]  # split may be missing, which new_subgroups checks
    raise TypeError(
        "expected process_group to be a torch.distributed ProcessGroup, a one-dimensional DeviceMesh, an mpi4py Comm, "
        f"an object with the members of syncnorm.Communicator, or None, got {process_group!r}"
    )


def register_group_type(kind: type[dist.ProcessGroup], resolve: Callable[[Any], Communicator]) -> None:
    """Use `resolve` instead of `ProcessGroupCommunicator` to make communicators of process groups of this class."""
    _resolvers[kind] = resolve


def _of_default_group(world: dist.ProcessGroup) -> Communicator:
    """Return the communicator of torch.distributed's default group. A new default group gets a new one."""
    from .process_group import ProcessGroupCommunicator

    global _of_world
    if _of_world is None or _of_world[0]() is not world:
        _check_members(world)
        _of_world = weakref.ref(world), ProcessGroupCommunicator()
    return _of_world[1]


def _of_process_group(group: dist.ProcessGroup) -> Communicator:
    from .process_group import ProcessGroupCommunicator

    if group is dist.group.WORLD and (default := _current_default()) is not None:
        return default
    if (resolve := _resolvers.get(type(group))) is not None:
        return resolve(group)
    if group is dist.group.WORLD:
        return _of_default_group(group)
    made = _made.get(id(group))
    if made is None:
        _check_members(group)
        _made[id(group)] = made = ProcessGroupCommunicator(group)  # keeps the group alive, so its id stays unique
    return made


def _check_members(group: dist.ProcessGroup) -> None:
    if any(kind.__module__.partition(".")[0] == "torchft" for kind in type(group).__mro__):
        raise TypeError(
            f"expected a process group with fixed members, got {type(group).__name__} of torchft, whose members "
            "change: statistics would be those of other ranks from step to step"
        )


def _device_mesh_type() -> type:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh


def _group_of_mesh(mesh: Any) -> dist.ProcessGroup:
    if mesh.ndim != 1:
        raise ValueError(
            f"expected a one-dimensional DeviceMesh, got one of shape {tuple(mesh.shape)}: pass the axis along "
            'which the batch is sharded, for example mesh["dp"]'
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"expected a DeviceMesh that contains this rank, got {mesh} on rank {dist.get_rank()}")
    group: dist.ProcessGroup = mesh.get_group()
    return group
