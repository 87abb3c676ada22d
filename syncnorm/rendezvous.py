"""How the ranks of a job find each other for torch.distributed: by what torchrun sets, whoever started them.

Under mpirun MPI tells the address of a store, under srun Slurm's variables do. Both then stand in the environment as
torchrun would have set them, so that what is written for torchrun finds them too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import struct
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from . import forks
from .launchers import RENDEZVOUS, launched, refuse_to_be_alone

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch._C._distributed_c10d import Store

__all__ = ["connect", "meet", "serves_the_store", "tell_alone", "tell_by_slurm", "tell_over_mpi"]

PATIENCE = timedelta(minutes=5)  # for ranks to start; the timeout of collectives counts from then on
SIOCGIFADDR = 0x8915  # Linux's request for the address of an interface
_served: list[Any] = forks.keep([])  # the store that the other ranks connect to, on the rank that opened it
_meetings = itertools.count(1)  # the same on all ranks: of each group that was destroyed, keys are left in the store


def tell_over_mpi(world: MPI.Comm) -> None:
    """Set what torchrun would, unless it is set: rank 0 opens a store on a free port and tells all ranks where.

    Raises:
        RuntimeError: the launcher tells of several ranks, and MPI of one.
    """
    from .communicators.library import MPI

    if os.environ.keys() >= {*RENDEZVOUS}:
        return
    if world.size == 1:
        refuse_to_be_alone("MPI")
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    where = None
    if world.rank == 0:
        where = _serve("127.0.0.1" if host.size == world.size else address_of_this_host())
    _tell(world.rank, world.size, host.rank, host.size, *world.bcast(where), is_served=True)
    host.Free()


def tell_by_slurm() -> None:
    """Set what torchrun would, from the variables of a step of Slurm's; MASTER_ADDR and MASTER_PORT stay if set."""
    _, rank, size = launched()
    told = os.environ
    ranks_by_node = tasks_per_node(told["SLURM_STEP_TASKS_PER_NODE"])
    host = first_host(told["SLURM_STEP_NODELIST"]) if len(ranks_by_node) > 1 else "127.0.0.1"
    step = 101 * int(told["SLURM_JOB_ID"]) + int(told["SLURM_STEP_ID"])
    port = 20000 + step % 12000  # below those that systems give to clients
    where = told.get("MASTER_ADDR", host), told.get("MASTER_PORT", port)
    _tell(rank, size, told["SLURM_LOCALID"], ranks_by_node[int(told["SLURM_NODEID"])], *where, is_served=False)


def tell_alone() -> None:
    """Set what torchrun would for one process."""
    _tell(0, 1, 0, 1, *_serve("127.0.0.1"), is_served=True)


def _serve(address: str) -> tuple[str, int]:
    """Open a store on a free port and return where it is."""
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    _served.append(store)
    return address, store.port


def _tell(rank: int, size: int, local_rank: Any, local_size: int, address: str, port: Any, *, is_served: bool) -> None:
    """Set torchrun's variables; unless the store `is_served`, rank 0 will open it when it joins."""
    launched()  # reads the environment as it was
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(is_served),
    }


def meet(note: dict[str, Any]) -> tuple[Store, list[dict[str, Any]]]:
    """Wait for all ranks at the address that the environment tells; return a store for torch, and each rank's note.

    The store is this attempt's: where torchrun starts ranks anew, those of before have left their addresses in its own.

    Raises:
        RuntimeError: the address is not reached, or ranks are missing, after five minutes; with their numbers.
    """
    told = os.environ
    rank, size = int(told["RANK"]), int(told["WORLD_SIZE"])
    where = told["MASTER_ADDR"], int(told["MASTER_PORT"])
    serves = rank == 0 and serves_the_store() and not _served
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        *where, size, serves, PATIENCE, wait_for_workers=False, multi_tenant=True
    )
    if serves:
        _served.append(store)  # for as long as this process lives, whatever becomes of the group
    words = dist.PrefixStore(f"meeting/{next(_meetings)}", _ours(store))  # type: ignore[attr-defined]
    words.set(f"note of {rank}", json.dumps(note))
    notes = [f"note of {other}" for other in range(size)]
    try:
        words.wait(notes, PATIENCE)
    except dist.DistStoreError:
        missing = [str(other) for other, key in enumerate(notes) if not words.check([key])]
        raise RuntimeError(
            f"expected {size} ranks to join within {PATIENCE.total_seconds():g} s, missing: {', '.join(missing)}"
        ) from None
    return dist.PrefixStore("torch", words), [json.loads(word) for word in words.multi_get(notes)]  # type: ignore[attr-defined]


def serves_the_store() -> bool:
    """Return whether the job's store is a rank's, the first one's, and not a launcher's."""
    return bool(_served) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect(timeout: timedelta = timedelta(seconds=2)) -> Store:
    """Return a connection of its own to our part of the job's store, for a thread of its own."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return _ours(dist.TCPStore(*where, timeout=timeout, wait_for_workers=False))  # type: ignore[attr-defined]


def _ours(store: Store) -> Store:
    """Return the part of the job's store that is ours, and this attempt's where torchrun starts ranks anew."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"syncnorm/{attempt}", store)  # type: ignore[attr-defined]


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it: node03 of "node[03-05,9],gpu1"."""
    first = re.match(r"([^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")


def tasks_per_node(counts: str) -> list[int]:
    """Return how many tasks each node has, as Slurm writes it: [2, 2, 2, 1] of "2(x3),1"."""
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]


def address_of_this_host() -> str:
    """Return an address that other hosts reach: MASTER_ADDR if it is set, else the first one that is not local."""
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    import fcntl  # not on every system that can import syncnorm

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))
                address = socket.inet_ntoa(answer[20:24])
                if not address.startswith("127."):
                    return address
    raise RuntimeError(f"expected {socket.gethostname()} to have an IPv4 address: set MASTER_ADDR to one of rank 0's")
