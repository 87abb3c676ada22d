"""Decide, once per process group, whether its ranks sum CPU tensors in shared memory.

The ranks tell each other over the group's store where they are, and then whether they could map the memory of their
host. They all decide alike: if one rank cannot, or SYNCNORM_SHARED_MEMORY=0 is set on one, the group's backend sums.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import time
import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ..job import desync
from .between_hosts import Leaders
from .host import host_of_this_process, start_of
from .segment import Segment, new_name, unlink

if TYPE_CHECKING:
    from .shared_memory import SharedMemory

__all__ = ["has_cpu_backend", "route_of", "shared_memory_of", "timeout_of"]


class _Decision(NamedTuple):
    memory: SharedMemory | None
    route: str


LOOK = 0.5  # seconds between two looks at whether a rank that is waited for has ended
SWITCHED_OFF = "SYNCNORM_SHARED_MEMORY=0"
_decided: weakref.WeakKeyDictionary[dist.ProcessGroup, _Decision] = weakref.WeakKeyDictionary()


def shared_memory_of(group: dist.ProcessGroup) -> SharedMemory | None:
    """Return the shared memory of a group, or None if its backend sums. The first call is collective.

    Raises:
        RuntimeError: the other ranks do not join the first call within the timeout of the group.
        ValueError: SYNCNORM_SHARED_MEMORY is neither 0 nor 1.
    """
    if group not in _decided:
        if not _decided:
            atexit.unregister(_leave_all)
            atexit.register(_leave_all)  # after init's handlers, so it runs before this rank waits for the others
        _decided[group] = _decide(group)
    return _decided[group].memory


def route_of(group: dist.ProcessGroup) -> str:
    """Return how a group sums CPU tensors of at most 64 KB, such as "in shared memory". Collective as above."""
    shared_memory_of(group)
    return _decided[group].route


def _leave_all() -> None:
    """Tell the other ranks of all groups that this process ends."""
    for decision in list(_decided.values()):
        if decision.memory is not None:
            decision.memory.leave()


def _decide(group: dist.ProcessGroup) -> _Decision:
    backend = f"over {dist.get_backend(group)}"
    _, store = dist.distributed_c10d._world.pg_map.get(group, (None, None))
    if store is None or group.size() == 1:  # no store: a group that another library has made
        return _Decision(None, backend)
    board = _Board(store, group.rank(), dist.get_process_group_ranks(group), timeout_of(group))
    ranks = [json.loads(place) for place in board.exchange("place", json.dumps(_place()))]
    if refusals := {rank: place["refusal"] for rank, place in enumerate(ranks) if place["refusal"]}:
        _warn(group, {rank: why for rank, why in refusals.items() if why != SWITCHED_OFF})
        return _Decision(None, f"{backend} ({next(iter(refusals.values()))})")
    hosts: dict[str, list[int]] = {}
    for rank, place in enumerate(ranks):
        hosts.setdefault(place["host"], []).append(rank)
    if len(hosts) == len(ranks):
        return _Decision(None, f"{backend} (one rank per host)")
    if len(hosts) > 1 and not has_cpu_backend(group):
        return _Decision(None, f"{backend} (several hosts)")
    memory = _share(group, board, ranks, list(hosts.values()), hosts[ranks[board.rank]["host"]])
    if memory is None:
        return _Decision(None, backend)
    between = f" of each host, and {backend} between {len(hosts)} hosts" if len(hosts) > 1 else ""
    return _Decision(memory, f"in shared memory{between}")


def _place() -> dict[str, Any]:
    """Return where this rank is, and why it cannot share memory, or "" if it can.

    Raises:
        ValueError: SYNCNORM_SHARED_MEMORY is neither 0 nor 1.
    """
    asked = os.environ.get("SYNCNORM_SHARED_MEMORY", "1")
    if asked not in ("0", "1"):
        raise ValueError(f"expected SYNCNORM_SHARED_MEMORY to be 0 or 1, got {asked!r}")
    host, refusal, process = "", SWITCHED_OFF if asked == "0" else "", os.getpid()
    if not refusal:
        try:
            from . import shared_memory  # noqa: F401

            host = host_of_this_process()
        except (ImportError, OSError) as error:  # no compiled library, no /dev/shm
            refusal = str(error)
    cores = sorted(os.sched_getaffinity(0))
    place = {"host": host, "refusal": refusal, "process": process, "start": start_of(process), "cores": cores}
    return place | {"segment": new_name()}  # for the first rank of a host; all know it before there is a file


def _share(
    group: dist.ProcessGroup, board: _Board, ranks: Sequence[dict[str, Any]], hosts: list[list[int]], here: list[int]
) -> SharedMemory | None:
    """Map the memory of this host, or return None if a rank of any host cannot."""
    from .shared_memory import Peer, SharedMemory, bytes_of_segment

    segment, problem, size = None, "", bytes_of_segment(len(here))
    name = ranks[here[0]]["segment"]
    is_first = board.rank == here[0]
    try:
        try:
            if is_first or board.get("created", here[0]):
                segment = (Segment.create if is_first else Segment.open)(name, size, len(here))
        except OSError as error:
            problem = str(error)
        if is_first:
            board.put("created", "yes" if segment else "")
        problems = board.exchange("problem", problem)
    finally:
        unlink(name)  # each rank does, since the others may have been killed
    if segment is None or any(problems):
        _warn(group, {rank: why for rank, why in enumerate(problems) if why})
        return None
    peers = [Peer(rank, ranks[rank]["process"], ranks[rank]["start"]) for rank in here]
    leaders = Leaders(None if group is dist.group.WORLD else group, [first for first, *_ in hosts], board.rank)
    crowded = len(here) > len({core for rank in here for core in ranks[rank]["cores"]})
    return SharedMemory(segment, peers, board.rank, leaders if len(hosts) > 1 else None, board.timeout, crowded)


def _warn(group: dist.ProcessGroup, problems: dict[int, str]) -> None:
    """Warn on the first rank of the group."""
    if problems and group.rank() == 0:
        rank, why = next(iter(problems.items()))
        warnings.warn(
            f"the ranks sum CPU tensors over {dist.get_backend(group)} instead of in shared memory, which takes up to "
            f"100 times as long. Rank {rank}: {why}. Make room in /dev/shm (docker run --shm-size=1g), or set "
            "SYNCNORM_SHARED_MEMORY=0",
            stacklevel=2,
        )


def has_cpu_backend(group: dist.ProcessGroup) -> bool:
    """Return whether a group takes CPU tensors. A group of NCCL alone does not."""
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return False
    return True


def timeout_of(group: dist.ProcessGroup) -> float:
    """Return the timeout of a group's collectives, in seconds."""
    try:
        backend: Any = group._get_backend(torch.device("cpu" if has_cpu_backend(group) else "cuda"))
        return float(backend.options._timeout.total_seconds())
    except (RuntimeError, AttributeError):  # a backend that does not tell
        return float(dist.constants.default_pg_timeout.total_seconds())


