"""The norms as modules: parameters, buffers, and one call of `syncnorm.functional`."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import is_lazy

from . import functional, validate
from .agreement import History
from .communicators import Communicator, LocalCommunicator, ProcessGroupLike, communicator

ORIGIN = "_converted_from"  # attribute of a converted layer: its class and torch process group before

__all__ = ["GroupNorm", "LayerNorm", "LazySyncBatchNorm", "RMSNorm", "SyncBatchNorm"]


class _Grouped(nn.Module):
    """A module with a process group, which is no part of its pickle and is shared by its deep copies."""

    @property
    def process_group(self) -> ProcessGroupLike:
        """The ranks that share the statistics, as they were given."""
        return self._group.given

    @process_group.setter
    def process_group(self, process_group: ProcessGroupLike) -> None:
        self._group = ProcessGroupReference(process_group)

    def __prepare_scriptable__(self) -> NoReturn:
        """Raise TypeError for torch.jit.script, which asks a module by this name for what it can compile."""
        raise TypeError(
            f"expected torch.nn's own norms in torch.jit.script, got syncnorm's {type(self).__name__}: call "
            "syncnorm.revert_sync_batchnorm(model) first, load the state_dict into a model with norms of torch.nn, or "
            "call model.eval() and torch.jit.trace"
        )

    def _is_whole(self, input: fx.Proxy) -> bool:
        """Return whether a torch.fx trace can hold the call of this layer as one node, which nothing is done twice by.

        The node calls the layer by its name, with its hooks and with what a subclass does around this forward.
        """
        forward = type(self).forward
        own = forward.__module__ == __name__ and "forward" not in vars(self)
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return own and not hooks and input.tracer.root is not self  # type: ignore[attr-defined]

    def _node(self, input: fx.Proxy, **others: Any) -> Any:
        """Return the call of this layer as a node of a torch.fx trace, as for layers of torch.nn."""
        given = {name: value for name, value in others.items() if value is not None}
        path = input.tracer.path_of_module(self)  # type: ignore[attr-defined]
        return input.tracer.create_proxy("call_module", path, (input,), given)

    def _parameters_beside(self, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias as what the input is: DTensors, as in a plan of torch's own, or this rank's part."""
        weight, bias = self.weight, self.bias
        return (weight, bias) if hasattr(input, "to_local") else (_local(weight), _local(bias))  # type: ignore[arg-type, return-value]

    def _reset_affine(self) -> None:
        for parameter, initialize in ((self.weight, nn.init.ones_), (self.bias, nn.init.zeros_)):
            if parameter is not None:
                initialize(parameter)  # type: ignore[arg-type]

    def _ranks(self) -> str:
        """Return what extra_repr says of the process group."""
        return "" if self.process_group is None else f", process_group={self._group}"


