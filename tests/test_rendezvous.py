"""How ranks meet: real processes, each with an environment of its own, as ranks that are started by hand have."""

import http.server
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import syncnorm
from syncnorm.job import rendezvous
from syncnorm.job.rendezvous import address_of_this_host
from syncnorm.job.slurm import first_host, tasks_per_node
from syncnorm.job.store import free_port, obstacle, write_once
from syncnorm.testing.ranks import PRELOADED

HOST = socket.gethostname()
SPAWN = multiprocessing.get_context("forkserver")
LOCALHOST = "127.0.0.1"


def join(environment, connection, errors):
    """Join the job of the environment, tell how that ended, and stay until told to end."""
    sys.stderr.flush()
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo"} | environment)
    try:
        group = syncnorm.init("gloo", timeout=60)
        total = group.all_reduce(torch.ones(1)).item()
        outcome = f"{group.rank} of {group.size} sums {total:g}"
    except Exception as error:
        outcome = f"{type(error).__name__} {error}"
    connection.send(outcome)
    connection.poll(120)


class Rank:
    """A process that joins a job."""

    def __init__(self, errors, environment):
        self.errors = errors
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=join, args=(environment, theirs, errors), daemon=True)
        self.process.start()
        self.name = f"process {self.process.pid} on {HOST}"
        theirs.close()

    def outcome(self, timeout=60):
        """Return how joining ended."""
        assert self.connection.poll(timeout), f"still joining after {timeout} s: {self.stderr()}"
        return self.connection.recv()

    def is_joining(self):
        return not self.connection.poll(0)

    def stderr(self):
        """Return what it has printed there, without torch's own warnings."""
        return [line for line in self.errors.read_text().splitlines() if line.startswith("syncnorm")]


@pytest.fixture
def start(tmp_path):
    """Return what starts a process that joins by the variables of an environment."""
    SPAWN.set_forkserver_preload(PRELOADED)
    ranks = []

    def start(**environment):
        ranks.append(Rank(tmp_path / f"stderr{len(ranks)}", environment))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.process.kill()
        rank.process.join()


def by_hand(rank, size, port, host=LOCALHOST):
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": host, "MASTER_PORT": str(port)}


def wait_for_store(port):
    """Wait until rank 0 has opened a store at a port."""
    deadline = time.monotonic() + 60
    while obstacle(LOCALHOST, port, 1) is not None:
        assert time.monotonic() < deadline


def wait_for(port, rank, job="unnamed"):
    """Wait until a rank of a job has left its note at a port."""
    store = dist.TCPStore(LOCALHOST, port, wait_for_workers=False, timeout=timedelta(seconds=60))
    dist.PrefixStore(f"syncnorm/{job}/0/join/1", store).wait([f"info of {rank}"])


def test_each_rank_is_counted_once(start):
    port = free_port()
    zero = start(**by_hand(0, 3, port))
    wait_for_store(port)
    one = start(**by_hand(1, 3, port))
    for rank in range(2):
        wait_for(port, rank)
    assert re.fullmatch(
        f"RuntimeError expected one process for each rank, but rank 1 of 3 has already joined at {LOCALHOST}:{port}: "
        rf"{one.name}\. This is process \d+ on {HOST}\. Check that no rank was started twice\. .*",
        start(**by_hand(1, 3, port)).outcome(),
    )
    assert start(**by_hand(0, 3, port)).outcome() == (
        f"RuntimeError expected port {port} of {LOCALHOST} to be free for the job's store, but it is used by rank "
        f"0 of this job, {zero.name}: set MASTER_PORT to another port on all ranks"
    )
    text = f"RuntimeError expected the same WORLD_SIZE on all ranks at {LOCALHOST}:{port}, got 4 on rank 2 and 3 on the"
    assert start(**by_hand(2, 4, port)).outcome().startswith(text)
    assert zero.is_joining()
    two = start(**by_hand(2, 3, port))  # the job goes on as if nobody had come
    assert [rank.outcome() for rank in (zero, one, two)] == [f"{rank} of 3 sums 3" for rank in range(3)]


