"""Latency and bandwidth from measured times."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .network import Link

__all__ = ["fit"]


def fit(seconds: Mapping[int, float]) -> Link:
    """Return the link whose latency + n / bandwidth is closest to the measured seconds of messages of n bytes.

    Closest: with the smallest sum of squares of the relative differences, so that small messages count as much as
    large ones. Neither the latency nor 1 / bandwidth is negative.

    Args:
        seconds: by bytes, for two sizes or more, each the median of several samples.
    """
    if len(seconds) < 2:
        raise ValueError(f"expected the times of two message sizes or more, got {len(seconds)}")
    sizes, times = (np.array(values, dtype=float) for values in zip(*seconds.items(), strict=True))
    ones = np.ones_like(times)
    latency, per_byte = _solve(np.stack([ones, sizes], axis=1), times)
    if latency < 0:
        latency, (per_byte,) = 0.0, _solve(sizes[:, None], times)
    elif per_byte < 0:
        (latency,), per_byte = _solve(ones[:, None], times), 0.0
    return Link(float(latency), 1 / float(per_byte) if per_byte > 0 else math.inf)


def _solve(columns: np.ndarray, times: np.ndarray) -> np.ndarray:
    solution: np.ndarray = np.linalg.lstsq(columns / times[:, None], np.ones_like(times), rcond=None)[0]
    return solution
