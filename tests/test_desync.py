"""Roll calls, in jobs whose ranks are started one by one: no launcher ends the others after one has failed."""

import builtins
import importlib
import inspect
import re
import socket
import textwrap
import types

import pytest
from launchers import launch_one_by_one

from syncnorm.job.desync import current_location, is_peer_failure

HOST = socket.gethostname()


@pytest.fixture
def run(tmp_path):
    """Return what runs code on ranks of its own and returns how each ended. The code finds `group` and `ones`."""

    def run(code, ranks=2, timeout=30):
        script = tmp_path / "script.py"
        head = "import os, signal, sys, time, torch, torch.distributed as dist, syncnorm\n"
        head += f"group = syncnorm.init({timeout=})\nones = torch.ones(3)\ngroup.barrier()\n"
        script.write_text(head + textwrap.dedent(code))
        return launch_one_by_one(ranks, script, timeout=60)

    return run


def test_a_rank_that_was_killed(run):
    jobs = run("""
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        group.all_reduce(ones)
    """)
    assert jobs[1].returncode == -9
    assert "DesyncError: all_reduce on rank 0 of 2: " in jobs[0].stderr
    assert f"rank 0 on {HOST}: in all_reduce of 3 float32, at " in jobs[0].stderr
    assert f"rank 1 on {HOST}: MISSING: no answer" in jobs[0].stderr


def test_the_rank_that_served_the_store_was_killed(run):
    jobs = run("""
        if group.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        group.all_reduce(ones)
    """)
    assert "DesyncError: all_reduce on rank 1 of 2: " in jobs[1].stderr
    missing = f"MISSING: rank 0 on {HOST}: no answer from the job's store at 127.0.0.1:"
    assert re.search(rf"{missing}\d+, which rank 0 serves. Rank 0 was ended", jobs[1].stderr)


def test_a_rank_that_ended_with_an_error(run):
    jobs = run("""
        if group.rank == 1:
            raise ValueError("enough\\nof that")
        group.broadcast(ones)
        group.all_gather(ones)
    """)
    assert f"rank 1 of 2 on {HOST} ended with ValueError" in jobs[1].stderr
    assert re.search(r"DesyncError: (broadcast|all_gather) on rank 0 of 2: ", jobs[0].stderr)
    assert f"rank 1 on {HOST}: ended with ValueError: enough\n" in jobs[0].stderr


def test_a_rank_that_waits_elsewhere(run):
    jobs = run(
        """
        pair = syncnorm.communicator(dist.new_group([0, 1]))
        (pair if group.rank == 0 else group).barrier()
        """,
        timeout=2,
    )
    places = [
        re.findall(rf"  (ranks? .*) on {HOST}: in (\w+), at .*script.py:7 in <module>: ", job.stderr) for job in jobs
    ]
    assert places == [[("ranks 0, 1", "barrier")]] * 2


def test_three_ranks_hear_of_the_fourth_what_it_does(run):
    jobs = run(
        """
        def load():
            time.sleep(8)

        if group.rank == 3:
            load()
        dist.all_reduce(ones)  # as DistributedDataParallel does, outside of a communicator
        """,
        ranks=4,
        timeout=2,
    )
    for job in jobs[:3]:
        assert "RuntimeError: " in job.stderr
        assert re.search(
            rf"  ranks 0, 1, 2 on {HOST}: in all_reduce of 3 float32, at .*: dist.all_reduce\(ones\)", job.stderr
        )
        assert re.search(rf"  rank 3 on {HOST}: in no collective, at .* in load: time.sleep\(8\)", job.stderr)


def test_an_error_of_the_arguments_stays_what_it_is(run):
    jobs = run("""
        try:
            group.all_reduce(torch.ones(3, dtype=torch.uint16))
        except syncnorm.DesyncError:
            sys.exit("a desync")
        except RuntimeError as error:
            sys.stdout.write(f"{error}\\n")
    """)
    for job in jobs:
        assert "Invalid scalar type" in job.stdout
        assert job.stderr == ""


