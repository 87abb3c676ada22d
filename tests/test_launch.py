"""launch/torchrun and launch/mpirun, on this machine and over a real ssh. On several hosts: test_virtual_cluster.py."""

import os
import shutil
import socket
import subprocess
import textwrap
import time
from pathlib import Path

import processes
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


def started(launcher, *arguments, **environment):
    """Start a job by the script of that name; end it, with all of its processes, after the block."""
    return processes.started(LAUNCH / launcher, *arguments, env=mpirun_environment() | environment)


def run(launcher, *arguments, **environment):
    env = mpirun_environment() | environment
    job = processes.run(LAUNCH / launcher, *arguments, timeout=60, env=env)
    return job.returncode, job.stdout


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
        (["--ranks"], "expected a value after --ranks, got none"),
        (["--hostfile"], "expected a value after --hostfile, got none"),
        (["--rank", 2, "train.py"], "unknown option --rank"),
        (["--ranks", "two", "train.py"], "expected --ranks to be a positive number, got two"),
        (["--ranks", 0, "train.py"], "expected --ranks to be a positive number, got 0"),
        (["--ranks", "00", "train.py"], "expected --ranks to be a positive number, got 00"),
        (["--ranks", "", "train.py"], "expected --ranks to be a positive number, got \n"),
        (["--hostfile", "/nowhere", "train.py"], "expected --hostfile to be a file that can be read, got /nowhere"),
        (["--hostfile", "/tmp", "train.py"], "expected --hostfile to be a file that can be read, got /tmp"),
        (["--hostfile", "", "train.py"], "expected --hostfile to be a file that can be read, got \n"),
    ],
)
def test_use_by_mistake_is_explained(launcher, arguments, expected):
    status, output = run(launcher, *arguments)
    assert status == 2
    assert expected in output


LINES = "expected lines like 'node1 slots=2', got line 1 of"
NAME = "expected a host's name or address, got"


