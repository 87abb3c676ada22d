"""Memory that reductions need while they run: partial results, and counters of the programs that have ended.

A counter is 0 before a kernel and after it. Kernels of one stream run one after another, so they share their counters.
The kernels of a CUDA graph share none with others, since several graphs may be replayed at once.
"""

from __future__ import annotations

import threading

import torch
import triton
from torch import Tensor

__all__ = ["counters", "of_graph", "prepare_for_graphs"]

AT_FIRST = 1 << 12  # counters of a stream
OF_GRAPHS = 1 << 16  # counters of a device, each of which one kernel of one graph keeps
ALIGNED = 4  # counters, of 4 bytes

_of_streams: dict[tuple[int, int], Tensor] = {}
_of_graphs: dict[int, tuple[Tensor, int]] = {}  # by device, and how many are taken
_lock = threading.Lock()


def counters(device: int, number: int) -> Tensor:
    """Return so many counters, (number,) int32 or more, for the next kernel on the current stream of a device.

    Args:
        device: the index of a CUDA device; -1: the CPU, in Triton's interpreter.
        number: of counters.
    """
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return counters(device, number)
    if device >= 0 and torch.cuda.is_current_stream_capturing():
        return of_graph(device, number)
    stream = torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0
    found = _of_streams.get((device, stream))
    if found is None or len(found) < number:
        found = _of_streams[device, stream] = _zeros(device, max(number, AT_FIRST))
        if device >= 0 and device not in _of_graphs:  # now: no graph is being captured
            prepare_for_graphs(device)
    return found


def prepare_for_graphs(device: int) -> None:
    """Allocate the counters of CUDA graphs. No graph is being captured."""
    _of_graphs[device] = _zeros(device, OF_GRAPHS), 0


def of_graph(device: int, number: int) -> Tensor:
    """Return counters that are the kernel's own: from the prepared ones, else set to 0 at each replay of the graph.

    Their address is a multiple of 16, for which the kernel was compiled: it could not be compiled during a capture.
    """
    aligned = triton.cdiv(number, ALIGNED) * ALIGNED
    with _lock:
        prepared, taken = _of_graphs.get(device, (None, 0))
        if prepared is None or taken + aligned > len(prepared):
            return _zeros(device, number)
        _of_graphs[device] = prepared, taken + aligned
    return prepared[taken:]


def _zeros(device: int, number: int) -> Tensor:
    with torch.inference_mode(False):  # in later steps they are used outside of it
        return torch.zeros(number, dtype=torch.int32, device="cpu" if device < 0 else f"cuda:{device}")
