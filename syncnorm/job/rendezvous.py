"""Rendezvous of the ranks of a job at one store, whatever the launcher.

The store's address comes from torchrun, from MPI (mpirun) or from Slurm (srun). It is exported as torchrun's variables,
so code written for torchrun works unchanged. A single process opens no port. Without a launcher it sets no variable.

Two jobs that use the same port by mistake are detected by the job's id (`job_id`) and by the information that each rank
writes only once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ..errors import printable
from . import forks
from . import store as job_store
from .launcher import detect_launcher
from .store import ANOTHER_PROGRAM

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["address_of_this_host", "connect", "export", "have_joined", "job_id", "join", "serve", "serves_the_store"]

JOIN_TIMEOUT = 300.0  # seconds for all ranks to join; the timeout of collectives starts afterwards
FIRST_NOTICE = 8.0  # seconds after which a rank prints on stderr which ranks it waits for
FURTHER_NOTICES = 60.0  # seconds between two such lines
FOREIGN_TIMEOUT = 10.0  # seconds during which another program at the port may be the store of a job that is ending
OPERATION_TIMEOUT = timedelta(minutes=5)  # for one operation of the store after all ranks have joined
SIOCGIFADDR = 0x8915  # Linux's request for the address of an interface
JOB = "syncnorm/job"  # the key of the job's id, in a store that a rank serves
_served: list[Any] = forks.keep([])  # the store that the other ranks connect to, on the rank that opened it
_token = secrets.token_hex(8)  # identifies this process: process ids repeat in containers
_joined = 0  # how often this process has joined, once for each default group: equal on all ranks


def export(rank: int, size: int, local_rank: Any, local_size: int, address: str, port: Any, *, is_served: bool) -> None:
    """Set torchrun's variables. Unless the store `is_served` already, rank 0 opens it when it joins."""
    detect_launcher()  # caches the launcher before the environment changes
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(is_served),
    }


def join(rank: int, size: int, info: dict[str, Any]) -> tuple[Store, list[dict[str, Any]]]:
    """Wait for all ranks at MASTER_ADDR and MASTER_PORT. Return a store for torch.distributed and each rank's `info`.

    The store belongs to this attempt. After torchrun restarts the ranks, its own store still holds the addresses of the
    previous ones. A single process gets a store in its own memory.

    Args:
        rank: the rank of this process.
        size: the number of ranks.
        info: information for the other ranks. The host and the process id are added.

    Raises:
        ValueError: MASTER_ADDR, MASTER_PORT or SYNCNORM_JOIN_TIMEOUT is invalid.
        RuntimeError: the store is unreachable, or ranks are missing, after SYNCNORM_JOIN_TIMEOUT seconds (default: five
            minutes). Or another program or job uses the port, another process has joined as this rank, or the ranks
            disagree on the world size.
    """
    global _joined
    info = info | {"host": socket.gethostname(), "process": os.getpid(), "token": _token}
    if size == 1:
        _joined += 1
        return dist.HashStore(), [info]  # type: ignore[attr-defined]
    host, port = _address()
    waiting = _Waiting(rank, size, f"{host}:{port}")
    serves = rank == 0 and serves_the_store() and not _served
    if serves:
        serve(host, port)
    try:
        store = _register(_reach(host, port, waiting), info, waiting)
        ranks = _gather_info(store, waiting)
        _check_unique(ranks[rank], info, waiting)  # another process may have overwritten ours
    except Exception as error:
        if serves:
            _served.clear()  # so that the next call can open one at another address
        if isinstance(error, dist.DistNetworkError):
            raise RuntimeError(
                f"expected the job's store at {waiting.where} to stay open, but its connection was lost: check why the "
                "process that served it (rank 0 or torchrun) has ended"
            ) from None
        raise
    _joined += 1
    return dist.PrefixStore("torch", store), ranks  # type: ignore[attr-defined]


def have_joined() -> bool:
    """Return whether this process has joined its job, or was alone in it."""
    return _joined > 0


def serves_the_store() -> bool:
    """Return whether rank 0 serves the job's store, and not the launcher."""
    return bool(_served) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect(timeout: timedelta = timedelta(seconds=2)) -> Store:
    """Return a new connection to our job's part of the store, for use in a separate thread.

    Raises:
        RuntimeError: no store answers.
    """
    host, port = _address()
    obstacle = job_store.obstacle(host, port, timeout.total_seconds())
    if obstacle is not None:
        raise RuntimeError(f"expected the job's store at {host}:{port}, got: {obstacle}")
    return _prefixed(job_store.connect(host, port, timeout))


