"""launch/torchrun and launch/mpirun, on this machine and over a real ssh. On several hosts: test_virtual_cluster.py."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
from slurm import no_services

from syncnorm.testing import mpirun_environment

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = ["torchrun", "mpirun"]
JOIN = """
    import os, sys, syncnorm
    group = syncnorm.init()
    group.barrier()
    sys.stdout.write(f"joined {group.rank} {group.size} {sys.argv[1:]} {os.getpid()}\\n")
    sys.stdout.flush()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "a script.py"
    path.write_text(textwrap.dedent(JOIN))
    return path


@contextlib.contextmanager
def started(launcher, *arguments, **environment):
    """Start a job by the script of that name; end it, with all of its processes, after the block."""
    process = subprocess.Popen(
        [LAUNCH / launcher, *map(str, arguments)],
        env=mpirun_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(launcher, *arguments, **environment):
    with started(launcher, *arguments, **environment) as process:
        output, _ = process.communicate(timeout=60)
    return process.returncode, output


def joined(output):
    return sorted(line.rsplit(" ", 1)[0] for line in output.splitlines() if line.startswith("joined"))


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_help(launcher):
    status, output = run(launcher, "--help")
    assert status == 0
    assert output.startswith("Run a ")
    assert f"./launch/{launcher} --hostfile hosts examples/cnn.py" in output
    assert "#" not in output


@pytest.mark.parametrize("launcher", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "[--ranks N] [--hostfile FILE]"),
        (["--ranks"], "[--ranks N] [--hostfile FILE]"),
        (["--rank", 2, "train.py"], "unknown option --rank"),
        (["--ranks", "two", "train.py"], "expected --ranks to be a positive number, got two"),
        (["--ranks", 0, "train.py"], "expected --ranks to be a positive number, got 0"),
        (["--hostfile", "/nowhere", "train.py"], "expected --hostfile to be a file that can be read, got /nowhere"),
    ],
)
def test_use_by_mistake_is_explained(launcher, arguments, expected):
    status, output = run(launcher, *arguments)
    assert status != 0
    assert expected in output


@pytest.mark.parametrize("launcher", SCRIPTS)
def test_ranks_of_this_machine_join(launcher, script):
    status, output = run(launcher, "--ranks", 3, script, "an argument", "--of=it")
    assert status == 0, output
    assert joined(output) == [f"joined {rank} 3 ['an argument', '--of=it']" for rank in range(3)]


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    """Return how to call ssh so that it reaches this machine: a real server, for this module's time."""
    if shutil.which("sshd", path="/usr/sbin") is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip("SSH NOT TESTED: there is no sshd, and nobody who may install it")
        with no_services():
            for words in (["update"], ["install", "--yes", "--no-install-recommends", "openssh-server"]):
                subprocess.run(["apt-get", "-qq", *words], check=True, timeout=100, capture_output=True)
    directory = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True, timeout=10)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": directory / "host",
        "AuthorizedKeysFile": directory / "user.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": directory / "pid",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-E", directory / "log", "-f", "/dev/null", *words])
    quiet = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o BatchMode=yes"
    command = f"ssh -p {port} -i {directory}/user {quiet}"
    try:
        deadline = time.monotonic() + 10
        while subprocess.run([*command.split(), "127.0.0.1", "true"], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, (directory / "log").read_text()
            time.sleep(0.1)
        yield command
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two names of this machine\n127.0.0.1 slots=2\nlocalhost slots=1\n\n")
    return path


def test_torchrun_over_ssh(ssh, hostfile, script):
    status, output = run("torchrun", "--hostfile", hostfile, script, "an 'argument'", "$HOME", LAUNCH_AGENT=ssh)
    assert status == 0, output
    expected = ["an 'argument'", "$HOME"]
    assert joined(output) == [f"joined {rank} 3 {expected}" for rank in range(3)]


def test_a_failure_over_ssh_ends_the_job(ssh, hostfile, script):
    script.write_text(script.read_text() + "raise SystemExit(group.rank == 2)\n")
    status, output = run("torchrun", "--hostfile", hostfile, script, LAUNCH_AGENT=ssh)
    assert status != 0
    assert "exitcode  : 1" in output


def test_ranks_over_ssh_end_with_the_launcher(ssh, hostfile, script):
    """Even if that is killed, and can end nothing itself."""
    script.write_text(script.read_text() + "import time; time.sleep(60)\n")
    with started("torchrun", "--hostfile", hostfile, script, LAUNCH_AGENT=ssh) as process:
        ranks = []
        for line in process.stdout:
            ranks += [line.split()[-1]] * line.startswith("joined")
            if len(ranks) == 3:
                break
        assert len(ranks) == 3
        process.kill()
        deadline = time.monotonic() + 20
        while alive := [rank for rank in ranks if Path(f"/proc/{rank}").exists()]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.1)
