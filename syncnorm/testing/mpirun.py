"""Start the ranks of `run_ranks` under mpirun."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from multiprocessing.spawn import get_preparation_data
from pathlib import Path

from ..job.launcher import RENDEZVOUS

__all__ = ["Mpirun", "mpirun_environment"]

MPI_RANK = f"from {__package__} import worker; worker.main_under_mpirun()"
TERMINATION_TIMEOUT = 5.0  # seconds in which mpirun must end its ranks before it is killed
MPIRUN_ENVIRONMENT = {  # lets Open MPI 4 and 5 and Intel MPI run as root and with more ranks than cores
    "I_MPI_PIN": "0",
    "I_MPI_WAIT_MODE": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


class Mpirun:
    """An mpirun process and its ranks. Their output is printed after they have ended."""

    name = "mpirun"

    def __init__(self, directory: Path, world_size: int):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        mpirun = shutil.which("mpirun", path=path)
        if mpirun is None:
            raise RuntimeError("expected an mpirun for backend=\"mpi\", found none: pip install 'syncnorm[mpi]'")
        preparation = get_preparation_data("rank")  # lets a child import the modules that its parent can import
        preparation.pop("authkey")  # must not be written to a file
        (directory / "preparation").write_bytes(pickle.dumps(preparation))
        self.output = (directory / "output").open("w+")
        self.process = subprocess.Popen(
            [mpirun, "-n", str(world_size), sys.executable, "-c", MPI_RANK, str(directory)],
            env=mpirun_environment() | {"PATH": path},  # Intel's mpirun looks up mpiexec
            cwd=Path(__file__).parents[2],
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    @property
    def exitcode(self) -> int | None:
        """The exit status of mpirun, or None while it runs."""
        return self.process.poll()

    def is_alive(self) -> bool:
        """Return whether mpirun is still running."""
        return self.exitcode is None

    def stop(self) -> None:
        """End mpirun if it is still running, and print the output of the ranks."""
        if self.is_alive():
            self.process.terminate()  # mpirun ends its ranks
            try:
                self.process.wait(TERMINATION_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.output.seek(0)
        sys.stdout.write(self.output.read())
        self.output.close()


def mpirun_environment() -> dict[str, str]:
    """Return an environment in which mpirun can run as root, with more ranks than cores, and inside another job."""
    of_another_job = (
        *("OMPI_", "PMIX_", "PRTE_", "PMI_", "MPI_LOCAL", "HYDI_", "HYDRA_"),
        *("SYNCNORM_JOB_ID", "TORCHELASTIC_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *RENDEZVOUS),
    )
    return {k: v for k, v in os.environ.items() if not k.startswith(of_another_job)} | MPIRUN_ENVIRONMENT
