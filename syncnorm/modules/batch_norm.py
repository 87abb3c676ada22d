"""Synchronized BatchNorm as a module, and the classes of converted layers."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import is_lazy

from .. import arguments, functional
from ..communicators import LocalCommunicator, ProcessGroupLike, communicator
from .process_group import Grouped, ProcessGroupReference

__all__ = ["ORIGIN", "LazySyncBatchNorm", "SyncBatchNorm", "class_after_conversion"]

ORIGIN = "_converted_from"  # attribute of a converted layer: its class and torch process group before


class SyncBatchNorm(Grouped, _BatchNorm):
    """Batch normalization by the statistics of the whole batch, wherever its shards live.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

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
        activation: None, "relu", "leaky_relu" (slope 0.01), "silu" or "gelu_tanh", in the same pass over the data.
        inplace: write the output over the input, for activation None or "leaky_relu" and no residual; see
            `syncnorm.functional.sync_batch_norm` for what each of them keeps for backward.

    Collectives: in training on a group of more than one rank, one all-reduce of 2C + 1 float64 in forward and one of
    2C in backward (none if the input needs no gradient), which all ranks of the group must reach. In the first two
    forwards, also one all-gather of 512 bytes, by which the ranks compare which layer they are in. Otherwise none.

    Raises:
        DesyncError: on every rank; the ranks are in different layers, or their inputs differ in C or dtype.
        ValueError: the activation is unknown or cannot be in place; the input has not C channels, or the residual
            another shape; this rank is not in the group; the whole batch has one value per channel.
        TypeError: the input is not floating point, or the residual of another dtype; `eps` is read from a layer with an
            activation; an argument of the constructor has the wrong type.
        RuntimeError: a parameter or the residual is on another device than the input; the input cannot be written over.

    Source: Ioffe and Szegedy, Batch Normalization, 2015.
    """

    activation: str | None = None  # as of a converted BatchNorm, or one pickled before there were activations
    inplace: bool = False

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
        activation: str | None = None,
        inplace: bool = False,
    ):
        arguments.check_flags(affine=affine, track_running_stats=track_running_stats, bias=bias, inplace=inplace)
        arguments.check_numbers(eps=eps)
        arguments.check_numbers_or_none(momentum=momentum)
        arguments.check_factory_arguments(device, dtype)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        arguments.check_activation(activation, inplace)
        self.activation, self.inplace = activation, inplace
        self.process_group = process_group

    @property
    def eps(self) -> float:
        """What is added to the variance. Raises TypeError for a layer with an activation.

        Code reads `eps` to fold a BatchNorm into the layer before it, or to put another norm in its place. Either would
        drop the activation. `vars(layer)["eps"]` is the value of any layer.
        """
        if self.activation is not None:
            raise TypeError(
                f"expected a norm without an activation where eps is read, got activation={self.activation!r}: code "
                "that folds or replaces this layer would drop the activation. Call "
                "syncnorm.revert_sync_batchnorm(model) first, or construct the layer without an activation. "
                "vars(layer)['eps'] is the value"
            )
        return vars(self)["eps"]  # type: ignore[no-any-return]

    @eps.setter
    def eps(self, eps: float) -> None:
        vars(self)["eps"] = eps

    def __dir__(self) -> list[str]:
        """Return the names of all attributes that can be read, which torch.jit and inspect do one after the other."""
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return names if self.activation is None else [name for name in names if name != "eps"]

    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize `input`, (N, C, *), and in training move the running statistics.

        Only the positions where `mask`, (N, *) or (N, 1, *), is true (or 1) count in them; those of a fraction, which
        must not be negative, count by that. See `syncnorm.functional.sync_batch_norm`.
        `residual`, of the input's shape and dtype, is added before the activation.
        """
        if isinstance(input, fx.Proxy) and self._is_whole(input):
            return self._node(input, residual=residual, mask=mask)
        if isinstance(input, Tensor):
            self._check_input_dim(input)
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
            vars(self)["eps"],
            num_batches_tracked=self.num_batches_tracked if tracks else None,
            process_group=self._group_of_the_batch(input, residual, mask) if self.training else _ALONE,
            mask=mask,
            residual=residual,
            activation=self.activation,
            inplace=self.inplace,
        )

    def _group_of_the_batch(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> ProcessGroupLike:
        """Return the ranks that share the batch; at the first calls these compare which layer they are in."""
        given = self._group.resolve()
        if torch.compiler.is_compiling():
            return given
        group = communicator() if given is None else given
        if not self._group.history.is_complete(group):
            arguments.check_batch_norm_arguments(  # before the ranks compare anything
                *(input, self.running_mean, self.running_var, self.weight, self.bias),
                *(True, self.momentum, vars(self)["eps"], self.num_batches_tracked),
            )
            arguments.parse_mask(mask, input)
            arguments.parse_epilogue(input, self.weight, self.bias, residual, self.activation, self.inplace)
            if not functional.without_values(input):
                self._group.history.check_call(self, input, group)
        return given if isinstance(group, LocalCommunicator) else group

    def reset_parameters(self) -> None:
        """Set the running statistics to mean 0, var 1, weight to 1 and bias to 0."""
        self.reset_running_stats()
        self._reset_affine()

    def extra_repr(self) -> str:
        """Return the arguments that the module was made with."""
        return (
            f"{self.num_features}, eps={vars(self)['eps']}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
            + (f", activation={self.activation}" if self.activation else "")
            + (", inplace=True" if self.inplace else "")
            + self._ranks()
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """Take any number of axes from two on; the class of a converted layer has its own check."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickle or a copy, and the class of a converted layer, which the pickle does not name."""
        kind = type(self)
        if ORIGIN in state and kind in (SyncBatchNorm, LazySyncBatchNorm):
            kind = class_after_conversion(state[ORIGIN][0], is_lazy=kind is LazySyncBatchNorm)
        if kind is type(self):
            super().__setstate__(state)  # type: ignore[no-untyped-call]
        else:
            self.__class__ = kind
            self.__setstate__(state)

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
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: ProcessGroupLike = None, *, fuse: bool = False
    ) -> nn.Module:
        """Return `module` with its BatchNorm layers synchronized: `syncnorm.convert_sync_batchnorm`."""
        from ..convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group, fuse=fuse)


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
        activation: str | None = None,
        inplace: bool = False,
    ):
        arguments.check_flags(affine=affine, track_running_stats=track_running_stats, bias=bias, inplace=inplace)
        arguments.check_numbers(eps=eps)
        arguments.check_numbers_or_none(momentum=momentum)
        arguments.check_factory_arguments(device, dtype)
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        arguments.check_activation(activation, inplace)
        self.activation, self.inplace = activation, inplace
        self.process_group = process_group

    def initialize_parameters(self, input: Tensor, **others: Any) -> None:
        """Materialize parameters and buffers for the channels of `input`, (N, C, *); `others` are forward's."""
        if not self.has_uninitialized_params():
            return
        arguments.check_channel_axis(input)
        self.num_features = input.shape[1]
        for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
            if tensor is not None and is_lazy(tensor):
                tensor.materialize((self.num_features,))
        self.reset_parameters()


