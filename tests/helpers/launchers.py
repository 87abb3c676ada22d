"""Real launchers: run a script under torchrun, under mpirun or alone, with a hard timeout, and leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from syncnorm.testing import mpirun_environment

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENTS = {library: ROOT / f".venv-{library}" for library in ("mpich", "impi-rt")}  # made by test_mpich.py


def _mpiexec(bin):
    return lambda ranks: [str(bin / "mpiexec"), "-n", str(ranks), str(bin / "python")]


COMMANDS = {
    "alone": lambda ranks: [sys.executable],
    "torchrun": lambda ranks: [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks)],
    "mpirun": lambda ranks: [str(BIN / "mpirun"), "-n", str(ranks), sys.executable],
    **{library: _mpiexec(directory / "bin") for library, directory in ENVIRONMENTS.items()},
}


class Completed(NamedTuple):
    """How a job ended."""

    returncode: int
    stdout: str
    stderr: str


def launch(launcher, ranks, script, *arguments, timeout=90, **environment):
    """Run the script on `ranks` ranks. A job that outlasts the timeout is killed, with all of its processes."""
    process = subprocess.Popen(
        [*COMMANDS[launcher](ranks), str(script), *map(str, arguments)],
        env=mpirun_environment() | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Completed(process.returncode, stdout, stderr)
