"""Wait for MPI calls that were started, with a time limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

__all__ = ["overdue", "wait_until"]


def wait_until(is_complete: Callable[[], bool], limit: timedelta, who: str) -> None:
    """Return when `is_complete` says so; after `limit` raise TimeoutError, naming `who` waited."""
    deadline = time.monotonic() + limit.total_seconds()
    while not is_complete():
        if time.monotonic() > deadline:
            raise TimeoutError(overdue(who, limit))
        os.sched_yield()  # ranks may share a core


def overdue(who: str, limit: timedelta) -> str:
    """Return what is said of a call whose peers have not come in time."""
    return f"{who} waited {limit.total_seconds():g} s for its peers, then its timeout expired"
