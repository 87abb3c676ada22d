"""`syncnorm.init` under real launchers."""

import math
import re
import socket
import textwrap
from datetime import timedelta

import pytest
import torch
from launchers import COMMANDS, launch
from programs import FAIL, JOIN, STAY_AWAY

import syncnorm
from syncnorm.job.store import free_port


@pytest.fixture
def script(tmp_path):
    def write(code):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(code))
        return path

    return write


def lines(job):
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""  # success is silent, the end too
    return sorted(job.stdout.splitlines())


def test_alone(script):
    assert lines(launch("alone", 1, script(JOIN))) == ["LocalCommunicator 0/1 0.000"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_torchrun(script, ranks):
    name = "nccl" if ranks <= torch.cuda.device_count() else "gloo"
    refused = f" expected_one_backend_for_the_job,_got_'mpi'_after_'{name}'" if ranks > 1 else ""
    mean = 0.1 * (ranks - 1) / 2
    assert lines(launch("torchrun", ranks, script(JOIN))) == [
        f"ProcessGroupCommunicator {rank}/{ranks} {mean:.3f} {name}{refused}" for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [1, 3])
def test_mpirun(script, ranks):
    refused = " expected_one_backend_for_the_job,_got_'gloo'_after_'mpi'" if ranks > 1 else ""
    mean = 0.1 * (ranks - 1) / 2
    assert lines(launch("mpirun", ranks, script(JOIN))) == [
        f"MpiCommunicator {rank}/{ranks} {mean:.3f} mpi4py{refused}" for rank in range(ranks)
    ]


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(script, launcher):
    job = launch(launcher, 3, script(FAIL))
    assert job.returncode != 0
    assert 'raise ValueError("rank one has had enough")' in job.stderr
    assert "ValueError: rank one has had enough" in job.stderr
    assert f"rank 1 of 3 on {socket.gethostname()} ended with ValueError" in job.stderr
    if launcher == "mpirun":
        assert "aborting the MPI job" in job.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_a_timeout_ends_the_wait_for_a_rank_that_stays_away(script, launcher):
    job = launch(launcher, 2, script(STAY_AWAY), timeout=25)  # less than the other rank sleeps
    assert job.returncode != 0
    waited = (
        "MPI_Allreduce on rank 0 of 2 waited 2 s for its peers" if launcher == "mpirun" else "all_reduce on rank 0 of 2"
    )
    assert f"DesyncError: {waited}" in job.stderr
    host = socket.gethostname()
    assert re.search(
        rf"rank 0 on {host}: in all_reduce of \d+ \w+, at .*script.py:7 in <module>: group.all_reduce", job.stderr
    )
    assert re.search(rf"rank 1 on {host}: in no collective, at .*script.py:6 in <module>: time.sleep", job.stderr)


INIT = """
    import sys, syncnorm
    try:
        outcome = syncnorm.init({backend!r})
    except (RuntimeError, ValueError) as error:
        outcome = f"{{type(error).__name__}} {{error}}"
    sys.stdout.write(f"{{outcome}}\\n")
"""


def test_a_half_set_environment(script):
    job = launch("alone", 1, script(INIT.format(backend="auto")), RANK="0", WORLD_SIZE="2")
    assert job.stdout == (
        "RuntimeError expected RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment, as torchrun sets them; "
        "not set: MASTER_ADDR, MASTER_PORT\n"
    )


def test_ranks_that_torchrun_starts_anew_join_again(script):
    code = """
        import os, sys, torch, syncnorm
        group = syncnorm.init()
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        group.all_reduce(torch.ones(1))
        if attempt == "0" and group.rank == 1:
            raise ValueError("the first time")
        total = group.all_reduce(torch.ones(1)).item()
        sys.stdout.write(f"rank {group.rank} sums {total} at attempt {attempt}\\n")
    """
    job = launch("torchrun", 3, script(code), PET_MAX_RESTARTS="1")
    assert job.returncode == 0, job.stderr
    assert sorted(job.stdout.splitlines()) == [f"rank {rank} sums 3.0 at attempt 1" for rank in range(3)]


WRITTEN_FOR_TORCHRUN = """
    import os, sys, torch, torch.distributed as dist, syncnorm
    syncnorm.init({backend!r})
    local_rank = int(os.environ["LOCAL_RANK"])
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
    model(torch.full((1, 1), float(dist.get_rank()))).sum().backward()
    words = [os.environ["RANK"], os.environ["WORLD_SIZE"], local_rank, os.environ["LOCAL_WORLD_SIZE"]]
    words += [dist.get_backend(), model.module.weight.grad.item()]
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
"""


@pytest.mark.parametrize(
    ("launcher", "backend", "expected"),
    [("torchrun", "auto", "gloo"), ("mpirun", "auto", "mpi4py"), ("mpirun", "gloo", "gloo")],
)
def test_what_torchrun_sets_is_set_under_every_launcher(script, launcher, backend, expected):
    job = launch(launcher, 3, script(WRITTEN_FOR_TORCHRUN.format(backend=backend)))
    assert lines(job) == [f"{rank} 3 {rank} 3 {expected} 1.0" for rank in range(3)]


@pytest.mark.parametrize(("launcher", "backend"), [("alone", "gloo"), ("alone", "mpi"), ("mpirun", "auto")])
def test_a_process_alone_opens_no_port_and_sets_variables_only_under_a_launcher(script, launcher, backend):
    code = f"""
        import os, sys, torch.distributed as dist, syncnorm
        def refuse(*args, **kwargs):
            raise AssertionError("a store that listens")
        dist.TCPStore = refuse
        before = dict(os.environ)
        group = syncnorm.init({backend!r})
        set_by_us = {{k: v for k, v in os.environ.items() if before.get(k) != v and not k.startswith("OMPI_MCA_")}}
        set_by_us.pop("MASTER_PORT", None)
        sys.stdout.write(f"{{group.rank}} of {{group.size}} {{set_by_us}}\\n")
    """
    set_by_us = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    set_by_us["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    assert lines(launch(launcher, 1, script(code))) == [f"0 of 1 {set_by_us if launcher == 'mpirun' else {}}"]


def test_what_torch_builds_on_a_group_works_alone(script):
    code = """
        import sys, tempfile, torch, torch.distributed as dist, torch.distributed.checkpoint as checkpoint, syncnorm
        syncnorm.init("gloo")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
        dist.all_reduce(torch.ones(1), group=dist.new_group([0]))
        mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
        sharded = torch.distributed.fsdp.fully_shard(torch.nn.Linear(2, 2), mesh=mesh["dp"])
        sharded(torch.ones(1, 2)).sum().backward()
        with tempfile.TemporaryDirectory() as directory:
            checkpoint.save({"weight": torch.ones(2)}, checkpoint_id=directory)
            loaded = {"weight": torch.zeros(2)}
            checkpoint.load(loaded, checkpoint_id=directory)
        objects = [None]
        dist.all_gather_object(objects, "object")
        dist.monitored_barrier()
        sys.stdout.write(f"{loaded['weight'].sum().item():g} {objects}\\n")
    """
    job = launch("alone", 1, script(code))
    assert job.stdout == "2 ['object']\n", job.stderr


def test_an_mpirun_inside_a_process_that_has_a_rank_is_refused(script):
    """As inside torchrun, or where a notebook set RANK and WORLD_SIZE; each rank would train alone."""
    left = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    job = launch("mpirun", 2, script(INIT.format(backend="auto")), **left)
    assert sorted(job.stdout.splitlines()) == [
        "RuntimeError expected one launcher, got two that contradict each other: RANK=0, WORLD_SIZE=1 of torchrun, and "
        f"OMPI_COMM_WORLD_RANK={rank}, OMPI_COMM_WORLD_SIZE=2 of mpirun. Unset RANK and WORLD_SIZE to join the 2 ranks "
        "of mpirun, or OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE to run a single process"
        for rank in range(2)
    ]


def test_an_mpirun_inside_a_process_that_joined_alone_is_a_job(script, tmp_path):
    inner = tmp_path / "inner.py"
    inner.write_text(textwrap.dedent(INIT.format(backend="auto")))
    code = f"""
        import subprocess, sys, syncnorm
        syncnorm.init("gloo")
        mpirun = {COMMANDS["mpirun"](2)}
        sys.exit(subprocess.run([*mpirun, {str(inner)!r}]).returncode)
    """
    job = launch("alone", 1, script(code))
    assert lines(job) == [f"MpiCommunicator(rank={rank}, size=2)" for rank in range(2)]


def test_ranks_of_torchrun_inside_mpirun_count(script, tmp_path):
    """One torchrun for each node, started by mpirun: here two of one rank each."""
    code = f"""
        import os, subprocess, sys
        node = os.environ["OMPI_COMM_WORLD_RANK"]
        options = ["--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
        torchrun = [{COMMANDS["torchrun"](1)[0]!r}, *options, "--master-port", sys.argv[1], sys.argv[2]]
        sys.exit(subprocess.run(torchrun).returncode)
    """
    inner = tmp_path / "inner.py"
    inner.write_text(textwrap.dedent(INIT.format(backend="auto")))
    job = launch("mpirun", 2, script(code), free_port(), inner)
    assert sorted(job.stdout.splitlines()) == [
        f"ProcessGroupCommunicator(gloo, rank={rank}, size=2)" for rank in range(2)
    ], job.stderr


@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), ("mpirun", 3)])
def test_torch_distributed_alone_makes_the_group_over_mpi(script, launcher, ranks):
    code = """
        import sys, torch, torch.distributed as dist, syncnorm.mpi_backend
        dist.init_process_group("mpi4py")
        layer = syncnorm.SyncBatchNorm(2, momentum=1.0)
        layer(torch.full((3, 2), float(dist.get_rank())))
        words = [type(syncnorm.init()).__name__, dist.get_rank(), dist.get_world_size(), layer.running_mean[0].item()]
        sys.stdout.write(" ".join(map(str, words)) + "\\n")
    """
    job = launch(launcher, ranks, script(code))
    assert lines(job) == [f"MpiCommunicator {rank} {ranks} {(ranks - 1) / 2}" for rank in range(ranks)]