def job_id() -> str:
    """Return the job's id: SYNCNORM_JOB_ID, else the id that torchrun or Slurm assigned, else "unnamed".

    Under mpirun, rank 0 chooses SYNCNORM_JOB_ID at random.
    """
    environ = os.environ
    if name := environ.get("SYNCNORM_JOB_ID") or environ.get("TORCHELASTIC_RUN_ID"):
        return name
    step = f".{environ['SLURM_STEP_ID']}" if detect_launcher().launcher == "srun" else ""
    return f"{environ['SLURM_JOB_ID']}{step} of Slurm" if "SLURM_JOB_ID" in environ else "unnamed"


def _prefixed(store: Store) -> Store:
    """Return our job's part of the store. Each restart by torchrun has its own."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"syncnorm/{job_id()}/{attempt}", store)  # type: ignore[attr-defined]


def _of_join(number: int, store: Store) -> Store:
    """Return the part of the store for one call of `join`. Others hold the keys of groups that were destroyed."""
    return dist.PrefixStore(f"join/{number}", _prefixed(store))  # type: ignore[attr-defined]


def _address() -> tuple[str, int]:
    """Return the host and the port of the job's store."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not host.strip():
        raise ValueError(f"expected MASTER_ADDR to be the name or the address of rank 0's host, got {host!r}")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"expected MASTER_PORT to be a number from 1 to 65535, got {port!r}")
    return host, int(port)


class _Waiting:
    """The deadline of a rank that waits for others, and the lines that it prints on stderr meanwhile.

    Args:
        rank: the rank that waits.
        size: the number of ranks.
        where: the address of the store.
    """

    def __init__(self, rank: int, size: int, where: str):
        self.rank = rank
        self.size = size
        self.where = where
        self.limit = _join_timeout()
        now = time.monotonic()
        self.deadline = now + self.limit
        self.next_notice = now + FIRST_NOTICE

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def until_notice(self) -> float:
        """Return the seconds until the next line is due."""
        return self.next_notice - time.monotonic()

    def notify(self, what: str) -> None:
        """Print what this rank waits for."""
        line = f"syncnorm: rank {self.rank} of {self.size} is waiting for {what}. It times out in {self.left():.0f} s"
        print(line, file=sys.stderr, flush=True)
        self.next_notice = time.monotonic() + FURTHER_NOTICES


def _join_timeout() -> float:
    """Return the seconds within which all ranks must join."""
    value = os.environ.get("SYNCNORM_JOIN_TIMEOUT", str(JOIN_TIMEOUT))
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(value)) < math.inf:
            return seconds
    raise ValueError(f"expected SYNCNORM_JOIN_TIMEOUT to be a positive number of seconds, got {value!r}")


def serve(host: str, port: int) -> int:
    """Open the job's store and return its port."""
    try:
        store: Any = job_store.open_store(host, port, OPERATION_TIMEOUT)
    except job_store.PortInUseError:
        raise RuntimeError(
            f"expected port {port} of {host} to be free for the job's store, but it is used by {_user_of(host, port)}: "
            "set MASTER_PORT to another port on all ranks"
        ) from None
    store.set(JOB, job_id())
    _served.append(store)
    opened: int = store.port
    return opened


def _user_of(host: str, port: int) -> str:
    """Return which program or job uses a port, as far as its store says."""
    if job_store.obstacle(host, port, 1.0) is not None:
        return "another program"
    store = job_store.connect(host, port, timedelta(seconds=2))
    if not store.check([JOB]):
        return "another program"
    if (job := store.get(JOB).decode(errors="replace")) != job_id():
        return f"job {printable(job)}"
    try:
        info = _of_join(1, store).get("info of 0")
        return f"rank 0 of this job, {_process(_read(info, 0, f'{host}:{port}'))}"
    except dist.DistStoreError:
        return "another process of this job"


def _reach(host: str, port: int, waiting: _Waiting) -> Store:
    """Wait until the job's store answers and return a connection to it."""
    server = "rank 0" if serves_the_store() else "the launcher"
    foreign: float | None = None  # since when another program has answered
    while True:
        obstacle = job_store.obstacle(host, port, min(2.0, max(waiting.left(), 0.1)))
        if obstacle is None:
            store = job_store.connect(host, port, timedelta(seconds=FOREIGN_TIMEOUT))
            store.set_timeout(OPERATION_TIMEOUT)
            return store
        now = time.monotonic()
        foreign = None if obstacle != ANOTHER_PROGRAM else foreign or now
        if waiting.left() <= 0 or (foreign and now - foreign > FOREIGN_TIMEOUT):
            within = f" within {waiting.limit:g} s" if waiting.left() <= 0 else ""
            raise RuntimeError(
                f"expected {server} to open the job's store at {waiting.where}{within}, got: {obstacle}. Check "
                f"MASTER_ADDR, MASTER_PORT, and that {server} is running"
            )
        if waiting.until_notice() <= 0:
            waiting.notify(f"{server} at {waiting.where}: {obstacle}")
        time.sleep(0.1)


