"""Jobs of Slurm, on two nodes that slurm.py makes: launch/slurm-torchrun.sbatch, launch/slurm-mpi.sbatch and srun."""

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import slurm
import torch

ROOT = Path(__file__).parent.parent
TORCHRUN = ROOT / "launch" / "slurm-torchrun.sbatch"
MPI = ROOT / "launch" / "slurm-mpi.sbatch"
CNN = ROOT / "examples" / "cnn.py"

pytestmark = pytest.mark.timeout(300)  # the first test may have to install Slurm
each_script = pytest.mark.parametrize("script", [TORCHRUN, MPI], ids=lambda script: script.stem)


@pytest.fixture(scope="module")
def cluster():
    try:
        slurm.install()
    except slurm.UnavailableError as error:
        pytest.skip(f"SLURM NOT TESTED: {error}")
    with slurm.cluster() as cluster:
        yield cluster


@each_script
def test_help_is_the_head_comment(script):
    for flag in "-h", "--help":
        output = subprocess.run([script, flag], check=True, capture_output=True, text=True).stdout
        assert f"sbatch [OPTION OF SBATCH...] launch/{script.name} SCRIPT [ARGUMENT...]" in output
        assert "#" not in output
        assert "usage()" not in output


@each_script
@pytest.mark.parametrize(
    ("arguments", "expected"), [([], "SCRIPT [ARGUMENT...]"), (["train.py"], "expected to run in a job of Slurm")]
)
def test_use_by_mistake_is_explained(script, arguments, expected):
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run([script, *arguments], capture_output=True, text=True, env=outside, check=False)
    assert done.returncode == 2
    assert expected in done.stderr


JOIN = """
    import socket, sys, torch, syncnorm
    group = syncnorm.init()
    layer = syncnorm.SyncBatchNorm(2, momentum=1.0)
    layer(torch.full((2, 2), float(group.rank)))
    node = syncnorm.new_subgroups("node")
    words = [group.rank, group.size, socket.gethostname(), node.rank, node.size, layer.running_mean[0].item()]
    sys.stdout.write("joined " + " ".join(map(str, words)) + "\\n")
"""
JOINED = [["0", "4", "node1", "0", "2", "1.5"], ["1", "4", "node1", "1", "2", "1.5"]]
JOINED += [["2", "4", "node2", "0", "2", "1.5"], ["3", "4", "node2", "1", "2", "1.5"]]


def joined(output):
    return sorted(line.split()[1:] for line in output.splitlines() if line.startswith("joined"))


def write(path, code):
    path.write_text(textwrap.dedent(code))
    return path.name


@each_script
def test_ranks_of_two_nodes_join(script, cluster, tmp_path):
    program = write(tmp_path / "join.py", JOIN)
    job = cluster.submit("--nodes", 2, "--ntasks-per-node", 2, script, program, cwd=tmp_path)
    assert job.state == "COMPLETED", job.output
    assert joined(job.output) == JOINED