def test_gloo_alone_is_a_group_that_ddp_runs_on(script):
    code = """
        import torch, syncnorm
        print(syncnorm.init("gloo"), syncnorm.communicator().size)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(syncnorm.SyncBatchNorm(2)))
        model(torch.randn(4, 2)).sum().backward()
    """
    assert lines(launch("alone", 1, script(code))) == ["ProcessGroupCommunicator(gloo, rank=0, size=1) 1"]


def test_mpi_alone_is_a_group_of_one(script):
    job = launch("alone", 1, script(INIT.format(backend="mpi")))
    assert lines(job) == ["MpiCommunicator(rank=0, size=1)"]


def test_a_group_made_elsewhere_is_taken_and_may_be_destroyed(script):
    code = """
        import torch.distributed as dist, syncnorm
        for _ in range(2):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            group = syncnorm.init()
            print(group, group is syncnorm.communicator(dist.group.WORLD))
            try:
                syncnorm.init("mpi")
            except RuntimeError as error:
                print(error)
            dist.destroy_process_group()
        print(syncnorm.communicator())
    """
    group = "ProcessGroupCommunicator(gloo, rank=0, size=1) True"
    refused = "expected one backend for the job, got 'mpi' after 'gloo'"
    assert lines(launch("alone", 1, script(code))) == sorted([group, refused, group, refused, "LocalCommunicator()"])


