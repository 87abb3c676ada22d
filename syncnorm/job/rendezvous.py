"""How the ranks of a job find each other for torch.distributed: by what torchrun sets, whoever started them.

Under mpirun MPI tells the address of a store, under srun Slurm's variables do. Both are then set as torchrun would have
set them, so that what is written for torchrun finds them too. A process alone meets nobody: it opens no port, and
without a launcher it sets no variable.

Two things keep jobs apart that use one port by mistake: an id of the job (`job_id`), and a note of each rank, which is
written only once.
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

JOIN_TIMEOUT = 300.0  # seconds for all ranks to come; the timeout of collectives counts from then on
FIRST_NOTICE = 8.0  # seconds after which a rank says on stderr for whom it waits
FURTHER_NOTICES = 60.0  # seconds from one such line to the next
FOREIGN = 10.0  # seconds for which another program at the store's port may be the store of a job that is ending
OPERATION = timedelta(minutes=5)  # for one operation of the store, once the ranks have met
SIOCGIFADDR = 0x8915  # Linux's request for the address of an interface
JOB = "syncnorm/job"  # the key of the job's id in a store that is the job's own
_served: list[Any] = forks.keep([])  # the store that the other ranks connect to, on the rank that opened it
_token = secrets.token_hex(8)  # of this process: process ids repeat in containers
_joined = 0  # of this process with the others, for each of its groups: the same number on all ranks


def export(rank: int, size: int, local_rank: Any, local_size: int, address: str, port: Any, *, is_served: bool) -> None:
    """Set torchrun's variables; unless the store `is_served`, rank 0 will open it when it joins."""
    detect_launcher()  # reads the environment as it was
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(is_served),
    }


def join(rank: int, size: int, note: dict[str, Any]) -> tuple[Store, list[dict[str, Any]]]:
    """Wait for all ranks at the address that the environment tells; return a store for torch, and each rank's note.

    The store is this attempt's: where torchrun starts ranks anew, those of before have left their addresses in its own.
    A process alone gets one in its own memory.

    Args:
        rank: of this process.
        size: the number of ranks.
        note: what the others are to know of this rank. Its host and process id are added.

    Raises:
        ValueError: MASTER_ADDR, MASTER_PORT or SYNCNORM_JOIN_TIMEOUT is set to what it cannot be.
        RuntimeError: the store is not reached, or ranks are missing, after SYNCNORM_JOIN_TIMEOUT seconds (five minutes
            unless set); the port is another program's or another job's; another process has joined as this rank; the
            ranks disagree on how many they are.
    """
    global _joined
    note = note | {"host": socket.gethostname(), "process": os.getpid(), "token": _token}
    if size == 1:
        _joined += 1
        return dist.HashStore(), [note]  # type: ignore[attr-defined]
    host, port = _address()
    waiting = _Waiting(rank, size, f"{host}:{port}")
    serves = rank == 0 and serves_the_store() and not _served
    if serves:
        serve(host, port)
    try:
        words = _register(_reach(host, port, waiting), note, waiting)
        notes = _gather_notes(words, waiting)
        _refuse_another(notes[rank], note, waiting)  # who overwrote ours
    except Exception as error:
        if serves:
            _served.clear()  # so that the next call may open one elsewhere
        if isinstance(error, dist.DistNetworkError):
            raise RuntimeError(
                f"expected the job's store at {waiting.where} to stay, its connection is lost: the process that served "
                "it has ended, which is rank 0's or torchrun"
            ) from None
        raise
    _joined += 1
    return dist.PrefixStore("torch", words), notes  # type: ignore[attr-defined]


def have_joined() -> bool:
    """Return whether this process has met the others of its job, or was alone in it."""
    return _joined > 0


def serves_the_store() -> bool:
    """Return whether the job's store is a rank's, the first one's, and not a launcher's."""
    return bool(_served) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect(timeout: timedelta = timedelta(seconds=2)) -> Store:
    """Return a connection of its own to our part of the job's store, for a thread of its own.

    Raises:
        RuntimeError: no store answers.
    """
    host, port = _address()
    obstacle = job_store.obstacle(host, port, timeout.total_seconds())
    if obstacle is not None:
        raise RuntimeError(f"expected the job's store at {host}:{port}: {obstacle}")
    return _ours(job_store.connect(host, port, timeout))


