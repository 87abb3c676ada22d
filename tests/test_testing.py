"""The tools of `syncnorm.testing`: results, failures, deaths, timeouts; and nobody left behind."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from processes import run

import syncnorm
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import CountingCommunicator, RankError, run_ranks

BACKENDS = ["gloo", pytest.param("mpi", id="mpirun")]


def describe(word, tensor):
    group = syncnorm.communicator()
    tensor += group.rank  # each rank has its own copy
    return group.rank, group.size, word, tensor, os.getpid()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_come_by_rank(backend):
    tensor = torch.zeros(2)
    results = run_ranks(describe, 3, "word", tensor, backend=backend)
    assert [result[:3] for result in results] == [(rank, 3, "word") for rank in range(3)]
    assert [result[3].tolist() for result in results] == [[rank, rank] for rank in range(3)]
    assert len({os.getpid(), *(result[4] for result in results)}) == 4
    assert tensor.tolist() == [0, 0]


def leave_a_name(path):
    (path / str(syncnorm.communicator().rank)).write_text(str(os.getpid()))


def names(path):
    return [int(file.read_text()) for file in path.iterdir()]


def assert_gone(path, world_size):
    """No process that left its id in `path` is alive."""
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in names(path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(names(path)) == world_size
    assert not any(is_alive(pid) for pid in names(path))


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def raise_on_rank_one(path):
    leave_a_name(path)
    group = syncnorm.communicator()
    group.barrier()
    if group.rank == 1:
        raise KeyError("the layer of rank 1")
    group.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_comes_back_and_the_others_are_stopped(backend, tmp_path):
    start = time.monotonic()
    with pytest.raises(KeyError, match="the layer of rank 1") as caught:
        run_ranks(raise_on_rank_one, 3, tmp_path, backend=backend, timeout=60)
    assert time.monotonic() - start < 50
    assert isinstance(caught.value.__cause__, RankError)
    assert "rank 1 of 3 raised:\nTraceback" in str(caught.value.__cause__)
    assert "in raise_on_rank_one" in str(caught.value.__cause__)
    assert_gone(tmp_path, 3)


def die_on_rank_one(path):
    leave_a_name(path)
    group = syncnorm.communicator()
    group.barrier()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_rank_is_reported(backend, tmp_path):
    with pytest.raises(RankError, match=r"rank 1: ended without a result") as caught:
        run_ranks(die_on_rank_one, 2, tmp_path, backend=backend)
    if backend == "gloo":
        assert "rank 1: ended by SIGKILL" in str(caught.value)
    assert_gone(tmp_path, 2)


def wait_on_rank_zero(path):
    leave_a_name(path)
    group = syncnorm.communicator()
    group.barrier()
    if group.rank == 0:
        time.sleep(60)
    return "done"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_stands_still_is_reported_with_its_stack(backend, tmp_path):
    for timeout in (5, 20, 50):  # a longer one if a busy machine has not started the ranks in time
        with pytest.raises(RankError) as caught:
            run_ranks(wait_on_rank_zero, 2, tmp_path, backend=backend, timeout=timeout)
        if "rank 1: returned" in str(caught.value):
            break
    assert f"rank 0: still running after {timeout} s, at" in str(caught.value)
    assert "in wait_on_rank_zero" in str(caught.value)
    assert "rank 1: returned" in str(caught.value)
    assert_gone(tmp_path, 2)


def stand_still_one_after_another(path, timeout):
    """Rank 1 cannot write where it is until shortly after the timeout, when it goes on."""
    leave_a_name(path)
    if syncnorm.communicator().rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        while not (path / "1").exists() or not (path / "1").read_text():
            time.sleep(0.01)
        pid = (path / "1").read_text()
        subprocess.Popen(["sh", "-c", f"sleep {timeout + 0.5}; kill -CONT {pid}"], start_new_session=True)
    time.sleep(60)


def test_all_stacks_are_shown_at_the_timeout(tmp_path):
    for timeout in (5, 20):  # a longer one if a busy machine has not started the ranks in time
        for name in ("0", "1"):
            (tmp_path / name).unlink(missing_ok=True)
        with pytest.raises(RankError) as caught:
            run_ranks(stand_still_one_after_another, 2, tmp_path, timeout, timeout=timeout)
        if str(caught.value).count("in stand_still_one_after_another") == 2:
            break
    for rank in range(2):
        assert f"rank {rank}: still running after {timeout} s, at" in str(caught.value)
    assert str(caught.value).count("in stand_still_one_after_another") == 2
    assert_gone(tmp_path, 2)


class UnpicklableError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def raise_unpicklable():
    raise UnpicklableError("this", "that")


def test_an_exception_that_cannot_be_pickled():
    with pytest.raises(RuntimeError, match="UnpicklableError: this and that"):
        run_ranks(raise_unpicklable, 1)


def test_functions_that_cannot_be_imported():
    with pytest.raises((AttributeError, TypeError, ValueError), match=r"(?i)pickle|local object"):
        run_ranks(lambda: None, 1)


SESSION = """
{before}
from collections import namedtuple
import syncnorm
from syncnorm.testing import run_ranks