@pytest.mark.parametrize("backend", ["tcp", "NCCL", ""])
def test_an_unknown_backend(backend):
    with pytest.raises(ValueError, match=f'expected backend "auto", "nccl", "gloo" or "mpi", got {backend!r}'):
        syncnorm.init(backend)


def test_a_backend_that_does_not_see_the_launcher_is_refused(script):
    job = launch("torchrun", 2, script(INIT.format(backend="mpi")))
    assert job.stdout.count("RuntimeError expected 2 ranks, as started by torchrun") == 2
    assert job.stdout.count("got a world of size 1 from MPI") == 2


def test_gloo_under_mpirun_meets_over_mpi(script):
    job = launch("mpirun", 2, script(INIT.format(backend="gloo")))
    assert lines(job) == [f"ProcessGroupCommunicator(gloo, rank={rank}, size=2)" for rank in range(2)]


def test_ranks_of_one_host_are_numbered(script):
    code = """
        import sys, syncnorm
        sys.stdout.write(f"{syncnorm.init().local_rank()}\\n")
    """
    assert lines(launch("mpirun", 3, script(code))) == ["0", "1", "2"]


def test_a_rendezvous_address_does_not_hide_mpirun(script):
    job = launch("mpirun", 2, script(INIT.format(backend="auto")), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert lines(job) == ["MpiCommunicator(rank=0, size=2)", "MpiCommunicator(rank=1, size=2)"]


RANGE = "expected timeout to be a number of seconds from 0.001 to 2000000, or a timedelta of that range, got "
NONE = [0, -1.5, 1e-9, math.nan, math.inf, -math.inf, 1e300, 10**400, timedelta(0), timedelta(-1), timedelta.max]


@pytest.mark.parametrize("timeout", NONE, ids=lambda value: str(value)[:9])
def test_a_timeout_out_of_range(timeout):
    with pytest.raises(ValueError, match=re.escape(RANGE + repr(timeout))):
        syncnorm.init(timeout=timeout)


@pytest.mark.parametrize("timeout", ["5", True, b"5", [5], 5j])
def test_a_timeout_of_another_type(timeout):
    with pytest.raises(TypeError, match=re.escape(RANGE + repr(timeout))):
        syncnorm.init(timeout=timeout)


def test_a_second_call_keeps_the_first_timeout(script):
    code = """
        import datetime, sys, numpy, syncnorm
        group = syncnorm.init("mpi", timeout=numpy.float32(50))
        assert syncnorm.init(timeout=datetime.timedelta(seconds=7)) is group
        try:
            syncnorm.init(timeout=-1)
        except ValueError as error:
            sys.stdout.write(f"{error}, {group.timeout}\\n")
    """
    assert lines(launch("alone", 1, script(code))) == [f"{RANGE}-1, 0:00:50"]


@pytest.mark.parametrize("backend", [*["nccl"] * (not torch.cuda.is_available())])
def test_nccl_where_there_is_none(script, backend):
    job = launch("alone", 1, script(INIT.format(backend=backend)))
    assert job.stdout.startswith('RuntimeError expected a CUDA device and NCCL for backend="nccl", and at least one is')
