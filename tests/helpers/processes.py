"""Processes with a hard timeout that leave nothing behind."""

import contextlib
import os
import signal
import subprocess


@contextlib.contextmanager
def started(*command, **options):
    """Start a command in a session of its own; after the block, kill what is left of it. Options go to Popen."""
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen([str(word) for word in command], **defaults | options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)


def run(*command, timeout, **options):
    """Run a command to its end and return the completed process. One that outlasts the timeout is killed."""
    with started(*command, **options) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def output_of(*command, timeout, **options):
    """Run a command that must succeed; return what it printed, errors included."""
    completed = run(*command, timeout=timeout, **options)
    assert completed.returncode == 0, completed.stdout
    return completed.stdout