def _register(store: Store, info: dict[str, Any], waiting: _Waiting) -> Store:
    """Write this rank's info to the part of the store for this join, and return that part."""
    rank, size, where = waiting.rank, waiting.size, waiting.where
    if serves_the_store():  # several jobs may share a launcher's store
        _compare_jobs(store, where)
    ours = _of_join(_joined + 1, store)
    if (first := job_store.write_once(ours, "size", str(size))) != str(size):
        raise RuntimeError(
            f"expected the same WORLD_SIZE on all ranks at {where}, got {size} on rank {rank} and {printable(first)} "
            "on the first rank that joined: if another job uses this port, set MASTER_PORT to another port on all "
            "ranks of this one"
        )
    _check_unique(_read(job_store.write_once(ours, f"info of {rank}", json.dumps(info)), rank, where), info, waiting)
    return ours


def _check_unique(found: dict[str, Any], info: dict[str, Any], waiting: _Waiting) -> None:
    """Raise if another process has joined as this rank."""
    if (found["process"], found.get("token")) != (info["process"], info["token"]):
        raise RuntimeError(
            f"expected one process for each rank, but rank {waiting.rank} of {waiting.size} has already joined at "
            f"{waiting.where}: {_process(found)}. This is {_process(info)}. Check that no rank was started twice. If "
            "another job uses this port, set MASTER_PORT to another port on all ranks of one of them"
        )


def _compare_jobs(store: Store, where: str) -> None:
    """Raise unless a rank of this job has opened the store."""
    try:
        store.wait([JOB], timedelta(seconds=FOREIGN_TIMEOUT))
        found = f"that of job {printable(store.get(JOB).decode(errors='replace'))}"
    except dist.DistStoreError:
        found = "that of another program"
    expected = f"job {printable(job_id())}"
    if found != f"that of {expected}":
        raise RuntimeError(
            f"expected the store of this {expected} at {where}, got {found}: set MASTER_PORT to another port on all "
            "ranks of one of them"
        )


def _gather_info(store: Store, waiting: _Waiting) -> list[dict[str, Any]]:
    """Wait for the info of all ranks and return it."""
    keys = [f"info of {rank}" for rank in range(waiting.size)]
    while True:
        limit = max(min(waiting.left(), waiting.until_notice(), 5.0), 0.01)  # short, so that Ctrl-C works
        try:
            store.wait(keys, timedelta(seconds=limit))
        except dist.DistStoreError:
            if waiting.left() > 0 and waiting.until_notice() > 0:
                continue
            missing = _numbers([rank for rank, key in enumerate(keys) if not store.check([key])])
            if waiting.left() <= 0:
                raise RuntimeError(
                    f"expected {waiting.size} ranks to join within {waiting.limit:g} s, missing: {missing}. Check that "
                    "they were started, or set SYNCNORM_JOIN_TIMEOUT to wait longer"
                ) from None
            waiting.notify(f"rank{'s' * (',' in missing)} {missing} at {waiting.where}")
        else:
            return [_read(info, rank, waiting.where) for rank, info in enumerate(store.multi_get(keys))]


def _read(written: str | bytes, rank: int, where: str) -> dict[str, Any]:
    """Return a rank's info from its text in the store."""
    with contextlib.suppress(ValueError):
        info = json.loads(written)
        if isinstance(info, dict) and isinstance(info.get("host"), str) and isinstance(info.get("process"), int):
            return info | {"host": printable(info["host"])}
    raise RuntimeError(
        f"expected the info of rank {rank} at {where} to be written by syncnorm, got {printable(str(written))[:200]}"
    )


def _process(info: dict[str, Any]) -> str:
    """Return the process id and the host of a rank."""
    return f"process {info['process']} on {info['host']}"


def _numbers(ranks: Sequence[int]) -> str:
    """Return ranks as text, such as "1, 3": at most 16 of them, and how many more there are."""
    shown = ", ".join(map(str, ranks[:16]))
    return f"{shown} and {len(ranks) - 16} more" if len(ranks) > 16 else shown


def address_of_this_host() -> str:
    """Return an address that other hosts can reach: MASTER_ADDR if set, else the first one that is not loopback."""
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    import fcntl  # not available on every system

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):  # the interface has no IPv4 address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))
                address = socket.inet_ntoa(answer[20:24])
                if not address.startswith("127."):
                    return address
    raise RuntimeError(f"expected {socket.gethostname()} to have an IPv4 address: set MASTER_ADDR to one of rank 0's")
