"""A real Slurm on this machine: two nodes with a host name and an address each, up for as long as a `with` block.

Its processes have a process namespace of their own, whose first one reads from a pipe: when that ends, be it that this
process was killed, all of them do.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import processes

PROGRAMS = ["munged", "slurmctld", "slurmd", "srun", "sbatch", "salloc", "scancel", "scontrol", "sinfo"]
PACKAGES = ["munge", "slurm-wlm"]
NAMESPACES = ["unshare", "--pid", "--fork", "--mount", "--uts"]
NODES = ["node1", "node2"]
CPUS = 4  # of a node, whatever the machine has
UP = 30  # seconds in which the nodes have to come up
DONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}

HOSTS = """\
127.0.0.1 localhost controller
127.77.0.1 node1
127.77.0.2 node2
"""

CONFIGURATION = """\
ClusterName=syncnorm
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=node1 NodeAddr=127.77.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:2
NodeName=node2 NodeAddr=127.77.0.2 Port={ports[2]} CPUs={cpus} Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES
"""

# The first process of the namespaces is the controller's shell; each node has a host name of its own
START = """
cd "$1"
exec 3<&0 </dev/null
hostname controller
mount --bind hosts /etc/hosts
munged --foreground --force --socket=$1/munge --key-file=$1/munge.key --log-file=$1/munged.log \
    --pid-file=$1/munged.pid --seed-file=$1/munged.seed &
until [ -S munge ]; do kill -0 $!; sleep 0.05; done
slurmctld -D &
for node in node1 node2; do
    unshare --uts sh -c 'hostname "$0" && exec slurmd -D -N "$0"' $node &
done
read -r <&3
"""


class UnavailableError(Exception):
    """Slurm cannot be had here; the text says why."""


class Job(NamedTuple):
    """How a job ended, in Slurm's words, and what it printed."""

    state: str
    output: str


class Cluster:
    """A running Slurm; made by `cluster`."""

    def __init__(self, directory):
        self.directory = directory
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf")}

    def run(self, *command, cwd=None, timeout=30, **environment):
        """Run a command of Slurm's and return the finished process. One that outlasts the timeout is killed."""
        env = os.environ | self.environment | environment
        return processes.run(*command, timeout=timeout, cwd=cwd, env=env, stdin=subprocess.DEVNULL)

    def submit(self, *command, cwd, timeout=90, **environment):
        """Run a batch job to its end, or cancel it after the timeout. What it prints goes where sbatch puts it."""
        submitted = self.run("sbatch", "--parsable", *command, cwd=cwd, **environment)
        assert submitted.returncode == 0, submitted.stdout
        number = submitted.stdout.split()[-1]
        try:
            state = self._wait(number, timeout)
        finally:
            self.run("scancel", number)
            self._wait(number, 10)
        output = Path(cwd) / f"slurm-{number}.out"
        return Job(state, output.read_text() if output.exists() else self.logs())  # it never started

    def _wait(self, number, seconds):
        """Return the state of a job once it has ended, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            words = self.run("scontrol", "--oneliner", "show", "job", number).stdout.split()
            state = next(word.partition("=")[2] for word in words if word.startswith("JobState="))
            if state in DONE or time.monotonic() > deadline:
                return state
            time.sleep(0.1)

    def is_up(self):
        nodes = self.run("sinfo", "--noheader", "--Node", "--format", "%T").stdout.split()
        return nodes == ["idle"] * len(NODES)

    def logs(self):
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.directory.glob("*.log")))


def install():
    """Install Slurm unless it is there. Raises UnavailableError where that, or running it, cannot be."""
    if os.geteuid() != 0:
        raise UnavailableError(f"Slurm with two nodes needs root, this is user {os.geteuid()}")
    allowed = subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False)
    if allowed.returncode != 0:
        raise UnavailableError("two nodes on one machine need namespaces, which are not permitted here")
    try:
        socket.getaddrinfo(None, "0", socket.AF_INET, flags=socket.AI_ADDRCONFIG | socket.AI_PASSIVE)
    except socket.gaierror:  # what Slurm asks when it starts
        raise UnavailableError("Slurm needs an address that is not loopback, this machine has none") from None
    if all(map(shutil.which, PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        raise UnavailableError(f"neither Slurm nor apt-get is installed; expected {', '.join(PROGRAMS)}")
    with no_services():
        for command in ["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]:
            done = subprocess.run(
                ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60", *command],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise UnavailableError(f"apt-get {' '.join(command)} failed: {done.stdout[-500:]}")


@contextlib.contextmanager
def no_services():
    """Keep packages that are installed from starting their services, by the file that Debian has for it."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():  # someone's own
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


@contextlib.contextmanager
def cluster():
    """A Slurm with two idle nodes; nothing of it is left at the end."""
    with tempfile.TemporaryDirectory(prefix="syncnorm-slurm-") as name:
        directory = Path(name)
        configure(directory)
        with (directory / "daemons.log").open("w") as log:
            process = subprocess.Popen(
                [*NAMESPACES, "--mount-proc", "--kill-child", "bash", "-euc", START, "bash", name],
                env=os.environ | {"SLURM_CONF": f"{name}/slurm.conf"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        try:
            slurm = Cluster(directory)
            deadline = time.monotonic() + UP
            while not slurm.is_up():
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"Slurm did not come up:\n{slurm.logs()}")
                time.sleep(0.1)
            yield slurm
        finally:
            process.stdin.close()  # ends the first process of the namespace, and so all of them
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def configure(directory):
    """Write what the daemons read; nothing of it is outside of this directory."""
    directory.chmod(0o755)
    (directory / "state").mkdir()
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (directory / "hosts").write_text(HOSTS)
    for gpu in "gpu0", "gpu1":
        (directory / gpu).touch()  # to Slurm a device is a file; no program of ours opens it
    (directory / "gres.conf").write_text(f"Name=gpu File={directory}/gpu[0-1]\n")
    (directory / "slurm.conf").write_text(CONFIGURATION.format(directory=directory, ports=free_ports(3), cpus=CPUS))


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
