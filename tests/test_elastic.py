"""Jobs that torchrun starts again: the ranks join anew and go on from the checkpoint to the losses of one process."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launchers import ROOT, TORCHRUN, launch
from processes import run

import syncnorm
from syncnorm.testing import mpirun_environment

ELASTIC = Path(__file__).parent / "helpers" / "elastic_cnn.py"
STEPS = 12


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Return the losses of one process that was never killed."""
    record = tmp_path_factory.mktemp("alone") / "record"
    job = launch("alone", 1, ROOT / "examples" / "cnn.py", "--batch-per-rank", 8, "--steps", STEPS, "--out", record)
    assert job.returncode == 0, job.stderr
    return json.loads(record.read_text())["loss"]


def arguments(directory, killed_at):
    options = ["--steps", STEPS, "--checkpoint", directory / "checkpoint", "--checkpoint-every", 2, "--resume"]
    return [str(word) for word in (ELASTIC, 1, killed_at, *options, "--out", directory / "record")]


def environment():
    return os.environ | mpirun_environment() | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_job_that_starts_again_has_the_losses_of_one_that_was_never_killed(tmp_path, expected, killed_at):
    """The rank is killed before the first checkpoint, or after it."""
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    job = run(*torchrun, *arguments(tmp_path, killed_at), timeout=90, env=environment(), stderr=subprocess.PIPE)
    assert job.returncode == 0, job.stderr
    record = json.loads((tmp_path / "record").read_text())
    assert (record["ranks"], record["resumed_at_step"]) == (2, killed_at // 2 * 2)
    torch.testing.assert_close(record["loss"], expected, rtol=0, atol=1e-5)
    assert "exitcode: -9" in job.stderr


def test_ranks_that_come_back_in_another_number_go_on(tmp_path, expected):
    """Of two agents one is killed, with its rank. The other one starts its rank again, alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "elastic"]
    rendezvous += ["--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2"]
    command = [*TORCHRUN, "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", *rendezvous]
    command += arguments(tmp_path, 5)
    waiting = tmp_path / "waiting"
    agents = []
    try:
        for name in ("first", "second"):
            with (tmp_path / name).open("w") as log:
                options = {"stdout": log, "stderr": log, "start_new_session": True}
                agents.append(subprocess.Popen(command, env=environment() | {"WAITING": str(waiting)}, **options))
            time.sleep(1)  # the first one serves the store of the rendezvous
        deadline = time.monotonic() + 60
        while not (waiting.exists() and waiting.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        agent, worker = map(int, waiting.read_text().split())
        os.killpg(agents[agent].pid, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        assert agents[0].wait(60) == 0, (tmp_path / "first").read_text()
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
    record = json.loads((tmp_path / "record").read_text())
    torch.testing.assert_close(record["loss"], expected, rtol=0, atol=1e-5)
    assert record["ranks"] == 1
    assert record["resumed_at_step"] >= 2


class Changing(dist.ProcessGroup):
    """A group like those of torchft, whose members change while it is used."""

    __module__ = "torchft.process_group"

    def configure(self, store_addr, replica_id, rank, world_size):
        pass


def test_groups_whose_members_change_are_refused():
    with pytest.raises(TypeError, match="expected a process group with fixed members, got Changing of torchft"):
        syncnorm.communicator(Changing(0, 2))
    with pytest.raises(TypeError, match="expected a process group with fixed members"):
        syncnorm.SyncBatchNorm(3, process_group=Changing(0, 2))