def job_id() -> str:
    """Return what tells this job from others: SYNCNORM_JOB_ID, else the id that torchrun or Slurm gave, else "unnamed".

    Under mpirun rank 0 has chosen SYNCNORM_JOB_ID at random.
    """
    told = os.environ
    if name := told.get("SYNCNORM_JOB_ID") or told.get("TORCHELASTIC_RUN_ID"):
        return name
    step = f".{told['SLURM_STEP_ID']}" if detect_launcher().launcher == "srun" else ""
    return f"{told['SLURM_JOB_ID']}{step} of Slurm" if "SLURM_JOB_ID" in told else "unnamed"


def _ours(store: Store) -> Store:
    """Return the part of the store that is our job's, and this attempt's where torchrun starts ranks anew."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"syncnorm/{job_id()}/{attempt}", store)  # type: ignore[attr-defined]


def _of_attempt(number: int, store: Store) -> Store:
    """Return the part of the store for one meeting: keys of groups that were destroyed are left in others."""
    return dist.PrefixStore(f"meeting/{number}", _ours(store))  # type: ignore[attr-defined]


def _address() -> tuple[str, int]:
    """Return the host and the port at which the ranks meet."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not host.strip():
        raise ValueError(f"expected MASTER_ADDR to be the name or the address of rank 0's host, got {host!r}")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"expected MASTER_PORT to be a number from 1 to 65535, got {port!r}")
    return host, int(port)


class _Waiting:
    """How long a rank has waited for the others, and what it says of that on stderr.

    Args:
        rank: that waits.
        size: the number of ranks.
        where: the address at which they meet.
    """

    def __init__(self, rank: int, size: int, where: str):
        self.rank = rank
        self.size = size
        self.where = where
        self.limit = _join_timeout()
        now = time.monotonic()
        self.deadline = now + self.limit
        self.next_word = now + FIRST_NOTICE

    def left(self) -> float:
        """Return for how many seconds it may go on."""
        return self.deadline - time.monotonic()

    def silence(self) -> float:
        """Return in how many seconds it is time to say something."""
        return self.next_word - time.monotonic()

    def say(self, what: str) -> None:
        """Say for what this rank waits."""
        line = f"syncnorm: rank {self.rank} of {self.size} is waiting for {what}. It gives up in {self.left():.0f} s"
        print(line, file=sys.stderr, flush=True)
        self.next_word = time.monotonic() + FURTHER_NOTICES


def _join_timeout() -> float:
    """Return the seconds in which all ranks have to come."""
    told = os.environ.get("SYNCNORM_JOIN_TIMEOUT", str(JOIN_TIMEOUT))
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(told)) < math.inf:
            return seconds
    raise ValueError(f"expected SYNCNORM_JOIN_TIMEOUT to be a positive number of seconds, got {told!r}")


def serve(host: str, port: int) -> int:
    """Open the job's store and return its port."""
    try:
        store: Any = job_store.open_store(host, port, OPERATION)
    except job_store.PortInUseError:
        raise RuntimeError(
            f"expected port {port} of {host} to be free for the job's store, it is used by {_user_of(host, port)}: set "
            "MASTER_PORT to another port on all ranks"
        ) from None
    store.set(JOB, job_id())
    _served.append(store)
    opened: int = store.port
    return opened


def _user_of(host: str, port: int) -> str:
    """Return who has opened a port, as far as a store says so."""
    if job_store.obstacle(host, port, 1.0) is not None:
        return "another program"
    store = job_store.connect(host, port, timedelta(seconds=2))
    if not store.check([JOB]):
        return "another program"
    if (job := store.get(JOB).decode(errors="replace")) != job_id():
        return f"job {printable(job)}"
    try:
        note = _of_attempt(1, store).get("note of 0")
        return f"rank 0 of this job, {_process(_read(note, 0, f'{host}:{port}'))}"
    except dist.DistStoreError:
        return "another process of this job"


def _reach(host: str, port: int, waiting: _Waiting) -> Store:
    """Return a connection to the job's store, once it answers."""
    server = "rank 0" if serves_the_store() else "the launcher"
    foreign: float | None = None  # since when another program has answered
    while True:
        obstacle = job_store.obstacle(host, port, min(2.0, max(waiting.left(), 0.1)))
        if obstacle is None:
            store = job_store.connect(host, port, timedelta(seconds=FOREIGN))
            store.set_timeout(OPERATION)
            return store
        now = time.monotonic()
        foreign = None if obstacle != ANOTHER_PROGRAM else foreign or now
        if waiting.left() <= 0 or (foreign and now - foreign > FOREIGN):
            waited = f"within {waiting.limit:g} s" if waiting.left() <= 0 else "there"
            raise RuntimeError(
                f"expected {server} to open the job's store at {waiting.where} {waited}: {obstacle}. Check "
                f"MASTER_ADDR, MASTER_PORT, and whether {server} runs"
            )
        if waiting.silence() <= 0:
            waiting.say(f"{server} at {waiting.where}: {obstacle}")
        time.sleep(0.1)


