"""The function that `run_ranks` sends to the ranks, with its arguments."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["pickled_call"]

MAIN = "__main__"


def pickled_call(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Return a function and its arguments as `pickle.loads` takes them on a rank.

    The ranks import the function from its file. What is defined in an interactive session is in none, so it is sent by
    value.

    Raises:
        RuntimeError: it is defined in an interactive session, and cloudpickle is not installed.
    """
    if not (_is_interactive() and getattr(fn, "__module__", "") == MAIN):
        call = pickle.dumps((fn, args))
        if not (_is_interactive() and MAIN.encode() in call):
            return call
    try:
        import cloudpickle
    except ImportError:
        raise RuntimeError(
            "expected a function and arguments that the ranks can import, got those of an interactive session, which "
            "are in no file: pip install cloudpickle, or write them to a file and import it"
        ) from None
    by_value: bytes = cloudpickle.dumps((fn, args))
    return by_value


def _is_interactive() -> bool:
    """Return whether the main program is a notebook, a prompt or `python -c`, which other processes cannot import."""
    main = sys.modules[MAIN]
    return getattr(main, "__file__", None) is None and getattr(main, "__spec__", None) is None
