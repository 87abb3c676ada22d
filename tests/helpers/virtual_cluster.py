"""Jobs on several hosts of this machine: launch/virtual-cluster with a hard timeout, leaving nothing behind."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
from processes import started

CLUSTER = Path(__file__).parents[2] / "launch" / "virtual-cluster"


def need_namespaces():
    """Skip, loudly, where hosts cannot be made."""
    allowed = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, check=False)
    if allowed.returncode != 0:
        pytest.skip("VIRTUAL HOSTS NOT TESTED: network namespaces need root and its capabilities")


def namespaces():
    """Return the names of the network namespaces of all clusters there are."""
    names = os.listdir("/run/netns") if Path("/run/netns").exists() else []
    return {name for name in names if name.startswith("syncnorm-")}


def processes_in(namespace):
    """Return the ids of the processes in a network namespace."""
    found = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False, timeout=10)
    return found.stdout.split()


@contextlib.contextmanager
def cluster(hosts, ranks, launcher, *command):
    """Start a command on a cluster; after the block, end it and check that nothing is left of it."""
    program = ["python"] if launcher == "mpirun" else []
    with started(CLUSTER, hosts, ranks, launcher, *program, *command) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # upon which it takes the hosts away
                process.wait(20)
    assert not [name for name in namespaces() if name.startswith(f"syncnorm-{process.pid}-")]


def on_hosts(hosts, ranks, launcher, *command, timeout=90):
    """Run the command to its end and return what it printed."""
    with cluster(hosts, ranks, launcher, *command) as process:
        output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output
