"""Real launchers: run a script under torchrun, under mpirun or alone, with a hard timeout, and leave nothing behind."""

import json
import shutil
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
ONE_AFTER_ANOTHER = Path(__file__).with_name("one_after_another.py")
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


class Jobs:
    """Trainings of the examples, each run once: those of a launcher and number of ranks run in one job.

    Args:
        folder: for what they write.
        plan: by launcher and ranks, then by name, the script and its arguments. CHECKPOINT stands for a file.
    """

    CHECKPOINT = object()

    def __init__(self, folder, plan):
        self.folder, self.plan, self.ran = folder, plan, {}

    def run(self, launcher, ranks):
        """Return the job that ran all trainings."""
        if (launcher, ranks) not in self.ran:
            commands = []
            for name, command in self.plan[launcher, ranks].items():
                record, checkpoint = self.files(launcher, ranks, name)
                words = [checkpoint if word is self.CHECKPOINT else word for word in command]
                commands.append([str(word) for word in (*words, "--out", record)])
            job = launch(launcher, ranks, ONE_AFTER_ANOTHER, json.dumps(commands), timeout=180, NO_COLOR="1")
            self.ran[launcher, ranks] = job
        job = self.ran[launcher, ranks]
        assert job.returncode == 0, job.stderr
        return job

    def files(self, launcher, ranks, name):
        """Return the paths of a training's record and checkpoint."""
        path = self.folder / f"{launcher}-{ranks} {name}"
        return path.with_suffix(".json"), path.with_suffix(".checkpoint")

    def copy_checkpoint(self, launcher, ranks, name, path):
        """Copy the checkpoint that a training has left."""
        self.run(launcher, ranks)
        shutil.copy(self.files(launcher, ranks, name)[1], path)

    def record(self, launcher, ranks, name):
        """Return what a training has recorded."""
        self.run(launcher, ranks)
        return json.loads(self.files(launcher, ranks, name)[0].read_text())