def test_two_jobs_at_one_port_are_told_apart(start):
    port = free_port()
    first, second = {"SYNCNORM_JOB_ID": "first"}, {"SYNCNORM_JOB_ID": "second\x1b[2J"}
    zero = start(**by_hand(0, 2, port), **first)
    refused = start(**by_hand(1, 2, port), **second)
    assert refused.outcome() == (
        f"RuntimeError expected the store of this job second\\x1b[2J at {LOCALHOST}:{port}, got that of job first: "
        "set MASTER_PORT to another port on all ranks of one of them"
    )
    refused = start(**by_hand(0, 2, port), **second)
    assert "it is used by job first: set MASTER_PORT to another port on all ranks" in refused.outcome()
    assert zero.is_joining()
    one = start(**by_hand(1, 2, port), **first)
    assert [rank.outcome() for rank in (zero, one)] == ["0 of 2 sums 2", "1 of 2 sums 2"]


def test_two_jobs_of_slurm_whose_numbers_give_one_port_are_told_apart(start):
    def task(job, rank):
        step = {"STEP_ID": 0, "STEP_NODELIST": "node1", "STEP_TASKS_PER_NODE": 2, "STEP_NUM_TASKS": 2, "NODEID": 0}
        told = step | {"JOB_ID": job, "PROCID": rank, "LOCALID": rank}
        return start(**{f"SLURM_{name}": str(value) for name, value in told.items()})

    job = os.getpid() % 12000
    zero = task(job, 0)
    refused = task(job + 12000, 1).outcome()
    assert f"expected the store of this job {job + 12000}.0 of Slurm at" in refused
    assert f"got that of job {job}.0 of Slurm: set MASTER_PORT" in refused
    assert f"it is used by job {job}.0 of Slurm: set MASTER_PORT" in task(job + 12000, 0).outcome()
    assert [rank.outcome() for rank in (zero, task(job, 1))] == ["0 of 2 sums 2", "1 of 2 sums 2"]


def test_jobs_of_torchrun_may_share_a_store(start):
    """As they do that have one --rdzv-endpoint and ids of their own."""
    store = dist.TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
    jobs = [{"TORCHELASTIC_RUN_ID": job, "TORCHELASTIC_USE_AGENT_STORE": "True"} for job in "ab"]
    ranks = [start(**by_hand(rank, 2, store.port), **job) for job in jobs for rank in range(2)]
    assert [rank.outcome() for rank in ranks] == ["0 of 2 sums 2", "1 of 2 sums 2"] * 2


