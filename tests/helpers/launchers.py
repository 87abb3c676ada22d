"""Real launchers: run a script under torchrun, under mpirun or alone, with a hard timeout, and leave nothing behind."""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes

from syncnorm.testing import mpirun_environment

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun")] if (BIN / "torchrun").exists() else [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENTS = {library: ROOT / f".venv-{library}" for library in ("mpich", "impi-rt")}  # made by test_mpich.py


def _mpiexec(bin):
    return lambda ranks: [str(bin / "mpiexec"), "-n", str(ranks), str(bin / "python")]


COMMANDS = {
    "alone": lambda ranks: [sys.executable],
    "torchrun": lambda ranks: [*TORCHRUN, "--standalone", "--nproc-per-node", str(ranks)],
    "mpirun": lambda ranks: [str(BIN / "mpirun"), "-n", str(ranks), sys.executable],
    **{library: _mpiexec(directory / "bin") for library, directory in ENVIRONMENTS.items()},
}


def launch(launcher, ranks, script, *arguments, timeout=90, **environment):
    """Run the script on `ranks` ranks. A job that outlasts the timeout is killed, with all of its processes."""
    return processes.run(
        *COMMANDS[launcher](ranks),
        script,
        *arguments,
        timeout=timeout,
        env=mpirun_environment() | {"OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
    )


def launch_one_by_one(ranks, script, *arguments, timeout=90, **environment):
    """Run the script on ranks that no launcher has started, so that none ends the others after one has failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(ranks)}

    def start(rank):
        return launch("alone", 1, script, *arguments, timeout=timeout, **meet, RANK=str(rank), **environment)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(start, range(ranks)))