def _register(store: Store, note: dict[str, Any], waiting: _Waiting) -> Store:
    """Leave this rank's note in the job's part of the store, which is returned."""
    rank, size, where = waiting.rank, waiting.size, waiting.where
    if serves_the_store():  # where a launcher does, several jobs may share it
        _compare_jobs(store, where)
    words = _of_attempt(_joined + 1, store)
    if (first := job_store.write_once(words, "size", str(size))) != str(size):
        raise RuntimeError(
            f"expected all ranks at {where} to have one WORLD_SIZE, got {size} on rank {rank} and {printable(first)} "
            "on the first that came: is the port another job's? Then set MASTER_PORT to another port on all ranks of "
            "this one"
        )
    _refuse_another(_read(job_store.write_once(words, f"note of {rank}", json.dumps(note)), rank, where), note, waiting)
    return words


def _refuse_another(found: dict[str, Any], note: dict[str, Any], waiting: _Waiting) -> None:
    """Raise if another process has left its note as this rank."""
    if (found["process"], found.get("token")) != (note["process"], note["token"]):
        raise RuntimeError(
            f"expected one process for each rank, rank {waiting.rank} of {waiting.size} has joined at {waiting.where} "
            f"already: {_process(found)}. This is {_process(note)}. Was a rank started twice, or is the port another "
            "job's? Then set MASTER_PORT to another port on all ranks of one of them"
        )


def _compare_jobs(store: Store, where: str) -> None:
    """Raise unless a rank of this job has opened the store."""
    try:
        store.wait([JOB], timedelta(seconds=FOREIGN))
        found = f"that of job {printable(store.get(JOB).decode(errors='replace'))}"
    except dist.DistStoreError:
        found = "that of another program"
    expected = f"job {printable(job_id())}"
    if found != f"that of {expected}":
        raise RuntimeError(
            f"expected the store of this {expected} at {where}, found {found}: set MASTER_PORT to another port on all "
            "ranks of one of them"
        )


def _gather_notes(words: Store, waiting: _Waiting) -> list[dict[str, Any]]:
    """Wait for the notes of all ranks and return them."""
    keys = [f"note of {rank}" for rank in range(waiting.size)]
    while True:
        limit = max(min(waiting.left(), waiting.silence(), 5.0), 0.01)  # so that Ctrl-C is answered
        try:
            words.wait(keys, timedelta(seconds=limit))
        except dist.DistStoreError:
            if waiting.left() > 0 and waiting.silence() > 0:
                continue
            missing = _numbers([rank for rank, key in enumerate(keys) if not words.check([key])])
            if waiting.left() <= 0:
                raise RuntimeError(
                    f"expected {waiting.size} ranks to join within {waiting.limit:g} s, missing: {missing}"
                ) from None
            waiting.say(f"rank{'s' * (',' in missing)} {missing} at {waiting.where}")
        else:
            return [_read(note, rank, waiting.where) for rank, note in enumerate(words.multi_get(keys))]


def _read(written: str | bytes, rank: int, where: str) -> dict[str, Any]:
    """Return a rank's note as it was before it went into the store."""
    with contextlib.suppress(ValueError):
        note = json.loads(written)
        if isinstance(note, dict) and isinstance(note.get("host"), str) and isinstance(note.get("process"), int):
            return note | {"host": printable(note["host"])}
    raise RuntimeError(
        f"expected the note of rank {rank} at {where} to be written by syncnorm, got {printable(str(written))[:200]}"
    )


def _process(note: dict[str, Any]) -> str:
    """Return the name of the process that wrote a note."""
    return f"process {note['process']} on {note['host']}"


def _numbers(ranks: Sequence[int]) -> str:
    """Return ranks as text: "1, 3", of many the first ones and how many more there are."""
    shown = ", ".join(map(str, ranks[:16]))
    return f"{shown} and {len(ranks) - 16} more" if len(ranks) > 16 else shown


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