def test_who_is_waited_for_is_said_in_time_and_the_wait_ends(start):
    silent = socket.create_server((LOCALHOST, 0))
    web = http.server.ThreadingHTTPServer((LOCALHOST, 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    in_ten_seconds, in_an_hour = {"SYNCNORM_JOIN_TIMEOUT": "10"}, {"SYNCNORM_JOIN_TIMEOUT": "3600"}
    ports = [free_port(), free_port(), silent.getsockname()[1], web.server_port]
    waiting = [
        start(**by_hand(0, 20, ports[0]), **in_ten_seconds),
        start(**by_hand(1, 2, ports[1]), **in_ten_seconds),
        start(**by_hand(1, 2, ports[1], host="no-such-host.invalid"), **in_ten_seconds),
        start(**by_hand(1, 2, ports[2]), **in_an_hour),
        start(**by_hand(1, 2, ports[3]), **in_an_hour),
    ]
    many = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 and 3 more"
    unknown = "the name 'no-such-host.invalid' is unknown"
    assert [rank.outcome() for rank in waiting] == [
        f"RuntimeError expected 20 ranks to join within 10 s, missing: {many}. Check that they were started, or set "
        "SYNCNORM_JOIN_TIMEOUT to wait longer",
        *(
            f"RuntimeError expected rank 0 to open the job's store at {where}, got: {reason}. Check MASTER_ADDR, "
            "MASTER_PORT, and that rank 0 is running"
            for where, reason in (
                (f"{LOCALHOST}:{ports[1]} within 10 s", "connection refused"),
                (f"no-such-host.invalid:{ports[1]} within 10 s", unknown),
                (f"{LOCALHOST}:{ports[2]}", "another program uses the port"),
                (f"{LOCALHOST}:{ports[3]}", "another program uses the port"),
            )
        ),
    ]
    told = [
        f"rank 0 of 20 is waiting for ranks {many} at {LOCALHOST}:{ports[0]}",
        f"rank 1 of 2 is waiting for rank 0 at {LOCALHOST}:{ports[1]}: connection refused",
        f"rank 1 of 2 is waiting for rank 0 at no-such-host.invalid:{ports[1]}: {unknown}",
        *(
            f"rank 1 of 2 is waiting for rank 0 at {LOCALHOST}:{port}: another program uses the port"
            for port in ports[2:]
        ),
    ]
    for rank, line in zip(waiting, told, strict=True):
        assert len(rank.stderr()) == 1, rank.stderr()
        assert re.fullmatch(rf"syncnorm: {re.escape(line)}\. It times out in \d+ s", rank.stderr()[0])
        assert "frame #" not in rank.errors.read_text()  # of C++
    silent.close()
    web.shutdown()
    web.server_close()


def test_a_note_that_was_overwritten_is_refused(start):
    port = free_port()
    zero = start(**by_hand(0, 2, port))
    wait_for_store(port)
    wait_for(port, 0)
    store = dist.TCPStore(LOCALHOST, port, wait_for_workers=False)
    note = json.dumps({"host": "else\x1b[2Jwhere", "process": 1, "gpu": None, "token": ""})
    dist.PrefixStore("syncnorm/unnamed/0/join/1", store).set("info of 0", note)
    start(**by_hand(1, 2, port))
    assert f"rank 0 of 2 has already joined at {LOCALHOST}:{port}: " in (outcome := zero.outcome())
    assert rf"{port}: process 1 on else\x1b[2Jwhere. This is {zero.name}." in outcome


def test_a_port_of_another_program_is_told_to_rank_0(start):
    with socket.create_server((LOCALHOST, 0)) as taken:
        port = taken.getsockname()[1]
        assert start(**by_hand(0, 2, port)).outcome() == (
            f"RuntimeError expected port {port} of {LOCALHOST} to be free for the job's store, but it is used by "
            "another program: set MASTER_PORT to another port on all ranks"
        )


def test_the_end_of_rank_0_is_told_to_those_that_wait_for_others(start):
    port = free_port()
    ranks = [start(**by_hand(rank, 3, port)) for rank in range(2)]
    wait_for_store(port)
    wait_for(port, 1)
    ranks[0].process.kill()
    assert ranks[1].outcome() == (
        f"RuntimeError expected the job's store at {LOCALHOST}:{port} to stay open, but its connection was lost: check "
        "why the process that served it (rank 0 or torchrun) has ended"
    )


@pytest.mark.parametrize("note", ["", "null", "[]", '{"host": 1, "process": 1}', '{"host": "node1"}', "\x1b[31mred"])
def test_a_note_that_is_none_is_refused(note):
    with pytest.raises(
        RuntimeError, match=r"expected the info of rank 3 at node1:7 to be written by syncnorm, got"
    ) as e:
        rendezvous._read(note, 3, "node1:7")
    assert str(e.value).isprintable()


def test_a_rank_that_failed_to_join_leaves_the_port(monkeypatch):
    port = free_port()
    for name, value in by_hand(0, 2, port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SYNCNORM_JOIN_TIMEOUT", "0.2")
    for _ in range(2):  # as in a notebook
        with pytest.raises(RuntimeError, match=r"expected 2 ranks to join within 0.2 s, missing: 1\. Check"):
            rendezvous.join(0, 2, {})
        assert not rendezvous._served


def test_notes_are_written_once():
    store = dist.TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
    assert write_once(store, "note", "first") == "first"
    assert write_once(store, "note", "second") == "first"
    assert store.get("note") == b"first"


@pytest.mark.parametrize("port", ["abc", "99999", "-1", "", "0", "29500.0", "65536"])
def test_what_is_no_port_is_refused(monkeypatch, port):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ValueError, match=f"expected MASTER_PORT to be a number from 1 to 65535, got '{port}'"):
        rendezvous.join(1, 2, {})


def test_no_address_is_refused(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", " ")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(
        ValueError, match="expected MASTER_ADDR to be the name or the address of rank 0's host, got ' '"
    ):
        rendezvous.join(1, 2, {})


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", ""])
def test_what_is_no_time_to_join_is_refused(monkeypatch, seconds):
    for name, value in by_hand(1, 2, 29500).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SYNCNORM_JOIN_TIMEOUT", seconds)
    text = f"expected SYNCNORM_JOIN_TIMEOUT to be a positive number of seconds, got '{seconds}'"
    with pytest.raises(ValueError, match=text):
        rendezvous.join(1, 2, {})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[03-05,9],gpu1", "node03"),
        ("gpu[7]", "gpu7"),
        ("gpu7,node[1-2]", "gpu7"),
        ("rack[2-3]n[10,12]-ib,rack9", "rack2n10-ib"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("counts", "tasks"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,12(x2)", [1, 12, 12])])
def test_tasks_per_node(counts, tasks):
    assert tasks_per_node(counts) == tasks


def test_a_given_address_is_taken(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.1.2.3")
    assert address_of_this_host() == "10.1.2.3"
