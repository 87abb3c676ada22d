"""The marker `ranks` of the pytest plugin, and `split_batch`, as a user's tests take them."""

import re
import sys
import textwrap

import pytest
import torch
from processes import run

from syncnorm.testing import run_ranks as start_ranks
from syncnorm.testing import split_batch

TESTS = """
    import os
    import time

    import pytest
    import torch

    import syncnorm
    from syncnorm.testing import split_batch


    @pytest.fixture
    def whole():
        return torch.arange(10.0)


    @pytest.mark.ranks(2, 3)
    @pytest.mark.parametrize("scale", [1.0, 2.0])
    def test_sum(tmp_path, scale, whole, world_size):
        group = syncnorm.communicator()
        assert group.size == world_size
        total = group.all_reduce(scale * split_batch(whole).sum())
        assert total.item() == scale * 45
        (tmp_path / str(group.rank)).touch()


    class TestInAClass:
        @pytest.mark.ranks(2, backend="mpi")
        def test_mpi(self):
            assert type(syncnorm.communicator()).__name__ == "MpiCommunicator"


    def test_with_the_fixture(run_ranks):
        assert run_ranks(os.getpid, 2) != [os.getpid()] * 2


    @pytest.mark.ranks(2)
    def test_is_wrong_on_a_rank():
        values = [5, 7, syncnorm.communicator().rank]
        assert values == [5, 7, 0]


    def assert_zero(value):
        assert value == 0


    def test_is_wrong_under_mpirun(run_ranks):
        run_ranks(assert_zero, 2, 1 + 1, backend="mpi")


    @pytest.mark.ranks(2)
    def test_crashes_on_a_rank():
        if syncnorm.communicator().rank == 1:
            os._exit(3)


    @pytest.mark.ranks(2, timeout=5)
    def test_hangs():
        if syncnorm.communicator().rank == 1:
            time.sleep(60)


    @pytest.mark.ranks(2)
    def test_takes_what_no_process_can_send(capsys):
        pass
"""
FAILED = {  # the test, and what is said of it
    "test_is_wrong_on_a_rank[2ranks]": r"rank 1 of 2 raised:(.|\n)*AssertionError: assert \[5, 7, 1\] == \[5, 7, 0\]",
    "test_is_wrong_under_mpirun": r"AssertionError: assert 2 == 0",
    "test_crashes_on_a_rank[2ranks]": r"rank 1: exit status 3",
    "test_hangs[2ranks]": r"rank 1: still running after 5 s, at",
    "test_takes_what_no_process_can_send[2ranks]": r"fixtures that can be pickled in a test on ranks, got capsys",
}


@pytest.mark.parametrize("processes", ["0", "2"])
def test_the_marker(tmp_path, processes):
    (tmp_path / "test_of_a_user.py").write_text(textwrap.dedent(TESTS))
    command = [sys.executable, "-m", "pytest", "-v", "--strict-markers", "-n", processes, "-p", "no:cacheprovider"]
    job = run(*command, "--basetemp", tmp_path / "temporary", cwd=tmp_path, timeout=110)
    assert job.returncode == 1, job.stdout
    assert "5 failed, 6 passed" in job.stdout, job.stdout
    for name, said in FAILED.items():
        assert f"FAILED test_of_a_user.py::{name}" in job.stdout
        assert re.search(said, job.stdout), job.stdout
    folders = [folder for folder in (tmp_path / "temporary").rglob("test_sum_*") if not folder.is_symlink()]
    touched = [len(list(folder.iterdir())) for folder in folders]
    assert sorted(touched) == [2, 2, 3, 3]


def test_the_plugin_can_be_left_out(tmp_path):
    """Then pytest does not import torch at its start."""
    (tmp_path / "test_start.py").write_text(
        "import sys\n\n\ndef test_start():\n    assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    assert run(*command, "-p", "no:syncnorm", cwd=tmp_path, timeout=60).returncode == 0
    assert run(*command, cwd=tmp_path, timeout=60).returncode == 1


def shards(batch, sizes):
    return split_batch(batch, sizes)


@pytest.mark.parametrize(("sizes", "expected"), [(None, [3, 2, 2]), ([0, 6, 1], [0, 6, 1])])
def test_a_batch_is_split(sizes, expected):
    batch = {"x": torch.arange(7), "both": (torch.arange(14).view(7, 2), "a word")}
    found = start_ranks(shards, 3, batch, sizes)
    assert [len(shard["x"]) for shard in found] == expected
    assert torch.equal(torch.cat([shard["x"] for shard in found]), batch["x"])
    assert torch.equal(torch.cat([shard["both"][0] for shard in found]), batch["both"][0])
    assert {shard["both"][1] for shard in found} == {"a word"}


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match=r"the same number of samples, got \[2, 3\]"):
        split_batch([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match=r"expected 1 sizes that add up to 2, got \[1\]"):
        split_batch(torch.zeros(2), [1])
