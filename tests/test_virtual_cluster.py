"""Jobs on several hosts: network namespaces with a host name and an address each, made by launch/virtual-cluster."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "launch" / "virtual-cluster"
CNN = ROOT / "examples" / "cnn.py"


@pytest.fixture(autouse=True)
def _needs_namespaces():
    allowed = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, check=False)
    if allowed.returncode != 0:
        pytest.skip("VIRTUAL HOSTS NOT TESTED: network namespaces need root and its capabilities")


def namespaces():
    names = os.listdir("/run/netns") if Path("/run/netns").exists() else []
    return {name for name in names if name.startswith("syncnorm-")}


def start(hosts, ranks, launcher, *command):
    program = ["python"] if launcher == "mpirun" else []
    return subprocess.Popen(
        [str(CLUSTER), str(hosts), str(ranks), launcher, *program, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def on_hosts(hosts, ranks, launcher, *command):
    """Run the command to its end and return what it printed; nothing of the cluster is left."""
    before = namespaces()
    process = start(hosts, ranks, launcher, *command)
    try:
        output, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
    assert process.returncode == 0, output
    assert namespaces() == before
    return output


JOIN = """
    import socket, sys, torch, syncnorm
    group = syncnorm.init({backend!r})
    layer = syncnorm.SyncBatchNorm(2, momentum=1.0)
    layer(torch.full((2, 2), float(group.rank)))
    node = syncnorm.new_subgroups("node")
    words = [group.rank, group.size, socket.gethostname(), node.rank, node.size, layer.running_mean[0].item()]
    sys.stdout.write("joined " + " ".join(map(str, words)) + "\\n")
"""


@pytest.mark.parametrize("hosts", [2, 3])
@pytest.mark.parametrize(("launcher", "backend"), [("torchrun", "auto"), ("mpirun", "auto"), ("mpirun", "gloo")])
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


@pytest.mark.parametrize("hosts", [2, 3])
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_the_cnn_trains_on_several_hosts_as_alone(launcher, hosts, tmp_path, losses_alone):
    record = tmp_path / "record.json"
    on_hosts(hosts, 2, launcher, CNN, "--batch-per-rank", 12 // (2 * hosts), "--steps", 5, "--out", record)
    losses = torch.tensor(json.loads(record.read_text())["loss"])
    torch.testing.assert_close(losses, losses_alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_an_interrupted_cluster_leaves_nothing(launcher, tmp_path):
    before = namespaces()
    script = tmp_path / "wait.py"
    script.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    process = start(2, 1, launcher, script)
    assert any("waiting" in line for line in process.stdout)
    pids = [pid for name in namespaces() - before for pid in pids_in(name)]
    assert pids
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert namespaces() == before
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def pids_in(namespace):
    return subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True, timeout=10
    ).stdout.split()


def test_usage():
    help_ = subprocess.run([str(CLUSTER), "--help"], capture_output=True, text=True, check=True, timeout=10)
    assert help_.stdout.startswith("Make HOSTS hosts on this machine")
    wrong = subprocess.run([str(CLUSTER), "2"], capture_output=True, text=True, check=False, timeout=10)
    assert wrong.returncode == 2
    assert "HOSTS RANKS torchrun SCRIPT" in wrong.stderr
