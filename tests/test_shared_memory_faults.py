"""Ranks that do not come to an all-reduce in shared memory: the others notice, and say who and where it was."""

import re
import textwrap

import pytest
from launchers import launch_one_by_one

HEAD = """
    import os, signal, sys, time, torch, torch.distributed as dist, syncnorm
    from syncnorm.communicators import segment
    from syncnorm.communicators.label import Label

    segment.FOLDER = {folder!r}
    group = syncnorm.init("gloo", timeout={timeout})
    ones, layer = torch.ones(3), Label(1, 7, True, b"layer1.0.bn2 of ResNet (SyncBatchNorm no. 7)")
    processes = group.all_gather_object(os.getpid())
    group.all_reduce(ones, layer)
    assert group.route() == "in shared memory"
    last = group.rank == group.size - 1
    begin = time.monotonic()
"""
LAST = r"its last all_reduce was of 3 float32 of call 7 of layer1\.0\.bn2 of ResNet \(SyncBatchNorm no\. 7\), backward"


@pytest.fixture
def run(tmp_path):
    """Return what runs code on ranks of its own and returns how each ended; nothing may be left of them."""
    folder = tmp_path / "memory"
    folder.mkdir()

    def run(code, ranks=2, timeout=60):
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(HEAD.format(folder=str(folder), timeout=timeout)) + textwrap.dedent(code))
        jobs = launch_one_by_one(ranks, script, timeout=90)
        assert list(folder.iterdir()) == []
        return jobs

    return run


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_was_killed_is_noticed_long_before_the_timeout(run, ranks):
    jobs = run(
        """
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            group.all_reduce(ones, layer)
        finally:
            assert time.monotonic() - begin < 30
        """,
        ranks,
    )
    assert jobs[-1].returncode == -9
    for rank, job in enumerate(jobs[:-1]):
        error = (
            rf"DesyncError: all_reduce on rank {rank} of {ranks}: rank {ranks - 1} has ended \(process \d+\); {LAST}"
        )
        assert re.search(error, job.stderr), job.stderr
        assert re.search(rf"rank {ranks - 1} on .*: MISSING: no answer", job.stderr)


def test_a_rank_that_was_stopped_is_named_at_the_timeout(run):
    jobs = run(
        """
        if last:
            os.kill(os.getpid(), signal.SIGSTOP)
            sys.exit()
        try:
            group.all_reduce(ones, layer)
        except syncnorm.DesyncError as error:
            sys.stdout.write(str(error))
        try:
            group.all_reduce(ones)
        except syncnorm.DesyncError as error:
            sys.stdout.write("\\n" + str(error))
        if group.rank == 0:
            time.sleep(3)  # until all have reported
            os.kill(processes[-1], signal.SIGCONT)
        """,
        ranks=3,
        timeout=2,
    )
    for rank, job in enumerate(jobs[:2]):
        waited = rf"all_reduce on rank {rank} of 3: waited 2 s for its peers until the timeout expired\n"
        assert re.search(waited + rf"  rank 2 did not come; {LAST}", job.stdout), job.stdout + job.stderr
        assert "expected a communicator whose calls have all succeeded, got one that failed at " in job.stdout


def test_a_rank_that_has_left_the_group(run):
    jobs = run(
        """
        if last:
            dist.destroy_process_group()
            time.sleep(10)  # its process goes on
            sys.exit()
        try:
            group.all_reduce(ones)
        finally:
            assert time.monotonic() - begin < 30
        """
    )
    assert re.search(rf"DesyncError: all_reduce on rank 0 of 2: rank 1 has left the group; {LAST}", jobs[0].stderr)


def test_a_rank_that_ends_with_an_error(run):
    jobs = run(
        """
        if last:
            raise ValueError("enough")
        group.all_reduce(ones)
        """
    )
    assert re.search(r"DesyncError: all_reduce on rank 0 of 2: rank 1 has (left the group|ended)", jobs[0].stderr)
    assert re.search(r"rank 1 on .*: ended with ValueError: enough", jobs[0].stderr)


def test_an_interrupt_ends_the_wait(run):
    jobs = run(
        """
        import threading

        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for jobs in the background
        if last:
            time.sleep(5)
            sys.exit()
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            group.all_reduce(ones)
        except KeyboardInterrupt:
            sys.stdout.write("interrupted\\n")
        try:
            group.all_reduce(ones)
        except syncnorm.DesyncError as error:
            sys.stdout.write(str(error))
        """
    )
    assert jobs[0].stdout.startswith("interrupted\nexpected a communicator whose calls have all succeeded")
    assert "all_reduce: KeyboardInterrupt" in jobs[0].stdout


PAIR = """
    from datetime import timedelta
    pair = syncnorm.communicator(dist.new_group([0, 1], timeout=timedelta(seconds=2)))
"""


def test_ranks_that_never_come_to_their_first_call(run):
    jobs = run(
        PAIR
        + """
    if last:
        time.sleep(6)
        sys.exit()
    pair.all_reduce(ones)
    """
    )
    assert "DesyncError: all_reduce on rank 0 of 2: waited 2 s for rank 1 until the timeout expired" in jobs[0].stderr


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"its process \d+ has ended"),
        ("sys.exit(3)", r"ended by sys\.exit\(3\)"),
        ("raise ValueError('enough')", r"ended with ValueError: enough"),
    ],
    ids=["killed", "left", "raised"],
)
def test_a_rank_that_ends_before_its_first_call_is_noticed_long_before_the_timeout(run, end, reason):
    jobs = run(
        f"""
    pair = syncnorm.communicator(dist.new_group([0, 1]))  # with the timeout of the job
    if last:
        {end}
    try:
        pair.all_reduce(ones)
    finally:
        assert time.monotonic() - begin < 30
    """
    )
    assert re.search(rf"DesyncError: all_reduce on rank 0 of 2: rank 1 does not come: {reason}\n", jobs[0].stderr)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["put", "get", "exchange"])
def test_ranks_that_are_killed_while_they_agree_leave_no_file(run, rank, moment):
    """One rank is killed at a step of it, once the file is there."""
    jobs = run(
        PAIR
        + f"""
    def kill(frame, event, _):
        if event == "call" and frame.f_code.co_name == "{moment}" and "created" <= frame.f_locals.get("key", "") < "q":
            os.kill(os.getpid(), signal.SIGKILL)

    group.barrier()  # all have made the pair
    if group.rank == {rank}:
        sys.setprofile(kill)
    pair.all_reduce(ones)
    """
    )
    assert jobs[rank].returncode == -9
    assert f"DesyncError: all_reduce on rank {1 - rank} of 2" in jobs[1 - rank].stderr


def test_ranks_without_batches_notice_that_one_with_batches_was_killed(run):
    """Rank 0 has no batches, rank 1 is killed, and rank 2 waits for both."""
    jobs = run(
        """
        layer = syncnorm.SyncBatchNorm(3)
        try:
            with syncnorm.join(layer):
                for step in range(3 if group.rank else 0):
                    layer(torch.randn(2, 3))
                    if step == 1 and group.rank == 1:
                        os.kill(os.getpid(), signal.SIGKILL)
        finally:
            assert time.monotonic() - begin < 30
        """,
        ranks=3,
    )
    for rank in (0, 2):
        assert re.search(rf"DesyncError: all_reduce on rank {rank} of 3: rank 1 has ended", jobs[rank].stderr)
