"""The norms as modules: parameters, buffers, and one call of `syncnorm.functional`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import is_lazy

from . import functional, validate
from .communicators import Communicator, LocalCommunicator, ProcessGroupLike, communicator

__all__ = ["LazySyncBatchNorm", "SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """Batch normalization by the statistics of the whole batch, wherever its shards live.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In training, mean and (biased) var of each channel are taken over the batch and trailing axes of the inputs of
    *all* ranks of `process_group`; the running statistics move towards them by `momentum` (var unbiased, by the
    global count) and stay bit for bit the same on every rank. In eval the running statistics are used. With
    `track_running_stats=False` eval uses the statistics of this rank's input alone, since eval never communicates.

    Gradients are those of the sum of the ranks' losses, and parameter gradients are this rank's share, as
    DistributedDataParallel expects. State-dict keys are those of `torch.nn.BatchNorm*d`, both ways. The process group
    is no part of the pickled module, and a deep copy shares it.

    Shapes: input (N, C, *) with any number of trailing axes, which may differ between ranks in all but C; N may be 0.
    The output has the input's shape, dtype and memory format. float16 and bfloat16 inputs have float32 statistics.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None: their cumulative average.
        affine: learn weight (and bias), (C,) each.
        track_running_stats: keep running statistics.
        process_group: the ranks that share the batch: a torch.distributed ProcessGroup, a one-dimensional DeviceMesh,
            an mpi4py Comm, a `syncnorm.Communicator`, or None: what `syncnorm.init()` made, else torch.distributed's
            default group, else this process alone.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: learn the bias, if affine.

    Collectives: in training on a group of more than one rank, one all-reduce of 2C + 1 float64 in forward and one of
    2C in backward (none if the input needs no gradient), which all ranks of the group must reach. Otherwise none.

    Raises:
        ValueError: the input has not C channels; this rank is not in the group; the whole batch has one value per
            channel.
        TypeError: the input is not floating point.
        RuntimeError: a parameter is on another device than the input.

    Source: Ioffe and Szegedy, Batch Normalization, 2015.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group

    @property
    def process_group(self) -> ProcessGroupLike:
        """The ranks that share the batch, as they were given."""
        return self._group.given

    @process_group.setter
    def process_group(self, process_group: ProcessGroupLike) -> None:
        self._group = ProcessGroupReference(process_group)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C, *), and in training move the running statistics."""
        tracks = self.track_running_stats or not self.training
        running_mean = self.running_mean if tracks else None
        return functional.sync_batch_norm(
            input,
            running_mean,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.training or running_mean is None,
            self.momentum,
            self.eps,
            num_batches_tracked=self.num_batches_tracked if tracks else None,
            process_group=self._group.resolve() if self.training else _ALONE,
        )

    def reset_parameters(self) -> None:
        """Set the running statistics to mean 0, var 1, weight to 1 and bias to 0."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Return the arguments that the module was made with."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load as torch does; if that raises, leave the layer's tensors as they were."""
        kept = self._snapshot()
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError:
            self._restore(kept)
            raise

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load as torch does for one layer of a model; if a shape does not fit, leave its tensors as they were."""
        kept, error_msgs = self._snapshot(), args[-1]
        known = len(error_msgs)
        super()._load_from_state_dict(*args, **kwargs)
        if len(error_msgs) > known:
            self._restore(kept)

    def _snapshot(self) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
        """Return where each tensor of the layer stands, the tensor, and a copy of its values."""
        owners: tuple[dict[str, Any], ...] = (self._parameters, self._buffers)
        tensors = [(owner, name, tensor) for owner in owners for name, tensor in owner.items() if tensor is not None]
        return [(owner, name, tensor, tensor.clone()) for owner, name, tensor in tensors if not is_lazy(tensor)]

    @torch.no_grad()
    def _restore(self, kept: list[tuple[dict[str, Any], str, Tensor, Tensor]]) -> None:
        for owner, name, tensor, values in kept:
            owner[name] = tensor.copy_(values)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: ProcessGroupLike = None) -> nn.Module:
        """Return `module` with its BatchNorm layers synchronized: `syncnorm.convert_sync_batchnorm`."""
        from .convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A `SyncBatchNorm` that takes `num_features` from its first input, (N, C, *), and becomes a SyncBatchNorm then.

    Arguments, shapes, collectives and errors are those of `SyncBatchNorm`, without num_features. An empty shard tells
    C as well as a full one does.
    """

    cls_to_become = SyncBatchNorm

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroupLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group

    def initialize_parameters(self, input: Tensor) -> None:
        """Materialize parameters and buffers for the channels of `input`, (N, C, *)."""
        if not self.has_uninitialized_params():
            return
        validate.channel_axis(input)
        self.num_features = input.shape[1]
        for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
            if tensor is not None and is_lazy(tensor):
                tensor.materialize((self.num_features,))
        self.reset_parameters()


class ProcessGroupReference:
    """A module's process group: shared by deep copies and left out of pickles, which another job may load."""

    def __init__(self, given: ProcessGroupLike):
        self.given = given
        self._resolved: Communicator | None = None
        with contextlib.suppress(ValueError):  # a rank outside the group may build the model, but not train it
            self.resolve()

    def resolve(self) -> Communicator | None:
        """Return the communicator of what was given, resolved once; None stays None: it may become a group later."""
        if self._resolved is None and self.given is not None:
            self._resolved = communicator(self.given)
        return self._resolved

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroupReference:
        return self

    def __reduce__(self) -> tuple[type[ProcessGroupReference], tuple[None]]:
        return ProcessGroupReference, (None,)


_ALONE = LocalCommunicator()
