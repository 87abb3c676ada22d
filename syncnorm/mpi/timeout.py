"""Wait for MPI calls that were started, and say which one timed out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

__all__ = ["overdue", "wait_until"]


def wait_until(is_complete: Callable[[], bool], limit: timedelta, name: str) -> None:
    """Return when `is_complete()` is true. After `limit`, raise a TimeoutError that names the call."""
    deadline = time.monotonic() + limit.total_seconds()
    while not is_complete():
        if time.monotonic() > deadline:
            raise TimeoutError(overdue(name, limit))
        os.sched_yield()  # ranks may share a core


def overdue(name: str, limit: timedelta) -> str:
    """Return the error message of a call that timed out. PyTorch's own tests look for the word timeout in it."""
    return f"{name} waited {limit.total_seconds():g} s for its peers until the timeout expired"