@pytest.fixture(scope="module")
def losses_alone(tmp_path_factory):
    record = tmp_path_factory.mktemp("alone") / "record.json"
    subprocess.run(
        [sys.executable, str(CNN), "--batch-per-rank", "12", "--steps", "5", "--out", str(record)],
        check=True,
        timeout=60,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return torch.tensor(json.loads(record.read_text())["loss"])


@each_script
def test_the_cnn_trains_in_a_job_as_alone(script, cluster, tmp_path, losses_alone):
    options = ["--nodes", 2, "--ntasks-per-node", 2]
    arguments = ["--batch-per-rank", 3, "--steps", 5, "--out", "record.json"]
    job = cluster.submit(*options, script, CNN, *arguments, cwd=tmp_path)
    assert job.state == "COMPLETED", job.output
    losses = torch.tensor(json.loads((tmp_path / "record.json").read_text())["loss"])
    torch.testing.assert_close(losses, losses_alone, rtol=0, atol=1e-5)


FAIL = """
    import syncnorm
    group = syncnorm.init()
    if group.rank == group.size - 1:
        raise ArithmeticError("of one rank")
    group.barrier()
"""


@each_script
def test_a_failing_rank_fails_the_job(script, cluster, tmp_path):
    program = write(tmp_path / "fail.py", FAIL)
    job = cluster.submit("--nodes", 2, script, program, cwd=tmp_path)
    assert job.state == "FAILED", job.output
    assert "ArithmeticError: of one rank" in job.output


RANKS = """
    import os, sys
    names = ["RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMP_NUM_THREADS"]
    words = [os.environ[name] for name in names if name in os.environ]
    sys.stdout.write(" ".join(["rank", *words, os.environ.get("SLURM_GPUS_ON_NODE", "0")]) + "\\n")
"""
TWO_OF_TWO = ["--ntasks-per-node", 2, "--cpus-per-task", 2]


def ranks_in(output):
    return sorted(line for line in output.splitlines() if line.startswith("rank "))


@pytest.mark.parametrize(
    ("script", "options", "environment", "ranks", "threads", "gpus"),
    [
        (TORCHRUN, ["--nodes", 2], {}, 2, 1, 0),
        (TORCHRUN, ["--nodes", 1, *TWO_OF_TWO], {"OMP_NUM_THREADS": "3"}, 2, 3, 0),
        (TORCHRUN, ["--nodes", 2, "--cpus-per-task", 4], {"RANKS_PER_NODE": "2"}, 4, 2, 0),
        (TORCHRUN, ["--nodes", 2, "--cpus-per-task", 4, "--gpus-per-node", 2], {}, 4, 2, 2),
        (TORCHRUN, ["--nodes", 2, *TWO_OF_TWO, "--gpus-per-task", 1], {}, 4, 2, 2),
        (MPI, ["--nodes", 2], {}, 2, 1, 0),
        (MPI, ["--nodes", 1, *TWO_OF_TWO], {"OMP_NUM_THREADS": "3"}, 2, 3, 0),
        (MPI, ["--ntasks", 3, "--cpus-per-task", 2], {}, 3, 2, 0),
        (MPI, ["--nodes", 2, *TWO_OF_TWO, "--gpus-per-task", 1], {}, 4, 2, 2),
    ],
)
def test_ranks_and_threads_follow_the_request(
    script, options, environment, ranks, threads, gpus, cluster, tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = write(tmp_path / "ranks.py", RANKS)
    job = cluster.submit(*options, script, program, cwd=tmp_path, **environment)
    assert job.state == "COMPLETED", job.output
    assert ranks_in(job.output) == [f"rank {rank} {ranks} {threads} {gpus}" for rank in range(ranks)]


@each_script
def test_salloc_runs_the_script_as_a_command(script, cluster, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = write(tmp_path / "ranks.py", RANKS)
    done = cluster.run("salloc", "--nodes", 2, script, program, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stdout
    assert ranks_in(done.stdout) == ["rank 0 2 1 0", "rank 1 2 1 0"]


def test_torchrun_refuses_an_uneven_allocation(cluster, tmp_path):
    job = cluster.submit("--nodes", 2, "--ntasks", 3, TORCHRUN, "train.py", cwd=tmp_path)
    assert job.state == "FAILED"
    assert "expected equally many tasks on all nodes, got 2,1" in job.output


def test_nothing_of_slurm_is_left(cluster):
    """A second Slurm, stopped with a job on it, takes all of its processes along, and none of the first's."""
    del cluster  # which has installed Slurm
    with slurm.cluster() as other:
        mine = f"SLURM_CONF={other.directory}".encode()
        assert other.run("sbatch", "--nodes", 2, "--wrap", "srun sleep 60").returncode == 0
        deadline = time.monotonic() + 20
        while not (sleeping := [p for p in processes_with(mine) if b"sleep" in (p / "cmdline").read_bytes()]):
            assert time.monotonic() < deadline, other.logs()
    assert sleeping
    assert not processes_with(mine)
    assert not other.directory.exists()


def processes_with(words):
    """Return those in /proc in whose environment the words are."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if words in (process / "environ").read_bytes():
                found.append(process)
    return found


def test_srun_alone_is_a_launcher(cluster, tmp_path):
    """The ranks are the tasks of the step, on Gloo, and not those of a job that has more."""
    program = write(tmp_path / "join.py", JOIN + "    assert torch.distributed.get_backend() == 'gloo'\n")
    done = cluster.run("srun", "--nodes", 2, "--ntasks-per-node", 2, sys.executable, program, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stdout
    assert joined(done.stdout) == JOINED
