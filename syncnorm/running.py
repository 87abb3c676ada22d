"""Which running statistics a forward pass updates.

Shapes: running_mean and running_var (C,); num_batches_tracked () int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels, transforms
from .kernels import RawMoments, Running
from .moments import Moments

__all__ = ["move", "to_move"]


def to_move(
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None, momentum: float | None
) -> Running | None:
    """Return what a forward pass in training updates in place with the moments of the whole batch.

        running = (1 - momentum) * running + momentum * batch        (variance: unbiased, by the global count)

    momentum=None weights all batches equally: momentum = 1 / num_batches_tracked, including the current batch. A batch
    without values does not change the buffers. The update is computed on the device, in float64. The moments are
    bitwise identical on every rank, so the buffers are too. A recomputation of the forward pass
    (`torch.utils.checkpoint`) does not update them, since the first forward pass did.
    """
    if running_mean is None or running_var is None:
        return None
    if not transforms.compiling() and torch._C._current_graph_task_id() != -1:
        return None  # inside a backward pass
    return Running(running_mean, running_var, num_batches_tracked, momentum)


def move(running: Running | None, moments: Moments) -> None:
    """Update the running statistics by torch's operations, which a transform or torch.compile can follow."""
    if running is None:
        return
    try:
        kernels.reference.update_running(running, RawMoments(moments.raw.detach()))
    except RuntimeError as error:  # from torch.func, which does not say which tensor it cannot update
        if not moments.followed:
            raise
        raise RuntimeError(
            "expected running statistics that the transform can update, got buffers that it does not map or receive: "
            "pass them as arguments of the transformed function, with torch.func.functional_call(model, (parameters, "
            "buffers), input), or call model.eval(), or create the layer with track_running_stats=False"
        ) from error