class SyncBatchNorm(_Grouped, _BatchNorm):
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
        validate.flags(affine=affine, track_running_stats=track_running_stats, bias=bias, inplace=inplace)
        validate.numbers(eps=eps)
        validate.numbers_or_none(momentum=momentum)
        validate.factory_arguments(device, dtype)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        validate.known_activation(activation, inplace)
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
            validate.batch_norm_arguments(  # before the ranks compare anything
                *(input, self.running_mean, self.running_var, self.weight, self.bias),
                *(True, self.momentum, vars(self)["eps"], self.num_batches_tracked),
            )
            validate.mask_over_channels(mask, input)
            validate.epilogue(input, self.weight, self.bias, residual, self.activation, self.inplace)
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
        from .convert import convert_sync_batchnorm

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
        validate.flags(affine=affine, track_running_stats=track_running_stats, bias=bias, inplace=inplace)
        validate.numbers(eps=eps)
        validate.numbers_or_none(momentum=momentum)
        validate.factory_arguments(device, dtype)
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        validate.known_activation(activation, inplace)
        self.activation, self.inplace = activation, inplace
        self.process_group = process_group

    def initialize_parameters(self, input: Tensor, **others: Any) -> None:
        """Materialize parameters and buffers for the channels of `input`, (N, C, *); `others` are forward's."""
        if not self.has_uninitialized_params():
            return
        validate.channel_axis(input)
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
        constructor, arguments, *state = super(kind, self).__reduce_ex__(protocol)
        if type(self) is kind:  # and no subclass, such as that of a parametrized layer
            constructor, arguments = base, () if lazy else (0,)  # __setstate__ gives it this class again
        return constructor, arguments, *state

    def fill(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = base.__module__
        namespace["__qualname__"] = f"{base.__qualname__}[{original.__qualname__}]"
        namespace["__doc__"] = base.__doc__
        namespace["__new__"], namespace["__reduce_ex__"] = __new__, __reduce_ex__
        if lazy:
            namespace["cls_to_become"] = _synchronized(original.cls_to_become)

    kind: type[Any] = types.new_class(base.__name__, (original, base), exec_body=fill)
    return kind


class LayerNorm(_Grouped, nn.LayerNorm):
    """Layer normalization over the last axes, which may be split over ranks (tensor parallelism).

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Arguments and state-dict keys are those of `torch.nn.LayerNorm`, and so is the result without a process group: it
    needs no communication. With one, normalized_shape, weight and bias are this rank's shares, of any size.

    Shapes: input and output (*, *normalized_shape).

    Args:
        normalized_shape: the last axes, or the last one, as they are on this rank.
        eps: added to the variance.
        elementwise_affine: learn weight (and bias), of normalized_shape.
        bias: learn the bias, if elementwise_affine.
        device: of the parameters.
        dtype: of the parameters.
        process_group: the ranks among which the last axes are split; None: they are whole.

    Collectives: with a process group of more than one rank, one all-reduce of 2R + 1 float64 in forward, for R
    positions, and one of 2R in backward. At the first input of each size, also one all-gather of 512 bytes, by which
    the ranks compare their layer and their other axes. Otherwise none.

    Raises:
        DesyncError: on every rank; the ranks are in different layers, or their inputs differ in dtype.
        ValueError: the input does not end with normalized_shape; this rank is not in the group; on every rank, the
            ranks have unequal axes beside the last ones. Ranks that have met their size before do not compare it again.
        TypeError: the input is not floating point, or is a DTensor beside a process group; an argument of the
            constructor has the wrong type.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        process_group: ProcessGroupLike = None,
    ):
        validate.flags(elementwise_affine=elementwise_affine, bias=bias)
        validate.numbers(eps=eps)
        validate.factory_arguments(device, dtype)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (*, *normalized_shape)."""
        if isinstance(input, fx.Proxy) and self._is_whole(input):
            return self._node(input)
        shape, split = self.normalized_shape, self.process_group is not None
        weight, bias = self._parameters_beside(input)
        validate.trailing_axes(input, shape, weight, bias, split=split)  # before the ranks compare anything
        group = self._group.resolve_for(self, input, input.shape[: -len(shape)])
        return functional.layer_norm(input, shape, weight, bias, self.eps, process_group=group)

    def extra_repr(self) -> str:
        """Return the arguments that the module was made with."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}{self._ranks()}"
        )


class RMSNorm(_Grouped, nn.RMSNorm):
    """Root-mean-square normalization over the last axes, which may be split over ranks (tensor parallelism).

        y = x / sqrt(mean(x²) + eps) * weight + bias        with eps_outside: x / (sqrt(mean(x²)) + eps) * weight + bias

    Positional arguments and state-dict keys are those of `torch.nn.RMSNorm`, but eps defaults to 1e-6 instead of None.
    A bias is optional. Without a process group the norm needs no communication. With one, normalized_shape, weight and
    bias are this rank's shares, of any size.

    Shapes: input and output (*, *normalized_shape).

    Args:
        normalized_shape: the last axes, or the last one, as they are on this rank.
        eps: added to the mean square, or to its root. None: what torch adds then, torch.finfo(torch.float32).eps, or
            that of float64 for such an input. (torch 2.6 itself adds finfo(input.dtype).eps in half precision.)
        elementwise_affine: learn weight (and bias), of normalized_shape.
        device: of the parameters.
        dtype: of the parameters.
        bias: learn a bias, if elementwise_affine.
        eps_outside: add eps to the root. Both definitions are in use; a checkpoint wants the one it was trained by.
        process_group: the ranks among which the last axes are split; None: they are whole.

    Collectives: with a process group of more than one rank, one all-reduce of R + 1 float64 in forward, for R
    positions, and one of R in backward. At the first input of each size, also one all-gather of 512 bytes, by which
    the ranks compare their layer and their other axes. Otherwise none.

    Raises:
        DesyncError: on every rank; the ranks are in different layers, or their inputs differ in dtype.
        ValueError: the input does not end with normalized_shape; this rank is not in the group; on every rank, the
            ranks have unequal axes beside the last ones. Ranks that have met their size before do not compare it again.
        TypeError: the input is not floating point, or is a DTensor beside a process group; an argument of the
            constructor has the wrong type.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        eps_outside: bool = False,
        process_group: ProcessGroupLike = None,
    ):
        validate.flags(elementwise_affine=elementwise_affine, bias=bias, eps_outside=eps_outside)
        validate.numbers_or_none(eps=eps)
        validate.factory_arguments(device, dtype)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        has_bias = elementwise_affine and bias
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(self.weight)) if has_bias else None)
        self.eps_outside = eps_outside
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, (*, *normalized_shape)."""
        if isinstance(x, fx.Proxy) and self._is_whole(x):
            return self._node(x)
        shape, split = self.normalized_shape, self.process_group is not None
        weight, bias = self._parameters_beside(x)
        validate.trailing_axes(x, shape, weight, bias, split=split)  # before the ranks compare anything
        group = self._group.resolve_for(self, x, x.shape[: -len(shape)])
        return functional.rms_norm(
            x, shape, weight, self.eps, bias=bias, eps_outside=self.eps_outside, process_group=group
        )

    def extra_repr(self) -> str:
        """Return the arguments that the module was made with."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}, eps_outside={self.eps_outside}{self._ranks()}"
        )

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0."""
        super().reset_parameters()
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)  # type: ignore[arg-type]


class GroupNorm(_Grouped, nn.GroupNorm):
    """Group normalization over space and the channels of a group, which may be split over ranks (spatial parallelism).

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Arguments and state-dict keys are those of `torch.nn.GroupNorm` (torch 2.13: older ones have no `bias`), and so is
    the result without a process group: it needs no communication.

    Shapes: input and output (N, C, *) with any number of trailing axes.

    Args:
        num_groups: into how many groups the channels of this rank are divided.
        num_channels: C, on this rank.
        eps: added to the variance.
        affine: learn weight (and bias), (C,) each.
        device: of the parameters.
        dtype: of the parameters.
        bias: learn the bias, if affine.
        process_group: the ranks that have a part of each group: of its space, or of its channels; None: they are whole.
            Parts may differ in size. Where space is split, the gradients of weight and bias are this rank's share.

    Collectives: with a process group of more than one rank, one all-reduce of 2 N num_groups + 1 float64 in forward and
    one of 2 N num_groups in backward. At the first input of each N, also one all-gather of 512 bytes, by which the
    ranks compare their layer, N and num_groups. Otherwise none.

    Raises:
        DesyncError: on every rank; the ranks are in different layers, or their inputs differ in dtype.
        ValueError: the input has not num_channels, or the groups do not divide them; this rank is not in the group; on
            every rank, the ranks have unequal N or num_groups. Ranks that have met their N before do not compare it.
        TypeError: the input is not floating point, or is a DTensor beside a process group; an argument of the
            constructor has the wrong type.

    Source: Wu and He, Group Normalization, 2018.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        process_group: ProcessGroupLike = None,
    ):
        validate.flags(affine=affine, bias=bias)
        validate.numbers(eps=eps)
        validate.factory_arguments(device, dtype)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C, *)."""
        if isinstance(input, fx.Proxy) and self._is_whole(input):
            return self._node(input)
        groups, split = self.num_groups, self.process_group is not None
        weight, bias = self._parameters_beside(input)
        validate.groups_of_channels(input, groups, weight, bias, self.num_channels, split=split)
        group = self._group.resolve_for(self, input, (len(input), groups))
        return functional.group_norm(input, groups, weight, bias, self.eps, process_group=group)

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0."""
        self._reset_affine()

    def extra_repr(self) -> str:
        """Return the arguments that the module was made with."""
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}{self._ranks()}"
        )


