"""Running statistics: the update rule.

Shapes: running_mean and running_var (C,); num_batches_tracked () int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import RawMoments
from .moments import Moments

__all__ = ["update"]


def update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    moments: Moments,
    momentum: float | None,
) -> None:
    """Move the buffers, in place, towards the moments of the whole batch.

        running = (1 - momentum) * running + momentum * batch        (variance: unbiased, by the global count)

    momentum=None weighs all batches equally: momentum = 1 / num_batches_tracked, the current batch counted. A batch
    without values moves nothing. It is computed on the device, in float64, from moments that are bit for bit the same
    on every rank, so the buffers stay so too. In a recomputation of the forward pass (`torch.utils.checkpoint`)
    nothing moves: the batch was counted by the first one.
    """
    if running_mean is None or running_var is None or _recomputing():
        return
    buffers = running_mean, running_var, num_batches_tracked
    if not moments.followed:
        moments.kernels.update_running(*buffers, moments.values, momentum)
        return
    try:
        moments.kernels.update_running(*buffers, RawMoments(moments.values.detach()), momentum)
    except RuntimeError as error:  # of torch.func, which says that a tensor cannot be written, but not which
        raise RuntimeError(
            "expected running statistics that the transform can update, got buffers that it does not map or own: "
            "give them to the transformed function as arguments, with torch.func.functional_call(model, (parameters, "
            "buffers), input), or call model.eval(), or make the layer with track_running_stats=False"
        ) from error


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
