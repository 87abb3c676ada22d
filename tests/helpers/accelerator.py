"""The device of the gpu tier: a CUDA device or, in a rehearsal, the CPU with Triton's interpreter.

A rehearsal runs the same tests on small tensors. Only what stands under `if CUDA` in this file needs a device.
"""

import contextlib
import os
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.cuda.is_available()
REHEARSAL = not CUDA and os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("SYNCNORM_KERNELS") == "triton"
DEVICE = "cuda" if CUDA else "cpu"
SECOND_DEVICE = "cuda:1" if CUDA else "cpu"
BACKEND = "nccl" if CUDA else "gloo"
runtime = torch.cuda if CUDA else torch.cpu  # Stream, stream, current_stream, synchronize, current_device
KERNELS_OF_EXAMPLES = {} if CUDA else {"SYNCNORM_KERNELS": "reference"}  # whose tensors are too large to interpret
WARM_UPS = 3  # calls of a function before it is captured in a graph
HOLD = 100_000_000  # clock cycles of the device, about 60 ms

needs_device = pytest.mark.skipif(
    not (CUDA or REHEARSAL),
    reason="NOT TESTED: no CUDA device; ./launch/gpu --rehearse runs this in Triton's interpreter",
)
needs_two_devices = pytest.mark.skipif(
    CUDA and torch.cuda.device_count() < 2, reason="NOT TESTED: takes 2 CUDA devices, found 1"
)


def needs_memory(gigabytes):
    """Return the mark of a test that takes so much memory of the device. A rehearsal does not."""
    total = torch.cuda.get_device_properties(0).total_memory >> 30 if CUDA else gigabytes
    return pytest.mark.skipif(
        total < gigabytes, reason=f"NOT TESTED: takes {gigabytes} GB of device memory, found {total}"
    )


def size(real, tiny):
    """Return the size for a CUDA device, or that for a rehearsal."""
    return real if CUDA else tiny


@contextlib.contextmanager
def without_waiting():
    """Raise if the host waits for the device in the block. That it would raise is checked first."""
    if not CUDA:
        yield
        return
    one = torch.ones((), device=DEVICE)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchroniz"):
            one.item()
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def captured(step):
    """Capture step() in a CUDA graph; yield its outputs, which hold nothing before a replay, and the replay.

    The step runs WARM_UPS times before, and not while it is captured. In a rehearsal a replay calls it.
    """
    if CUDA:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has a thread that queries events
            outputs = step()
        try:
            yield outputs, graph.replay
        finally:
            torch.cuda.synchronize()
            graph.reset()  # before the NCCL communicator in it is destroyed
        return
    for _ in range(WARM_UPS):
        outputs = step()
    outputs = [torch.full_like(t.detach(), torch.nan) for t in outputs]

    def replay():
        for output, result in zip(outputs, step(), strict=True):
            output.copy_(result.detach())

    yield outputs, replay


def at_once(*functions):
    """Call each function on a stream of its own, and let the device begin when all are queued. Return the results."""
    if CUDA:
        torch.cuda._sleep(HOLD)
    results = []
    for function in functions:
        stream = runtime.Stream()
        stream.wait_stream(runtime.current_stream())
        with runtime.stream(stream):
            results.append(function())
    runtime.synchronize()
    return results


@contextlib.contextmanager
def memory_left(nbytes):
    """Leave so much memory to the block: beyond that an allocation raises torch.OutOfMemoryError."""
    if not CUDA:
        with _Allowance(nbytes):
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class _Allowance(TorchFunctionMode):
    """Raise as a CUDA device does once torch.empty and torch.empty_like have given away so many bytes."""

    def __init__(self, nbytes):
        self.left = nbytes

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.empty_like):
            self.left -= result.nbytes
            if self.left < 0:
                raise torch.OutOfMemoryError("out of memory in a rehearsal")
        return result


def memory_in_use():
    """Return the bytes of all tensors on the device; 0 in a rehearsal."""
    return torch.cuda.memory_allocated() if CUDA else 0


def compiled(model, mode):
    """Return torch.compile of the model without graph breaks; in a rehearsal without a compiler's code."""
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, **({"mode": mode} if CUDA else {"backend": "aot_eager"}))


@contextlib.contextmanager
def compiler_may_warn():
    """Ignore warnings that do not come from the package: torch's compiler issues some about torch itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module=r"syncnorm\b")
        yield
