"""`syncnorm.init` under real launchers."""

import re
import socket
import textwrap

import pytest
import torch
from launchers import launch

import syncnorm

JOIN = """
    import sys, torch, torch.distributed as dist, syncnorm
    group = syncnorm.init()
    assert syncnorm.init() is group
    assert syncnorm.communicator() is group
    layer = syncnorm.SyncBatchNorm(2)
    layer(torch.full((3, 2), float(group.rank)))
    words = [type(group).__name__, f"{group.rank}/{group.size}", f"{layer.running_mean[0]:.3f}"]
    if dist.is_initialized():
        words.append(dist.get_backend())
    for other in ("mpi", "gloo"):
        if other not in words and (other, words[0]) != ("mpi", "MpiCommunicator") and group.size > 1:
            try:
                syncnorm.init(other)
            except RuntimeError as error:
                words.append(str(error).replace(" ", "_"))
    sys.stdout.write(" ".join(words) + "\\n")
"""


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


FAIL = """
    import torch, syncnorm
    group = syncnorm.init()
    group.barrier()
    if group.rank == 1:
        raise ValueError("rank one has had enough")
    group.all_reduce(torch.zeros(1))
"""


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(script, launcher):
    job = launch(launcher, 3, script(FAIL))
    assert job.returncode != 0
    assert 'raise ValueError("rank one has had enough")' in job.stderr
    assert "ValueError: rank one has had enough" in job.stderr
    assert f"rank 1 of 3 on {socket.gethostname()} ended with ValueError" in job.stderr
    if launcher == "mpirun":
        assert "aborting the MPI job" in job.stderr


STAY_AWAY = """
    import time, torch, syncnorm
    group = syncnorm.init(timeout=2)
    group.barrier()
    if group.rank == 1:
        time.sleep(30)
    group.all_reduce(torch.zeros(1))
"""


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


def test_ranks_that_do_not_come_are_named(script):
    code = "import datetime, syncnorm.rendezvous as r; r.PATIENCE = datetime.timedelta(seconds=2)\n"
    code += textwrap.dedent(INIT.format(backend="gloo"))
    job = launch("alone", 1, script(code), RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    assert job.stdout == "RuntimeError expected 3 ranks to join within 2 s, missing: 1, 2\n"


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
def test_what_torchrun_sets_stands_in_the_environment(script, launcher, backend, expected):
    job = launch(launcher, 3, script(WRITTEN_FOR_TORCHRUN.format(backend=backend)))
    assert lines(job) == [f"{rank} 3 {rank} 3 {expected} 1.0" for rank in range(3)]


@pytest.mark.parametrize("backend", ["gloo", pytest.param("mpi", id="over mpi")])
def test_and_alone(script, backend):
    job = launch("alone", 1, script(WRITTEN_FOR_TORCHRUN.format(backend=backend)))
    assert lines(job) == [f"0 1 0 1 {'mpi4py' if backend == 'mpi' else backend} 0.0"]


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
    assert job.stdout.count("RuntimeError expected a group of 2 ranks, as torchrun tells") == 2
    assert job.stdout.count("got this process alone from MPI") == 2


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


@pytest.mark.parametrize("timeout", [0, -1.5])
def test_a_timeout_that_is_not_positive(timeout):
    with pytest.raises(ValueError, match=f"expected a positive timeout, got {timeout}"):
        syncnorm.init(timeout=timeout)


@pytest.mark.parametrize("backend", [*["nccl"] * (not torch.cuda.is_available())])
def test_nccl_where_there_is_none(script, backend):
    job = launch("alone", 1, script(INIT.format(backend=backend)))
    assert job.stdout.startswith("RuntimeError nccl was asked for, and this torch has no CUDA device or no NCCL: pip")
