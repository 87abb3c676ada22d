"""Ranks and hosts that fail in the middle of a training on two hosts: nobody waits for ever, all say for whom."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from virtual_cluster import cluster, namespaces, need_namespaces, processes_in

FAULTY = Path(__file__).parent / "helpers" / "faulty_cnn.py"
CNN = Path(__file__).parent.parent / "examples" / "cnn.py"
TIMEOUT = 10  # seconds that a rank waits for another, also when a busy machine starts them one after the other
LOST = "PRTE has lost communication with a remote daemon"  # after which Open MPI 5.0's mpirun returns 0
LIMIT = 60  # for a job, starting and the slowest torchrun included


@pytest.fixture(autouse=True)
def _needs_namespaces():
    need_namespaces()


@pytest.fixture
def fail(tmp_path):
    """Return what trains the CNN with a fault of one rank on two hosts x 2 ranks: the output, and each rank's error."""

    def run(launcher, fault, rank, while_it_runs=lambda _: None):
        errors = tmp_path / "errors"
        errors.mkdir()
        options = ["--batch-per-rank", 3, "--steps", 100, "--timeout", TIMEOUT]
        options += ["--checkpoint", tmp_path / "checkpoint", "--checkpoint-every", 2, "--out", tmp_path / "never"]
        with cluster(2, 2, launcher, FAULTY, fault, rank, errors, *options) as process:
            while_it_runs(process)
            output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode != 0 or LOST in output, output
        assert not (tmp_path / "never").exists()
        return output, {int(path.name.removeprefix("rank")): path.read_text() for path in errors.iterdir()}

    return run


def train_alone(record, *options):
    """Train the CNN in this machine's one process with the same global batch and return its record."""
    command = [sys.executable, CNN, "--batch-per-rank", 12, "--out", record, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, timeout=60, capture_output=True, env=environment)
    return json.loads(record.read_text())


@pytest.fixture(scope="module")
def losses_alone(tmp_path_factory):
    return train_alone(tmp_path_factory.mktemp("alone") / "record", "--steps", 60)["loss"]


@pytest.fixture
def assert_resumes(tmp_path, losses_alone):
    """Return what goes on from the checkpoint of the failed training, to the losses of one that never failed."""

    def resume():
        checkpoint = tmp_path / "checkpoint"
        done = len(torch.load(checkpoint, weights_only=True)["loss"])
        assert done >= 4
        options = ["--checkpoint", checkpoint, "--resume", "--steps", done + 3]
        resumed = train_alone(tmp_path / "record", *options)
        assert resumed["resumed_at_step"] == done
        torch.testing.assert_close(resumed["loss"], losses_alone[: done + 3], rtol=0, atol=1e-5)

    return resume


LAUNCHERS = ["torchrun", "mpirun"]


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_killed_rank_under_torchrun(fail, assert_resumes, when):
    output, errors = fail("torchrun", f"killed in {when}", 3)
    assert re.search(r"rank +: 3 \(local_rank: 1\)\s+exitcode +: -9", output)  # torchrun's own report
    assert {0, 1} <= errors.keys() <= {0, 1, 2}  # torchrun may end rank 2 first, on the same host
    reason = {0: r".*\[10.77.0.\d\]", 1: "rank 0 did not get the sums of the other hosts"}  # rank 0 speaks for node1
    for rank in (0, 1):
        assert re.match(rf"DesyncError: all_reduce on rank {rank} of 4: {reason[rank]}", errors[rank])
        assert re.search(r"MISSING: no answer", errors[rank])
        assert re.search(r"ranks? (2, )?3 on node2: MISSING: no answer", errors[rank])
    assert_resumes()


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_killed_rank_under_mpirun(fail, assert_resumes, when):
    """It ends all other ranks itself, and tells what it saw first: the signal, or the connection that broke."""
    output, _ = fail("mpirun", f"killed in {when}", 3)
    signal, peer = r"process rank 3 with PID \d+ on node node2 exited on\s+signal 9", "Peer host: +node2"
    assert re.search(f"{signal}|{peer}|An error occurred in Socket closed", output)
    assert_resumes()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_raises(fail, assert_resumes, launcher):
    output, errors = fail(launcher, "raises", 3)
    assert errors[3] == "ValueError: this rank has had enough"
    assert "rank 3 of 4 on node2 ended with ValueError" in output
    if launcher == "torchrun":
        for rank in (0, 1):
            assert "rank 3 on node2: ended with ValueError: this rank has had enough" in errors[rank]
    assert_resumes()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_stalls(fail, assert_resumes, launcher):
    _, errors = fail(launcher, "stalls", 3)
    assert errors.keys() == {0, 1, 2}
    for rank, error in errors.items():
        assert re.match(rf"DesyncError: (MPI_Allreduce|all_reduce) on rank {rank} of 4", error)
        layer = r"call \d+ of .+ \(SyncBatchNorm no\. \d+\), forward"
        assert re.search(rf"ranks 0, 1, 2 on node1, node2: in all_reduce of \d+ float64 of {layer}, at ", error)
        assert re.search(
            r"rank 3 on node2: in no collective, at .*faulty_cnn.py:\d+ in before_forward: time.sleep", error
        )
    assert_resumes()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_ranks_of_a_host_that_is_cut_off(fail, assert_resumes, launcher):
    _, errors = fail(launcher, "slow", -1, cut_off if launcher == "torchrun" else cut_off_and_end)
    for rank in (0, 1):
        assert re.match(rf"DesyncError: (MPI_Allreduce|all_reduce) on rank {rank} of 4", errors[rank])
        assert "ranks 2, 3 on node2: MISSING: no answer" in errors[rank]
    for rank in (2, 3):
        assert re.match(rf"DesyncError: (MPI_Allreduce|all_reduce) on rank {rank} of 4", errors[rank])
        missing = "ranks 0, 1 on node1" if launcher == "torchrun" else "rank 0 on node1"
        assert f"MISSING: {missing}: no answer from the job's store at " in errors[rank]
    assert_resumes()


def test_mpirun_ends_a_job_with_a_host_that_is_cut_off(fail, assert_resumes, monkeypatch):
    """And does so before the ranks' own timeout."""
    for name, seconds in [("time", "1"), ("intvl", "1"), ("probes", "1")]:
        monkeypatch.setenv(f"PRTE_MCA_oob_tcp_keepalive_{name}", seconds)
    output, errors = fail("mpirun", "slow", -1, cut_off)
    assert re.search(rf"{LOST}.*on node node2", output, re.DOTALL)
    assert not errors
    assert_resumes()


def cut_off(process):
    """Take the network from node2 when the training goes on, and wait until its ranks have ended."""
    before = []
    for line in process.stdout:
        if "training" in line:
            break
        before.append(line)
    else:
        pytest.fail("it ended before it trained: " + "".join(before))
    switch = next(
        name for name in namespaces() if name.startswith(f"syncnorm-{process.pid}-") and name.endswith("switch")
    )
    subprocess.run(["ip", "-n", switch, "link", "set", "port2", "down"], check=True, timeout=10)
    deadline = time.monotonic() + 30
    while ranks_in(switch.replace("switch", "2")):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def cut_off_and_end(process):
    """Do not wait for mpirun, which retries for minutes what it has to tell the lost host."""
    cut_off(process)
    process.terminate()


def ranks_in(namespace):
    """Return the ids of the ranks on a host."""
    commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in processes_in(namespace)}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
        return [pid for pid, path in commands.items() if str(FAULTY).encode() in path.read_bytes().split(b"\0")[1:3]]
    return ranks_in(namespace)
