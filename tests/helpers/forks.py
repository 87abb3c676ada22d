"""Ranks that fork children, and what these have to say."""

from pathlib import Path

FORKED = Path(__file__).parent / "forked.py"


def check(ends, *jobs):
    said = "{'expected a collective in the process that joined the job'}"
    for job in jobs:
        assert job.returncode == 0, job.stderr
        assert "ValueError: in a child of rank" in job.stderr
        assert "ended with" not in job.stderr  # which would be a rank's report
        assert "abort" not in job.stderr
    lines = sorted(line for job in jobs for line in job.stdout.splitlines())
    assert lines == [f"rank {rank}: {ends} {said} 0" for rank in range(2)]