class _Board:
    """What the ranks of a group tell each other, in its store.

    It polls, because waiting in a store would block the other threads of this process that use it.

    Args:
        rank: of this process in the group.
        ranks: of the group in the job.
        timeout: seconds to wait for a rank.
    """

    def __init__(self, store: Any, rank: int, ranks: list[int], timeout: float):
        self.store, self.rank, self.ranks, self.timeout = store, rank, ranks, timeout
        # A group that was destroyed and made again may find the same store.
        self.round = store.add(f"syncnorm sharing {rank}", 1)

    def put(self, key: str, value: str) -> None:
        """Tell the others a value."""
        self.store.set(self._key(key, self.rank), value)

    def get(self, key: str, rank: int) -> str:
        """Return the value of a rank, once it has told it."""
        name, start, interval, looks = self._key(key, rank), time.monotonic(), 1e-4, 1
        while not self.store.check([name]):
            waited = time.monotonic() - start
            if waited > self.timeout:
                raise RuntimeError(f"waited {self.timeout:g} s for rank {rank} until the timeout expired")
            if waited > looks * LOOK:
                looks += 1
                end = None
                with contextlib.suppress(RuntimeError):  # the job's store does not answer, and may not be needed
                    end = desync.end_of(self.ranks[rank])
                if end and not self.store.check([name]):
                    raise RuntimeError(f"rank {rank} does not come: {end}")
            time.sleep(interval)
            interval = min(2 * interval, 0.02)
        value: bytes = self.store.get(name)
        return value.decode()

    def exchange(self, key: str, value: str) -> list[str]:
        """Tell the others a value, and return those of all ranks."""
        self.put(key, value)
        return [self.get(key, rank) for rank in range(len(self.ranks))]

    def _key(self, key: str, rank: int) -> str:
        return f"syncnorm sharing {self.round}: {key} of {rank}"
