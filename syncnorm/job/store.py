"""The job's store: open it, probe an address for one, connect to it.

A `torch.distributed.TCPStore` has no password: any process that can reach its port can read and write it. By default it
listens on all interfaces. Here it listens only on MASTER_ADDR, which is a loopback address if all ranks are on one
host.

If the port is closed, or used by another program, PyTorch's own connection attempt takes minutes or never returns, and
prints a C++ stack trace. Therefore the address is probed first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = [
    "ANOTHER_PROGRAM",
    "LOCALHOST",
    "PortInUseError",
    "connect",
    "free_port",
    "obstacle",
    "open_store",
    "write_once",
]

LOCALHOST = "127.0.0.1"
ANOTHER_PROGRAM = "another program uses the port"
BACKLOG = 4096  # ranks that may connect at the same time
GREETING = struct.Struct("=BIBI")  # a client's first message: VALIDATE with a magic number, PING with any number
VALIDATE, MAGIC, PING, NUMBER = 0, 0x3C85F7CE, 13, 0x53594E43


class PortInUseError(RuntimeError):
    """The port of the store is in use by another program."""


def open_store(host: str, port: int, timeout: timedelta) -> Store:
    """Open the store for the ranks that will connect to `host` and `port` (0: any free port).

    It listens on the address that `host` resolves to here. It listens on all interfaces if this is not an address of
    this machine (such as a service's). It also does so if this is a loopback address, as for many machines' own names,
    because other hosts may resolve the name differently.

    Raises:
        PortInUseError: another program uses the port.
        RuntimeError: this process may not listen on the port.
    """
    listening = _listen(host, port)
    address, port = listening.getsockname()[:2]
    reached = {"0.0.0.0": LOCALHOST, "::": "::1"}.get(address, address)
    return dist.TCPStore(  # type: ignore[attr-defined]
        reached,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,  # torch.distributed's own init_process_group may use it too
        master_listen_fd=listening.detach(),
    )


def connect(host: str, port: int, timeout: timedelta) -> Store:
    """Return a connection to a store that answers. `timeout` applies to each operation."""
    return dist.TCPStore(host, port, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]


def obstacle(host: str, port: int, timeout: float) -> str | None:
    """Return why no store can be reached at an address within `timeout` seconds, or None if one answers."""
    try:
        connection = socket.create_connection((host, port), timeout)
    except TimeoutError:
        return "no answer"
    except (socket.gaierror, UnicodeError):  # UnicodeError: the name is invalid
        return f"the name {host!r} is unknown"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    with connection, contextlib.suppress(OSError):
        connection.sendall(GREETING.pack(VALIDATE, MAGIC, PING, NUMBER))
        if connection.recv(4, socket.MSG_WAITALL) == struct.pack("=I", NUMBER):
            return None
    return ANOTHER_PROGRAM


def write_once(store: Store, key: str, value: str) -> str:
    """Set the key unless it is set, and return its value."""
    written: bytes = store.compare_set(key, "", value)
    return written.decode(errors="replace")


def free_port() -> int:
    """Return a port of this host that is currently free."""
    with socket.create_server((LOCALHOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket at an address of this machine."""
    try:
        for family, address in _addresses(host):
            try:
                return socket.create_server((address, port), family=family, backlog=BACKLOG)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(f"port {port} of {host} is in use") from None
        raise RuntimeError(
            f"expected to listen on port {port} for the other ranks: {(error.strerror or str(error)).lower()}; set "
            "MASTER_PORT to a port that this process may open"
        ) from None


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Return the addresses of `host`, without loopback ones if other hosts may resolve the name differently."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return []
    environ = os.environ
    one_host = host == "localhost" or _is_loopback(host)
    one_host |= "LOCAL_WORLD_SIZE" in environ and environ["LOCAL_WORLD_SIZE"] == environ.get("WORLD_SIZE")
    addresses = [(family, str(address[0])) for family, _, _, _, address in found]
    return [(family, address) for family, address in addresses if one_host or not _is_loopback(address)]


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