def test_ranks_that_ended_in_order_say_so_after_the_first_one_served_the_store(run):
    jobs = run(
        """
        if group.rank == 0:
            sys.exit(3)
        if group.rank == 2:
            time.sleep(3)
            group.all_reduce(ones)
        """,
        ranks=3,
    )
    assert [job.returncode for job in jobs] == [3, 0, 1]
    assert f"rank 0 on {HOST}: ended by sys.exit(3)\n" in jobs[2].stderr
    assert f"rank 1 on {HOST}: ended normally\n" in jobs[2].stderr
    assert "MISSING" not in jobs[2].stderr


def test_a_rank_that_exits_while_another_waits_for_it(run):
    jobs = run("""
        if group.rank == 0:
            time.sleep(1)
            sys.exit(3)
        group.all_reduce(ones)
    """)
    assert [job.returncode for job in jobs] == [3, 1]
    assert f"rank 0 on {HOST}: ended by sys.exit(3)\n" in jobs[1].stderr


def test_control_characters_of_another_rank_are_escaped(run):
    jobs = run("""
        if group.rank == 1:
            raise ValueError("red \\x1b[31m or \\u202e not")
        group.all_reduce(ones)
    """)
    assert r"ended with ValueError: red \x1b[31m or \u202e not" in jobs[0].stderr
    assert "\x1b" not in jobs[0].stderr


def test_what_a_rank_wrote_is_not_overwritten(run):
    jobs = run("""
        from syncnorm.job.rendezvous import connect
        from syncnorm.job.desync import _write_once

        group.barrier()
        if group.rank == 1:
            raise ValueError("the truth")
        time.sleep(3)
        _write_once(connect(), "last words of 1", "another story")
        group.all_reduce(ones)
    """)
    assert f"rank 1 on {HOST}: ended with ValueError: the truth" in jobs[0].stderr
    assert "another story" not in jobs[0].stderr.replace('"another story")', "")


def test_a_typo_at_a_prompt_and_an_error_in_a_thread_end_no_rank(run):
    jobs = run("""
        import code, threading

        if group.rank == 1:
            typed = iter(["undefined", "thread.start()", "thread.join()", "group.all_reduce(ones)"])
            thread = threading.Thread(target=lambda: 1 / 0)

            def read(prompt):
                try:
                    return next(typed)
                except StopIteration:
                    raise EOFError from None

            code.interact("", read, globals(), "")
        else:
            time.sleep(2)
            report = syncnorm.job.desync.collect([1])
            group.all_reduce(ones)
            sys.stdout.write(report)
    """)
    assert [job.returncode for job in jobs] == [0, 0]
    assert "NameError: name 'undefined' is not defined" in jobs[1].stderr
    assert "ZeroDivisionError" in jobs[1].stderr
    assert "ended with" not in jobs[1].stderr
    assert f"rank 1 on {HOST}: in all_reduce of 3 float32, at " in jobs[0].stdout


def test_ranks_may_leave_one_after_the_other_in_silence(run):
    for job in run("time.sleep(3 * group.rank)"):
        assert job.returncode == 0
        assert job.stderr == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [10.77.0.1]:36242"), True),
        (RuntimeError("[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"), True),
        (TimeoutError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (RuntimeError("Invalid scalar type"), False),
    ],
)
def test_errors_that_tell_of_peers(error, told):
    assert is_peer_failure(error) == told


def test_errors_that_were_raised_in_a_collective():
    def all_reduce():
        raise RuntimeError("a word that nobody knows")

    modules = [
        {"__name__": "of_the_program"},
        {"__name__": "torch.distributed.distributed_c10d"},
        {"__name__": "a_communicator", "ISSUES_COLLECTIVES": True},
    ]
    for module, told in zip(modules, [False, True, True], strict=True):
        with pytest.raises(RuntimeError) as caught:
            types.FunctionType(all_reduce.__code__, module | {"__builtins__": builtins})()
        assert is_peer_failure(caught.value) == told


@pytest.mark.parametrize("name", ["communicators.process_group", "mpi.communicator", "mpi.process_group", "mpi.work"])
def test_modules_of_collectives_are_marked(name):
    assert importlib.import_module(f"syncnorm.{name}").ISSUES_COLLECTIVES


def test_whereabouts_are_the_line_of_the_program():
    here = current_location()
    line = inspect.currentframe().f_lineno - 1
    function = inspect.currentframe().f_code.co_name
    assert here == f"in no collective, at {__file__}:{line} in {function}: here = current_location()"
