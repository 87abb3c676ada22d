"""Tools for distributed tests: run a function on several ranks, verify a model's training, and count collectives."""

from ..communicators.listeners import CollectiveCall
from .count import CollectiveCalls, count_collectives
from .counting import Call, CountingCommunicator
from .mpirun import mpirun_environment
from .ranks import RankError, run_ranks
from .split import split_batch
from .timed import TimedCommunicator
from .whole_batch import Report, assert_matches_whole_batch, verify

__all__ = [
    "Call",
    "CollectiveCall",
    "CollectiveCalls",
    "CountingCommunicator",
    "RankError",
    "Report",
    "TimedCommunicator",
    "assert_matches_whole_batch",
    "count_collectives",
    "mpirun_environment",
    "run_ranks",
    "split_batch",
    "verify",
]