@pytest.mark.parametrize("launcher", SCRIPTS)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a host in a line of its own, got none in hosts"),
        (b"# node1\r\n\t\n  \n\n# node2", "expected a host in a line of its own, got none in hosts"),
        (b"-oProxyCommand=touch${IFS}owned slots=2\n", f"{NAME} '-oProxyCommand=touch"),
        (b"-l slots=2\n", f"{NAME} '-l' in line 1 of hosts"),
        (b"user@-oProxyCommand slots=2", f"{NAME} 'user@-oProxyCommand' in line 1 of hosts"),
        (b"node1;touch${IFS}owned\n", f"{NAME} 'node1;touch"),
        (b"\nslots=2\n", f"{NAME} 'slots=2' in line 2 of hosts"),
        (b"node1\n\xffnode2\n", f"{NAME} $'\\377node2' in line 2 of hosts"),
        (b"node1 slots=two\n", f"{LINES} hosts: 'node1 slots=two'"),
        (b"node1 slots=0\n", f"{LINES} hosts: 'node1 slots=0'"),
        (b"node1 slots=-1\n", f"{LINES} hosts: 'node1 slots=-1'"),
        (b"node1 slots=\n", f"{LINES} hosts: 'node1 slots='"),
        (b"node1 slots\n", f"{LINES} hosts: 'node1 slots'"),
        (b"node1 slots=2 slots=3\n", f"{LINES} hosts: 'node1 slots=2 slots=3'"),
        (b"node1 node2\n", f"{LINES} hosts: 'node1 node2'"),
        (b"node1\rnode2\r", f"{LINES} hosts: 'node1 node2 '"),
        (b"node1 slots=1\nnode2\nnode1", "expected one line for each host, got another for node1, line 3 of hosts"),
    ],
)
def test_a_hostfile_that_is_wrong_is_refused_in_one_line(launcher, content, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_bytes(content)
    status, output = run(launcher, "--hostfile", "hosts", "train.py", LAUNCH_AGENT="touch called")
    assert status == 2
    assert output.startswith(expected), output
    assert output.count("\n") == 1
    assert os.listdir() == ["hosts"]


@pytest.fixture
def tree(tmp_path):
    """Return the root of a copy of this tree, in a path with spaces, that is not installed."""
    root = tmp_path / "a tree"
    shutil.copytree(LAUNCH, root / "launch")
    for name in "pyproject.toml", "syncnorm":
        (root / name).symlink_to(LAUNCH.parent / name)
    return root


@pytest.mark.parametrize("launcher", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--help"], 0), (["--ranks", "two", "train.py"], 2), (["--hostfile", "/dev/null", "train.py"], 2), ([], 2)],
)
def test_help_and_mistakes_are_answered_without_installing(launcher, arguments, expected, tree):
    status, output = run(tree / "launch" / launcher, *arguments, PYTHON="/no/python")  # or it would take minutes
    assert status == expected, output
    assert not (tree / ".venv").exists()


def test_the_scripts_run_in_a_path_with_spaces(tree, script):
    (tree / ".venv").symlink_to(LAUNCH.parent / ".venv")
    status, output = run(tree / "launch" / "torchrun", "--ranks", 1, script, "an argument", PYTHON="/no/python")
    assert status == 0, output
    assert joined(output) == ["joined 0 1 ['an argument']"]


@pytest.fixture
def agent(tmp_path):
    """Return an agent in the place of ssh: it notes what it is called with, and runs the command in a POSIX shell."""
    path = tmp_path / "agent"
    path.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >"$0.$$"\nshift\nexec sh -c "$*"\n')
    path.chmod(0o755)
    return path


def called(agent):
    """Return the host and the command of each call, by host."""
    calls = [path.read_bytes().decode().split("\0")[:-1] for path in agent.parent.glob("agent.*")]
    return sorted([host, " ".join(words)] for host, *words in calls)


HARD = ["two\nlines", "a\ttab", "it's", '"', "", "\\n", "$HOME", "`x`", "*", "é", "--ranks", "ends\n"]


def test_arguments_and_settings_reach_the_hosts_as_they_are(agent, script, tmp_path):
    """Through the login shell of a host, which may be dash; from a hostfile with all that editors leave in it."""
    script.write_text(
        script.read_text()
        + "sys.stdout.write(repr([os.environ[name] for name in ('GLOO_OF_TEST', 'UCX_OF_TEST_2')]) + '\\n')\n"
    )
    hostfile = tmp_path / "a hostfile"
    hostfile.write_bytes(b"# hosts\r\n\t127.0.0.1\tslots\t=\t1 # the first\r\n\r\nuser@localhost slots=1 max_slots=2")
    settings = {"GLOO_OF_TEST": "two\nPATH=lines", "UCX_OF_TEST_2": "it's\n"}
    status, output = run("torchrun", "--hostfile", hostfile, script, *HARD, LAUNCH_AGENT=str(agent), **settings)
    assert status == 0, output
    assert joined(output) == [f"joined {rank} 2 {HARD}" for rank in range(2)]
    assert output.count(repr(list(settings.values()))) == 2
    assert [host for host, _ in called(agent)] == ["127.0.0.1", "user@localhost"]


def test_mpirun_reads_what_editors_leave_in_a_hostfile(script, tmp_path):
    hostfile = tmp_path / "a hostfile"
    hostfile.write_bytes(b"# hosts\r\n\t127.0.0.1\tslots\t=\t2 # the first\r\n\r\n")
    status, output = run("mpirun", "--hostfile", hostfile, script, *HARD, GLOO_OF_TEST="two\nlines")
    assert status == 0, output
    assert joined(output) == [f"joined {rank} 2 {HARD}" for rank in range(2)]


@pytest.mark.parametrize(
    ("first", "host", "address"),
    [
        ("node1.example.org", "node1.example.org", "node1.example.org"),
        ("user@node1", "user@node1", "node1"),
        ("user@[fe80::1%eth0]", "user@fe80::1%eth0", "fe80::1%eth0"),
        ("::1", "::1", "::1"),
    ],
)
def test_forms_of_hosts(first, host, address, agent, tmp_path):
    """What ssh gets, and where ranks meet. The agent runs nothing here."""
    agent.write_text(agent.read_text().replace('exec sh -c "$*"', ""))
    hostfile = tmp_path / "hosts"
    hostfile.write_text(f"{first}\nzz")
    status, output = run("torchrun", "--hostfile", hostfile, "train.py", LAUNCH_AGENT=str(agent))
    assert (status, output) == (0, "")
    (got, command), (other, _) = called(agent)
    assert (got, other) == (host, "zz")
    assert f"'--master-addr' '{address}'" in command


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
