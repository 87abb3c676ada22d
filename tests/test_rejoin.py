"""`init`, `destroy_process_group`, `init` again, with layers in between, under each launcher."""

import textwrap

import pytest
from launchers import launch, launch_one_by_one

SCRIPT = """
    import sys, torch, torch.distributed as dist, syncnorm

    layer = syncnorm.SyncBatchNorm(2)
    pair = None
    for time, backend in enumerate(sys.argv[1:], 1):
        if backend == "own":
            dist.init_process_group("gloo")
        group = syncnorm.init(timeout=30) if backend == "own" else syncnorm.init(backend, timeout=30)
        assert group is syncnorm.communicator()
        rank, size = group.rank, group.size
        x = torch.randn(3, 2, requires_grad=True)
        layer(x - x.detach().mean(0) + float(rank)).square().sum().backward()
        torch.testing.assert_close(layer.running_mean, torch.full((2,), (1 - 0.9**time) * (size - 1) / 2))
        if pair is not None:  # made in the group before this one
            for layer_of_pair in (pair, syncnorm.SyncBatchNorm(2, process_group=pair.process_group)):
                try:
                    layer_of_pair(x)
                except RuntimeError as error:
                    assert "got one that torch.distributed.destroy_process_group has destroyed" in str(error), error
                else:
                    raise AssertionError("a layer used a group that was destroyed")
        total = torch.ones(1)
        if dist.is_initialized():
            dist.all_reduce(total)
            pair = syncnorm.SyncBatchNorm(2, process_group=dist.new_group([0, 1])) if size == 2 else None
            if pair is not None:
                pair(x).sum().backward()
            dist.destroy_process_group()
        sys.stdout.write(f"{rank} {type(group).__name__} {total.item():g}\\n")
    if size > 1:
        assert isinstance(syncnorm.communicator(), syncnorm.communicators.LocalCommunicator)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def lines(*jobs):
    for job in jobs:
        assert job.returncode == 0, job.stderr
        assert job.stderr == ""
    return sorted(line for job in jobs for line in job.stdout.splitlines())


def expected(*names):
    return sorted(f"{rank} {name} 2" for name in names for rank in range(2))


def test_under_torchrun(script):
    job = launch("torchrun", 2, script, "auto", "gloo", "auto", "own")
    assert lines(job) == expected(*["ProcessGroupCommunicator"] * 4)


def test_under_mpirun_with_another_backend_each_time(script):
    job = launch("mpirun", 2, script, "gloo", "mpi", "auto", "gloo", "own")
    names = ["ProcessGroupCommunicator", "MpiCommunicator", "MpiCommunicator", *["ProcessGroupCommunicator"] * 2]
    assert lines(job) == expected(*names)


def test_where_rank_0_serves_the_store(script):
    jobs = launch_one_by_one(2, script, "auto", "gloo", "own")
    assert lines(*jobs) == expected(*["ProcessGroupCommunicator"] * 3)


def test_alone(script):
    names = ["ProcessGroupCommunicator", "MpiCommunicator", "LocalCommunicator", "ProcessGroupCommunicator"]
    assert lines(launch("alone", 1, script, "gloo", "mpi", "auto", "gloo")) == sorted(f"0 {name} 1" for name in names)
