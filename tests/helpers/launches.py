"""What a step of a layer runs: kernels, and operations of torch's that compute something."""

from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import syncnorm

NOTHING_RUNS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "detach",
    "alias",
    "view",
    "slice",
    "select",
    "expand",
    "t",
}
STEP = ["moments", "normalize", "reduce_grad", "grad_input"]
LAYERS = {  # arguments of the layer, of its forward, and the shape of x
    "plain": ({}, False, (6, 5, 4, 7)),
    "without-parameters": ({"affine": False, "track_running_stats": False}, False, (6, 5, 4, 7)),
    "cumulative": ({"momentum": None}, False, (6, 5)),
    "fused": ({"activation": "relu"}, True, (3, 5, 7, 7)),
    "fused-smooth": ({"activation": "silu"}, True, (3, 8, 2, 3)),
}


def layer_and_step(name, dtype=torch.float32, parameters=torch.float32, last=False, device="cpu"):
    """Return a step of a layer, forward and backward."""
    settings, adds, shape = LAYERS[name]
    layer = syncnorm.SyncBatchNorm(shape[1], dtype=parameters, device=device, **settings)
    x, residual, dy = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    if last:
        x, residual, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, residual, dy))
    x.requires_grad_()
    residual.requires_grad_()
    inputs = [x, *layer.parameters(), *([residual] if adds else [])]

    def step():
        y = layer(x, residual=residual if adds else None)
        return torch.autograd.grad(y, inputs, dy)

    return step


class Operations(TorchDispatchMode):
    """Record the names of torch's operations, but for those that only allocate or view memory."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name not in NOTHING_RUNS:
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def of_cpu(step):
    """Call a step and return the names of the library's functions and of torch's operations that it calls."""
    from syncnorm.kernels.cpu import binding

    names = []

    def recorded(name, function):
        def call(*arguments):
            names.append(name)
            return function(*arguments)

        return mock.patch.object(binding, f"_{name}", call)

    with ExitStack() as stack:
        for name in ("moments", "normalize", "reduce_grad", "grad_input"):
            stack.enter_context(recorded(name, getattr(binding, f"_{name}")))
        stack.enter_context(Operations(names))
        step()
    return names


def of_interpreter(step):
    """Call a step and return the names of the Triton kernels and of torch's operations that it launches."""
    from triton.runtime.interpreter import GridExecutor

    names, run = [], GridExecutor.__call__

    def call(self, *args, **kwargs):
        names.append(self.fn.__name__.removesuffix("_kernel"))
        with _disable_current_modes():  # the interpreter uses torch itself
            return run(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", call), Operations(names):
        step()
    return names


def of_gpu(step):
    """Call a step and return the names of the kernels that the GPU runs, and of its copies and fills."""
    from torch.profiler import ProfilerActivity, profile

    step()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name.removesuffix("_kernel") for event in sorted(on_gpu, key=lambda event: event.time_range.start)]
