"""A training step that is timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..bench.job import distributed
from ..communicators import ProcessGroupLike
from ..convert import convert_sync_batchnorm
from ..testing.whole_batch.building import build_model
from ..testing.whole_batch.training import Batch, trained_outputs

__all__ = ["TrainingStep"]


class TrainingStep:
    """A model with its optimizer on one batch: a call is a step.

    The gradient of the loss with respect to the outputs is random, and the learning rate is zero, so that all steps
    compute the same.

    Args:
        build: a function that returns the model, or "MODULE:FUNCTION".
        batch: of this rank.
        device: where the model trains.
        convert: whether to convert its BatchNorm layers.
        process_group: of the converted layers.
        sum_gradients: whether DistributedDataParallel wraps the model. Collective on all ranks of the job, as all calls
            then are.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module] | str,
        batch: Batch,
        device: torch.device,
        *,
        convert: bool = False,
        process_group: ProcessGroupLike = None,
        sum_gradients: bool = False,
    ):
        model = build_model(build).to(device)
        if convert:
            model = convert_sync_batchnorm(model, process_group)
        self.model = distributed(model, device) if sum_gradients else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)
        self.batch = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)
        self.upstream = [torch.randn_like(output) for output in trained_outputs(self.model, self.batch)]

    def __call__(self) -> None:
        """Train for one step."""
        self.optimizer.zero_grad()
        torch.autograd.backward(trained_outputs(self.model, self.batch), self.upstream)
        self.optimizer.step()
