"""CUDA graphs of what is timed: its kernels without the host's work between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["captured"]

WARM_UP = 3  # calls before the capture, as torch's documentation recommends

_Result = TypeVar("_Result")


def captured(run: Callable[[], _Result], device: torch.device) -> Callable[[], _Result]:
    """Return what replays a call of `run` from a CUDA graph.

    Each replay reads the memory that the captured call has read, and returns the same tensors, written anew.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the thread of NCCL makes CUDA calls meanwhile
        result = run()

    def replay() -> _Result:
        graph.replay()
        return result

    return replay
