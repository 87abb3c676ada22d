"""The tiers of the tests, and the `run` fixture: a function on the ranks of a real group.

A file belongs to the tier that `TIERS` names. Tests of a unit file that start ranks belong to the tier `ranks`.
"""

import os
import tempfile
import traceback
from unittest import mock

import pytest
import torch

import syncnorm
from syncnorm import communicators, testing
from syncnorm.job.launcher import detect_launcher

TIMEOUT = 60  # seconds for the ranks of one test
TIERS = {  # the files of each tier, without test_
    "unit": """
        architecture arguments autograd bench_baselines bench_cases bench_copy_baseline bench_graph bench_job
        bench_targets bench_timing checkpointing compile convert convert_classes convert_known convert_refused
        default_device exchange finite fixed_point folding functional fused fusion fuzz join kernels launcher launches
        many_forwards masks modules moments package patch pickles planning population reproducible running sharded_norms
        sharding state statistics subgroups tensor_parallel tracing transforms without_values
    """,
    "ranks": """
        communicators count_collectives mismatch mpi_backend pytest_plugin shared_memory testing torch_distributed
        verify
    """,
    "launchers": """
        agreement bench_comm bench_figure bench_kernels bench_layer bench_memory bench_report bench_train bootstrap
        checkpoints claims cli contrast datasets demo desync docs elastic examples forks gpu_run help install mpich plan
        readme rejoin rendezvous shared_memory_faults store timed_communicator transformer typing unfinished_collectives
    """,
    "system": "faults launch slurm virtual_cluster",  # root and networks
    "gpu": "gpu_kernels gpu_numerics gpu_ranks gpu_training triton_code triton_kernels",  # see docs/gpu.md
    "ecosystem": "export frameworks model_zoos peers",  # in its folder
}


MARKERS = {  # by the plugin that registers it. A machine with a GPU may have pytest alone.
    "pytest_mpi": "mpi: needs mpirun",
    "timeout": "timeout(seconds): of one test",
    "xdist": "xdist_group(name): tests of which one runs at a time",
}


def pytest_addoption(parser, pluginmanager):
    """Accept the setting of pytest-timeout, which --strict-config refuses without it."""
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "seconds for a test: has no effect without pytest-timeout")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Register the markers of plugins that are not there, and give this run a folder of its own for temporary files.

    --strict-markers refuses markers that nobody has registered. Runs that end at the same time, such as the ranks of
    mpirun, would remove each other's folders from the one that pytest keeps for all, and fail.
    """
    for plugin, marker in MARKERS.items():
        if not config.pluginmanager.has_plugin(plugin):
            config.addinivalue_line("markers", marker)
    if config.option.basetemp is None:  # else the user's, or that of pytest-xdist
        folder = tempfile.TemporaryDirectory(prefix="syncnorm-tests-", ignore_cleanup_errors=True)
        config.option.basetemp = folder.name
        config.add_cleanup(folder.cleanup)


def run_under_mpirun(fn, world_size, *args):
    """Call fn(*args) on the first `world_size` ranks of this MPI job; return their results by rank, on all ranks."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    group = world.Split(0 if world.rank < world_size else MPI.UNDEFINED, world.rank)
    outcome = None
    if group != MPI.COMM_NULL:
        communicators.set_default(syncnorm.communicator(group))
        try:
            outcome = (fn(*args), None)
        except Exception as error:
            traceback.print_exc()  # the other ranks may be waiting for this one
            outcome = (None, error)
        finally:
            communicators.set_default(None)
        group.Free()
    outcomes = world.allgather(outcome)[:world_size]
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def run_spawned(fn, world_size, *args):
    """Call fn(*args) on `world_size` new processes on Gloo; return their results by rank."""
    return testing.run_ranks(fn, world_size, *args, timeout=TIMEOUT)


@pytest.fixture(params=["gloo", pytest.param("mpi", marks=pytest.mark.mpi)])
def run(request):
    """Return what calls `fn(*args)` on `world_size` ranks, in whose `syncnorm.communicator()` they meet."""
    return run_under_mpirun if request.param == "mpi" else run_spawned


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _launcher_is_forgotten(request):
    """Restore the environment, to which joining a job adds, and forget the launcher. A job of mpirun goes on."""
    if request.config.getoption("--with-mpi", default=False):
        yield
        return
    with mock.patch.dict(os.environ):
        yield
    detect_launcher.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    """Forget what an earlier test has compiled, after which ranks compare nothing."""
    monkeypatch.setattr("syncnorm.exchange._compiled", False)


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan(request):
    """Poison what kernels do not write: torch.empty gives NaN. Not on a GPU, where torch's own kernels would change."""
    poisoned = {"unit", "gpu"} & {marker.name for marker in request.node.iter_markers()}
    if not poisoned or torch.cuda.is_available():
        yield
        return
    torch.use_deterministic_algorithms(True)  # without which torch fills nothing
    yield
    torch.use_deterministic_algorithms(False)


def pytest_report_header():
    """Say what the tests change on this machine."""
    return (
        "the system tier installs Slurm, an ssh server and iproute2 with apt-get if it runs as root, "
        "and test_mpich.py makes the environment .venv-mpich"
    )


def tier(item):
    """Return the tier that a test belongs to."""
    name = item.path.stem.removeprefix("test_")
    tiers = [tier for tier, files in TIERS.items() if name in files.split()]
    if len(tiers) != 1:
        raise pytest.UsageError(f"expected {item.path.name} in one tier of TIERS in tests/conftest.py, got {tiers}")
    on_ranks = "run" in item.fixturenames or "run_ranks" in item.function.__code__.co_names
    return "ranks" if on_ranks and tiers == ["unit"] else tiers[0]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Mark each test with its tier. Under mpirun, choose by the ranks."""
    for item in items:
        item.add_marker(tier(item))
    if not config.pluginmanager.has_plugin("pytest_mpi"):
        skip = pytest.mark.skip(reason="needs pytest-mpi, and mpirun")
        for item in items:
            if item.get_closest_marker("mpi"):
                item.add_marker(skip)
    if not config.getoption("--with-mpi", default=False):
        return
    from mpi4py import MPI

    size = MPI.COMM_WORLD.size

    def fits(item):
        """Return whether a test belongs in this job, not in a larger one, nor in one of half the ranks."""
        params = item.callspec.params if hasattr(item, "callspec") else {}
        ranks = getattr(params.get("case"), "world_size", params.get("world_size", size))
        return size // 2 < ranks <= size or ranks < size == 2

    deselected = [item for item in items if not fits(item)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if fits(item)]
