"""How the ranks of an MPI job find each other for torch.distributed: by a TCP store whose address MPI tells."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from .communicators.mpi import MpiCommunicator

__all__ = ["store_over_mpi"]

SIOCGIFADDR = 0x8915  # Linux's request for the address of an interface


def store_over_mpi(world: MpiCommunicator) -> Store:
    """Return the store of the job: rank 0 opens it on a free port of its own, the others connect. All ranks call it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    one_host = len(set(world.all_gather_object(socket.gethostname()))) == 1
    server = None
    if world.rank == 0:
        address = "127.0.0.1" if one_host else address_of_this_host()
        server = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    where = world.comm.bcast(server and (server.host, server.port))
    store: Store = server or TCPStore(*where)
    return store


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