def _local(parameter: Tensor | None) -> Tensor | None:
    """Return this rank's share of a parameter that tensor parallelism has distributed."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[union-attr]


class ProcessGroupReference:
    """A module's process group: shared by deep copies and left out of pickles, which another job may load.

    Attributes:
        given: what was given as the process group.
        history: what its ranks have compared of the module.
    """

    def __init__(self, given: ProcessGroupLike):
        self.given = given
        self.history = History()
        self._resolved: Communicator | None = None
        with contextlib.suppress(ValueError):  # a rank outside the group may build the model, but not train it
            self.resolve()

    def resolve(self) -> Communicator | None:
        """Return the communicator of what was given, resolved once; None stays None: it may become a group later."""
        if self._resolved is None and self.given is not None:
            self._resolved = communicator(self.given)
        return self._resolved

    def resolve_for(self, layer: nn.Module, input: Tensor, sizes: tuple[int, ...]) -> Communicator | None:
        """Return the communicator of a group that splits some axes of the input, having compared the other `sizes`."""
        group = self.resolve()
        if group is not None and not functional.without_values(input):
            self.history.check_sizes(layer, input, sizes, group)
        return group

    def __str__(self) -> str:
        """Return the size of the group, or that this rank is not in it."""
        size = 0 if self._resolved is None else self._resolved.size
        return f"{size} rank{'s' * (size != 1)}" if size else "other ranks"

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroupReference:
        return ProcessGroupReference(self.given)

    def __reduce__(self) -> tuple[type[ProcessGroupReference], tuple[None]]:
        return ProcessGroupReference, (None,)


_ALONE = LocalCommunicator()
