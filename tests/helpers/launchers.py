"""Real launchers: run a script under torchrun, under mpirun or alone, with a hard timeout, and leave nothing behind."""

import subprocess
import sys
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
