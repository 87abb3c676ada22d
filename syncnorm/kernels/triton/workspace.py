"""Memory that reductions need while they run: partial results, and counters of the programs that have ended.

A counter is 0 before a kernel and after it. Kernels of one stream run one after another, so they share their counters.
The kernels of a CUDA graph share none with others, since several graphs may be replayed at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["counters"]

AT_FIRST = 1 << 12  # counters of a stream
OF_GRAPHS = 1 << 16  # counters of a device, each of which one kernel of one graph keeps

_of_streams: dict[tuple[int, int], Tensor] = {}
_of_graphs: dict[int, tuple[Tensor, int]] = {}  # by device, and how many are taken


def counters(device: int, number: int) -> Tensor:
    """Return so many counters, (number,) int32 or more, for the next kernel on the current stream of a device.

    Args:
        device: the index of a CUDA device; -1: the CPU, in Triton's interpreter.
        number: of counters.
    """
    if device >= 0 and torch.cuda.is_current_stream_capturing():
        return _of_graph(device, number)
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    found = _of_streams.get((device, stream))
    if found is None or len(found) < number:
        found = _of_streams[device, stream] = _zeros(device, max(number, AT_FIRST))
        if device >= 0 and device not in _of_graphs:  # now: no graph is being captured
            _of_graphs[device] = _zeros(device, OF_GRAPHS), 0
    return found


def _of_graph(device: int, number: int) -> Tensor:
    """Return counters that are the kernel's own: from the prepared ones, else set to 0 at each replay of the graph."""
    prepared, taken = _of_graphs.get(device, (None, 0))
    if prepared is None or taken + number > len(prepared):
        return _zeros(device, number)
    _of_graphs[device] = prepared, taken + number
    return prepared[taken:]


def _zeros(device: int, number: int) -> Tensor:
    with torch.inference_mode(False):  # in later steps they are used outside of it
        return torch.zeros(number, dtype=torch.int32, device="cpu" if device < 0 else f"cuda:{device}")