Offset = namedtuple("Offset", "value")
scale = 10


def rank_times(offset):
    return scale * syncnorm.communicator().rank + offset.value


print(run_ranks({fn}, 2, Offset(1), backend="{backend}"))
"""


def in_a_session(*arguments, **code):
    """Run the lines in a process whose main program is in no file, as those of a notebook."""
    session = SESSION.format(**{"before": "", "fn": "rank_times", "backend": "gloo"} | code)
    if not arguments:
        return run(sys.executable, "-c", session, timeout=100)
    with tempfile.TemporaryFile("w+") as lines:
        lines.write(session)
        lines.seek(0)
        return run(sys.executable, *arguments, stdin=lines, timeout=100)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], {}),
        ([], {"backend": "mpi"}),
        ([], {"fn": "lambda offset: rank_times(offset)"}),
        (["-i", "-q"], {}),
    ],
    ids=["-c", "mpirun", "lambda", "prompt"],
)
def test_a_function_of_an_interactive_session_is_sent_by_value(arguments, code):
    pytest.importorskip("cloudpickle")
    job = in_a_session(*arguments, **code)
    assert "[1, 11]" in job.stdout, job.stdout


@pytest.mark.parametrize("fn", ["rank_times", "max"])  # the second is importable, its argument is not
def test_a_function_of_an_interactive_session_is_refused_without_cloudpickle(fn):
    job = in_a_session(before="import sys; sys.modules['cloudpickle'] = None", fn=fn)
    assert job.returncode == 1
    assert "RuntimeError: expected a function and arguments that the ranks can import, got those of an " in job.stdout
    assert "pip install cloudpickle" in job.stdout


def test_a_function_that_a_rank_cannot_import_is_an_error_of_that_rank(tmp_path, monkeypatch):
    (tmp_path / "only_once.py").write_text("def f():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_once

    (tmp_path / "only_once.py").write_text("raise KeyError('the import')\n")
    with pytest.raises(KeyError, match="the import"):
        run_ranks(only_once.f, 2)


def return_unpicklable():
    return lambda: None


def test_a_result_that_cannot_be_pickled():
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"(?i)pickle|local object"):
        run_ranks(return_unpicklable, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 0}, "expected at least one rank, got world_size=0"),
        ({"world_size": 1, "backend": "tcp"}, "expected backend .* got 'tcp'"),
    ],
)
def test_arguments_that_make_no_group(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_ranks(environment, **arguments)


def environment():
    return os.environ.get("SYNCNORM_TEST_VARIABLE"), torch.get_num_threads(), dist.get_backend()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_have_the_environment_and_their_share_of_the_cores(backend, monkeypatch):
    monkeypatch.setenv("SYNCNORM_TEST_VARIABLE", backend)
    cores = len(os.sched_getaffinity(0))
    name = {"gloo": "gloo", "mpi": "mpi4py"}[backend]
    assert run_ranks(environment, 2, backend=backend) == [(backend, max(1, cores // 2), name)] * 2


def test_calls_are_counted_with_their_bytes():
    group = CountingCommunicator(LocalCommunicator())
    group.all_reduce(torch.zeros(3, dtype=torch.float64))
    group.broadcast(torch.zeros(3, dtype=torch.int8))
    group.all_gather(torch.zeros(2, 2))
    group.all_gather_object("anything")
    group.barrier()
    part = group.split(0)
    assert part.calls == []
    part.barrier()
    assert part.calls == [("barrier", 0)]
    assert group.calls == [
        ("all_reduce", 24),
        ("broadcast", 3),
        ("all_gather", 16),
        ("all_gather_object", 0),
        ("barrier", 0),
        ("split", 0),
    ]