def class_after_conversion(original: type[Any], *, is_lazy: bool) -> type[SyncBatchNorm]:
    """Return the class of a converted layer that was an `original`; a lazy one is another once it has met its input."""
    has_met_input = issubclass(original, _LazyNormBase) and not is_lazy
    kind: Any = original.cls_to_become if has_met_input else original
    return _synchronized(kind)


@functools.cache
def _synchronized(original: type[Any]) -> type[SyncBatchNorm]:
    """Return a subclass of both `original` and SyncBatchNorm.

    Methods are looked up in `original`, then in SyncBatchNorm, then in torch's _BatchNorm. So SyncBatchNorm.forward
    replaces torch's, and all that `original` defines itself stays: its check of the input, its methods and attributes.
    For torch.nn.SyncBatchNorm it is SyncBatchNorm alone, since DistributedDataParallel refuses torch's on CPUs.
    """
    lazy = issubclass(original, _LazyNormBase)
    base: type[Any] = LazySyncBatchNorm if lazy else SyncBatchNorm
    if issubclass(original, nn.SyncBatchNorm) or issubclass(base, original):
        return base

    def __new__(cls: type[Any], *_: Any, **__: Any) -> Any:  # noqa: N807
        self = super(kind, cls).__new__(cls)
        vars(self)[ORIGIN] = original, ProcessGroupReference(None)
        return self

    def __reduce_ex__(self: SyncBatchNorm, protocol: Any) -> Any:  # noqa: N807
        constructor, given, *state = super(kind, self).__reduce_ex__(protocol)
        if type(self) is kind:  # and no subclass, such as that of a parametrized layer
            constructor, given = base, () if lazy else (0,)  # __setstate__ gives it this class again
        return constructor, given, *state

    def fill(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = base.__module__
        namespace["__qualname__"] = f"{base.__qualname__}[{original.__qualname__}]"
        namespace["__doc__"] = base.__doc__
        namespace["__new__"], namespace["__reduce_ex__"] = __new__, __reduce_ex__
        if lazy:
            namespace["cls_to_become"] = _synchronized(original.cls_to_become)

    kind: type[Any] = types.new_class(base.__name__, (original, base), exec_body=fill)
    return kind


_ALONE = LocalCommunicator()
