"""Jobs on several hosts: network namespaces with a host name and an address each, made by launch/virtual-cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from examples_of_docs import EXAMPLES
from virtual_cluster import CLUSTER, cluster, namespaces, need_namespaces, on_hosts, processes_in

CNN = Path(__file__).parent.parent / "examples" / "cnn.py"


@pytest.fixture(autouse=True)
def _needs_namespaces():
    need_namespaces()


JOIN = """
    import socket, sys, torch, syncnorm
    group = syncnorm.init({backend!r})
    layer = syncnorm.SyncBatchNorm(2, momentum=1.0)
    layer(torch.full((2, 2), float(group.rank)))
    node = syncnorm.new_subgroups("node")
    words = [group.rank, group.size, socket.gethostname(), node.rank, node.size, layer.running_mean[0].item()]
    sys.stdout.write("joined " + " ".join(map(str, words)) + "\\n")
"""


@pytest.mark.parametrize(
    ("launcher", "backend", "hosts"),
    [("torchrun", "auto", 2), ("torchrun", "auto", 3), ("mpirun", "auto", 3), ("mpirun", "gloo", 3)],
)
def test_ranks_of_several_hosts_join(launcher, backend, hosts, tmp_path):
    script = tmp_path / "join.py"
    script.write_text(textwrap.dedent(JOIN.format(backend=backend)))
    output = on_hosts(hosts, 2, launcher, script)
    joined = sorted(line.split()[1:] for line in output.splitlines() if line.startswith("joined"))
    size = 2 * hosts
    mean = (size - 1) / 2
    assert joined == [
        [str(rank), str(size), f"node{rank // 2 + 1}", str(rank % 2), "2", str(mean)] for rank in range(size)
    ]


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


@pytest.mark.parametrize(("launcher", "hosts"), [("torchrun", 3), ("mpirun", 2), ("mpirun", 3)])
def test_the_cnn_trains_on_several_hosts_as_alone(launcher, hosts, tmp_path, losses_alone):
    record = tmp_path / "record.json"
    on_hosts(hosts, 2, launcher, CNN, "--batch-per-rank", 12 // (2 * hosts), "--steps", 5, "--out", record)
    losses = torch.tensor(json.loads(record.read_text())["loss"])
    torch.testing.assert_close(losses, losses_alone, rtol=0, atol=1e-5)


def test_a_script_for_torchrun_runs_unchanged_under_mpirun(tmp_path):
    """The README's, with DistributedDataParallel."""
    script = tmp_path / "train.py"
    script.write_text(EXAMPLES["torchrun"])
    means = {}
    for launcher in ("torchrun", "mpirun"):
        output = on_hosts(2, 2, launcher, script)
        means[launcher] = re.findall(r"rank \d of 4: (tensor\(.*?\))", output, re.DOTALL)
        assert len(means[launcher]) == 4
        assert len(set(means[launcher])) == 1  # the same statistics everywhere


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_an_interrupted_cluster_leaves_nothing(launcher, tmp_path):
    before = namespaces()
    script = tmp_path / "wait.py"
    script.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    with cluster(2, 1, launcher, script) as process:
        assert any("waiting" in line for line in process.stdout)
        pids = [pid for name in namespaces() - before for pid in processes_in(name)]
        assert pids
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_arguments_reach_the_hosts_as_they_are(tmp_path):
    words = ["two\nlines", "it's", "", "$HOME"]
    script = tmp_path / "a script.py"
    script.write_text("import sys\nsys.stdout.write(f'got {sys.argv[1:]}\\n')\n")
    assert f"got {words}" in on_hosts(1, 1, "torchrun", script, *words).splitlines()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["two", "2", "torchrun"], "expected 1 to 254 hosts, got two"),
        (["255", "2", "torchrun"], "expected 1 to 254 hosts, got 255"),
        (["2", "0", "torchrun"], "expected a positive number of ranks, got 0"),
        (["2", "2", "srun"], "expected torchrun or mpirun, got srun"),
    ],
)
def test_use_by_mistake_is_explained(arguments, expected):
    wrong = subprocess.run([CLUSTER, *arguments, "train.py"], capture_output=True, text=True, check=False, timeout=10)
    assert (wrong.returncode, wrong.stderr) == (2, f"{expected}\n")


def test_usage():
    help_ = subprocess.run([str(CLUSTER), "--help"], capture_output=True, text=True, check=True, timeout=10)
    assert help_.stdout.startswith("Make HOSTS hosts on this machine")
    wrong = subprocess.run([str(CLUSTER), "2"], capture_output=True, text=True, check=False, timeout=10)
    assert wrong.returncode == 2
    assert "HOSTS RANKS torchrun SCRIPT" in wrong.stderr
