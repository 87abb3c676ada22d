"""PyTorch's own tests of torch.distributed on the ranks of a job: `mpirun -n 3 python torch_distributed_suite.py FILE`.

They are `DistributedTest` in torch.testing. Its own runner starts new processes for each test. Here the ranks of the
job run them all, each in a default group of its own on mpi4py: the tests that torch selects for Gloo, and those that it
selects for MPI alone. Rank 0 writes a line of JSON to FILE for each test: its name, how it ended on each rank, and the
seconds it took. Names after FILE select tests.
"""

import faulthandler
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unittest
import warnings
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from mpi4py import MPI

import syncnorm.mpi_backend
from syncnorm.mpi.rendezvous import export_rendezvous

LIMIT = 40  # seconds that a test may take


class Backend(str):
    """mpi4py, for which torch's tests take what they do for the backend that they were selected for."""

    selected_for = ""
    __hash__ = str.__hash__

    def __eq__(self, other):
        return other in (str(self), self.selected_for)

    def __ne__(self, other):
        return not self == other


def load(backend):
    """Return torch's module of tests, which selects them by the environment while it is imported."""
    export_rendezvous(MPI.COMM_WORLD)  # torch's module reads WORLD_SIZE
    os.environ |= {"BACKEND": backend, "INIT_METHOD": "file:///dev/null"}
    origin = importlib.util.find_spec("torch.testing._internal.distributed.distributed_test").origin
    spec = importlib.util.spec_from_file_location(f"distributed_test_for_{backend}", origin)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BACKEND = Backend(syncnorm.mpi_backend.BACKEND)
    module.BACKEND.selected_for = backend
    return module


class Overdue(BaseException):
    """A test has not ended in time. Not an Exception, which tests may expect."""


def stop(*_):
    raise Overdue(f"longer than {LIMIT} s")


def run(module, name, world, directory):
    """Run a test in a default group of its own; return how it ended here: "passed", "skipped: ..." or "failed: ..."."""
    meeting = world.Dup()

    class Case(module.TestDistBackend, module.DistributedTest._DistTestBase):
        world_size = str(world.size)

        def _barrier(self, **_):
            arrival = meeting.Ibarrier()
            while not arrival.Test():
                os.sched_yield()

    if world.rank == 0:
        for part in ("barrier", "test_dir"):
            (directory / part).mkdir(parents=True)
    world.Barrier()
    os.environ |= {"TEMP_DIR": str(directory), "INIT_METHOD": f"file://{directory}/again"}
    module.INIT_METHOD = os.environ["INIT_METHOD"]
    case = Case(name)
    case.rank, case.file_name = world.rank, str(directory / "file")
    store = dist.FileStore(str(directory / "store"), world.size)
    dist.init_process_group(
        "mpi4py", store=store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=30)
    )
    dist.set_debug_level(dist.DebugLevel.OFF)  # a test that failed may have left another
    sys.modules["torch.testing._internal.common_utils"].set_rng_seed()
    signal.alarm(LIMIT)
    try:
        getattr(case, name)()
        return "passed"
    except (unittest.SkipTest, SystemExit) as reason:
        return f"skipped: {reason}"
    except (Exception, Overdue):
        meeting.Ibarrier()  # for others, who may wait at the test's end
        return f"failed: {traceback.format_exc()}"
    finally:
        signal.alarm(0)
        if dist.is_initialized():
            dist.destroy_process_group()


def main(results, *names):
    world = MPI.COMM_WORLD.Dup()
    directory = Path(world.bcast(tempfile.mkdtemp() if world.rank == 0 else None))
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, stop)
    modules = [load(backend) for backend in ("gloo", "mpi")]
    names = names or unittest.TestLoader().getTestCaseNames(modules[0].DistributedTest._DistTestBase)
    with open(results if world.rank == 0 else os.devnull, "w") as lines:
        for name in names:
            began = time.perf_counter()
            for number, module in enumerate(modules):
                faulthandler.dump_traceback_later(2 * LIMIT, exit=True)  # a test that no signal ends
                how = world.allgather(run(module, name, world, directory / f"{name}-{number}"))
                if not all(end.startswith("skipped") for end in how):
                    break
            print(json.dumps([name, how, round(time.perf_counter() - began, 2)]), file=lines, flush=True)
    faulthandler.cancel_dump_traceback_later()
    if world.rank == 0:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
