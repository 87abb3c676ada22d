"""SyncBatchNorm and LazySyncBatchNorm, and the classes of converted layers."""

from __future__ import annotations

import functools
import types
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import is_lazy

from .. import arguments, finite, functional
from ..communicators import ALONE, Communicator, LocalCommunicator, ProcessGroupLike
from ..exchange import NO_EXCHANGE
from . import known
from .activated import Activated
from .known import ORIGIN
from .process_group import ProcessGroupMixin, ProcessGroupReference

__all__ = ["LazySyncBatchNorm", "SyncBatchNorm", "class_after_conversion"]


class SyncBatchNorm(ProcessGroupMixin, _BatchNorm):
    """Batch normalization by the statistics of the whole batch, which is distributed over the ranks of a process group.

        y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    In training, mean and (biased) var of each channel are computed over the batch and trailing axes of the inputs of
    *all* ranks. The running statistics are updated with them by `momentum`, running_var with the unbiased variance of
    the whole batch. They stay bitwise identical on every rank. A batch that is empty on all ranks does not change them.
    In eval mode the running statistics are used. With `track_running_stats=False` eval mode uses the statistics of this
    rank's input, since it never communicates.

    Gradients are those of the sum of the ranks' losses. Gradients of weight and bias are this rank's share, as
    DistributedDataParallel expects: their sum over the ranks is the gradient of the whole batch.

    State-dict keys are those of `torch.nn.BatchNorm*d`, so checkpoints load in both directions. Pickles do not contain
    the process group, and deep copies share it. An input without values, on the meta device or in a FakeTensorMode,
    gives an output of the right shape.

    Shapes: input and output (N, C, *) with any number of trailing axes. The input is floating point, in any memory
    format, and the output has its dtype and memory format. The ranks' inputs may differ in all sizes but C, and N may
    be 0. The statistics of float16 and bfloat16 inputs are float32.

    Args:
        num_features: C.
        eps: added to the variance. Positive in training, at least 0 in eval.
        momentum: weight of the newest batch in the running statistics. None: their cumulative average.
        affine: learn weight (and bias), (C,) each.
        track_running_stats: keep running statistics.
        process_group: the ranks that share the batch: a torch.distributed ProcessGroup, a one-dimensional DeviceMesh,
            an mpi4py Comm or a `syncnorm.Communicator`. None: the communicator that `syncnorm.init()` made, else
            torch.distributed's default group, else this process alone.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: learn the bias, if affine.
        activation: None, "relu", "leaky_relu" (slope 0.01), "silu" or "gelu_tanh", computed in the same pass over the
            data. The input is saved for backward. With a residual the signs of the sum are saved too, one bit each, or
            for silu and gelu_tanh the residual.
        inplace: write the output over the input. Requires activation None or "leaky_relu" and no residual. Only the
            output is saved for backward, which recomputes the input from it. This is less accurate in half precision,
            and if abs(weight) is much smaller than abs(bias). The normalized input x̂ is estimated from z, the output
            before the activation, as (z - bias) * weight / (weight² + σ²). Here
            σ = finfo(input.dtype).eps * |bias| / sqrt(12) is the standard deviation of the rounding of z. The gradient
            of a weight well above σ is accurate. If a weight is below σ, the output no longer determines the input. Its
            gradient then tends to 0 with the weight, with an error of at most the sum of |dL/dz| (|x̂| + 1).

        check_finite: raise NonFiniteError if the input of a rank has NaN or Inf, before they enter the statistics. For
            an existing layer, set `layer.check_finite = True`, or see `syncnorm.debug`.
        reproducible: add up the statistics, and the sums of the gradients over the ranks, in fixed point. Then they
            have the same bits however the whole batch is divided over ranks and threads, and so have the outputs and
            the gradients of the inputs. The ranks must have the same weight. See the docs page `reproducible`.

    Collectives: in training on a group of more than one rank, one all-reduce of 2C + 3 float64 in forward and one of
    2C + 2 in backward (none if the input needs no gradient). With `reproducible` two in forward, of 4C + 6 and 4C + 4
    float64, and two in backward, of 8C + 2 and 4C + 2. (For float64 inputs 10C + 4 and 8C + 2 instead of 4C + 4 and
    4C + 2.) All ranks of the group must issue them, in the same order.
    Each carries a stamp, by which the ranks see that they are in the same call of the same layer. The first two
    forwards also issue one all-gather of 512 bytes, in which the ranks compare which layer they are in. Otherwise none.
    All ranks must apply the same transforms of torch.func. Forward-mode AD (`torch.func.jvp`, dual tensors) adds one
    all-reduce of 2C + 3 float64 for the tangents. Under `torch.func.vmap` there is one all-reduce for the whole batch
    of inputs.

    Raises:
        DesyncError: on every rank, if the ranks are in different layers or calls, or if their inputs differ in C or
            dtype. On a GPU it is raised at the next step (docs page `collectives`, "Stamps").
        NonFiniteError: on every rank, with `check_finite`, if the input of a rank has NaN or Inf. This layer has
            not changed.
        ValueError: the input does not have C channels, the residual has another shape, or the mask does not broadcast;
            the activation is unknown or not supported with inplace; eps is negative, or 0 in training; this rank is not
            in the group; the whole batch has one value per channel. (The last one is not checked for a mask on a GPU,
            since this would synchronize with the device.)
        TypeError: the input, a parameter or a buffer is not floating point; the mask is neither floating point nor
            bool; the residual does not have the input's dtype; input, mask or residual is nested, sparse or mkldnn;
            `eps` is read from a layer with an activation; an argument of the constructor has the wrong type.
        RuntimeError: a parameter, a buffer, the mask or the residual is on another device than the input; the input
            cannot be overwritten, because it is a leaf that requires a gradient, a view in a graph, expanded, or
            created in inference mode; a transform of torch.func cannot update the running statistics, because it was
            not given them; torch.jit.trace, make_fx or torch.export would omit the all-reduce; with `reproducible`,
            any transform of torch.func, forward-mode AD, a tracer or a backward with create_graph=True.

    Source: Ioffe and Szegedy, Batch Normalization, 2015. Moments are merged as in Chan, Golub and LeVeque, 1979. In
    place: Rota Bulò, Porzi and Kontschieder, In-Place Activated BatchNorm, 2018.
    """

    activation: str | None = None  # the default of converted layers and of old pickles
    inplace: bool = False
    check_finite: bool = False
    calls_function: bool = False  # whether the model calls the activation as a function, after this layer

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
        check_finite: bool = False,
        reproducible: bool = False,
    ):
        arguments.check_flags(affine=affine, track_running_stats=track_running_stats, bias=bias)
        arguments.check_flags(inplace=inplace, check_finite=check_finite, reproducible=reproducible)
        arguments.check_numbers(eps=eps)
        arguments.check_numbers_or_none(momentum=momentum)
        arguments.check_factory_arguments(device, dtype)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._finish_init(process_group, bias, activation, inplace)
        self.check_finite, self.reproducible = check_finite, reproducible

    def _finish_init(self, process_group: ProcessGroupLike, bias: bool, activation: str | None, inplace: bool) -> None:
        """Set what torch's constructor does not know."""
        if not bias:
            self.register_parameter("bias", None)
        arguments.check_activation(activation, inplace)
        self.activation, self.inplace = activation, inplace
        self.process_group = process_group

    @property
    def eps(self) -> float:
        """The value added to the variance. Raises TypeError for a layer with an activation.

        Code reads `eps` to fold a BatchNorm into the preceding layer, or to replace it by another norm. Both would drop
        the activation. `vars(layer)["eps"]` is the value for any layer.
        """
        if self.activation is not None:
            raise TypeError(
                f"expected to read eps from a norm without an activation, got activation={self.activation!r}: code "
                "that folds or replaces this layer would drop the activation. Call "
                "syncnorm.revert_sync_batchnorm(model) first, or construct the layer without an activation. "
                "To read the value, use vars(layer)['eps']"
            )
        return vars(self)["eps"]  # type: ignore[no-any-return]

    @eps.setter
    def eps(self, eps: float) -> None:
        vars(self)["eps"] = self._eps = eps  # torch.compile may read vars(self)["eps"] by the property

    def __dir__(self) -> list[str]:
        """Return the names of all attributes that can be read. torch.jit and inspect read each of them."""
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return names if self.activation is None else [name for name in names if name != "eps"]

    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize `input`, (N, C, *), and in training update the running statistics.

        Args:
            input: (N, C, *), floating point.
            residual: added before the activation. It has the input's shape and dtype.
            mask: the positions that count, (N, *) or (N, 1, *), bool or floating point. Any of these sizes may be 1.
                Each rank may have another number of them. The statistics are those of the positions of all ranks where
                the mask is true (or 1). Other positions are normalized by the same statistics, do not contribute to
                their gradient, and may hold any values. A fraction counts as that part of a position: the n of mean,
                var and the unbiased var is the sum of the mask. It must be non-negative. This is not checked, since
                checking would synchronize with the GPU.
        """
        if isinstance(input, fx.Proxy) and self._fits_one_node(input):
            return self._as_node(input, residual=residual, mask=mask)
        group = self._group.enter(input, recalls=True) if self.training else ALONE  # first: it counts the call
        if isinstance(input, Tensor):
            self._check_input_dim(input)
        exchange: Any = NO_EXCHANGE
        if not isinstance(group, LocalCommunicator):
            exchange = self._exchange(group, input, residual, mask)
        elif self.training and finite.checks(self.check_finite):
            exchange = self._group.history.exchange(self, group)  # which knows the name of the layer
        weight, bias, running_mean, running_var, batches = self._tensors()
        if self.training and not self.track_running_stats:
            running_mean = running_var = batches = None
        called = self.activation if self.calls_function else None
        output = functional.sync_batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            self.training or running_mean is None,
            self.momentum,
            self._eps,
            num_batches_tracked=batches,
            process_group=exchange,
            mask=mask,
            residual=residual,
            activation=None if called and torch.compiler.is_compiling() else self.activation,
            inplace=self.inplace,
            check_finite=self.check_finite,
            reproducible=self.reproducible,
        )
        return output if called is None or torch.compiler.is_compiling() else Activated.of(output, called)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Return weight, bias, running_mean, running_var and num_batches_tracked, where they usually are.

        nn.Module's lookup of an attribute takes three times as long.
        """
        parameters, buffers = self._parameters, self._buffers
        try:
            affine = parameters["weight"], parameters["bias"]
            return *affine, buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:  # a parametrization, FSDP or a replica of DataParallel holds some of them elsewhere
            return self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked

    def _exchange(
        self, group: Communicator | None, input: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> ProcessGroupLike:
        """Return the exchange of this call. In the first calls the ranks compare which layer they are in."""
        if group is None or torch.compiler.is_compiling():
            return group
        history = self._group.history
        if not history.is_complete(group):
            arguments.check_batch_norm_arguments(  # before the ranks compare anything
                *(input, self.running_mean, self.running_var, self.weight, self.bias),
                *(True, self.momentum, self._eps, self.num_batches_tracked),
            )
            arguments.parse_mask(mask, input)
            arguments.parse_epilogue(input, self.weight, self.bias, residual, self.activation, self.inplace)
            if not functional.without_values(input):
                history.check_call(self, input, group)
        return history.exchange(self, group)  # type: ignore[return-value]  # which functional takes for one

    def reset_parameters(self) -> None:
        """Reset the running statistics to mean 0 and var 1, weight to 1 and bias to 0."""
        self.reset_running_stats()
        self._reset_affine()

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        return (
            f"{self.num_features}, eps={self._eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
            + (f", activation={self.activation}" if self.activation else "")
            + (", inplace=True" if self.inplace else "")
            + (", check_finite=True" if self.check_finite else "")
            + self._group_repr()
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of axes from 2. The class of a converted layer has its own check."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state of a pickle or copy, and the class of a converted layer, which the pickle does not name."""
        kind = type(self)
        if ORIGIN in state and kind in (SyncBatchNorm, LazySyncBatchNorm):
            kind = class_after_conversion(state[ORIGIN][0], is_lazy=kind is LazySyncBatchNorm)
        if kind is type(self):
            super().__setstate__(state)  # type: ignore[no-untyped-call]
            self._eps = vars(self)["eps"]
        else:
            self.__class__ = kind
            self.__setstate__(state)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load as torch does. If loading raises, the layer's tensors keep their values."""
        kept = self._snapshot()
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError:
            self._restore(kept)
            raise

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load one layer of a model as torch does. If a shape does not match, the layer's tensors keep their values."""
        kept, error_msgs = self._snapshot(), args[-1]
        known = len(error_msgs)
        super()._load_from_state_dict(*args, **kwargs)
        if len(error_msgs) > known:
            self._restore(kept)

    def _snapshot(self) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
        """Return for each tensor its owner and name, the tensor, and a copy of its values."""
        owners: tuple[dict[str, Any], ...] = (self._parameters, self._buffers)
        tensors = [(owner, name, tensor) for owner in owners for name, tensor in owner.items() if tensor is not None]
        return [(owner, name, tensor, tensor.clone()) for owner, name, tensor in tensors if not is_lazy(tensor)]

    @torch.no_grad()
    def _restore(self, kept: list[tuple[dict[str, Any], str, Tensor, Tensor]]) -> None:
        for owner, name, tensor, values in kept:
            owner[name] = tensor.copy_(values)

    @classmethod
    def convert_sync_batchnorm(
        cls,
        module: nn.Module,
        process_group: ProcessGroupLike = None,
        *,
        fuse: bool | Literal["auto"] = False,
        reproducible: bool = False,
    ) -> nn.Module:
        """Return `module` with its BatchNorm layers converted. See `syncnorm.convert_sync_batchnorm`."""
        from ..convert import convert_sync_batchnorm  # here, since convert imports this module

        return convert_sync_batchnorm(module, process_group, fuse=fuse, reproducible=reproducible)


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A `syncnorm.SyncBatchNorm` that infers `num_features` from its first input, (N, C, *).

    It then becomes a SyncBatchNorm. The first input may be empty. Arguments except num_features, shapes, collectives,
    errors and the source: see `syncnorm.SyncBatchNorm`.
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
        check_finite: bool = False,
        reproducible: bool = False,
    ):
        arguments.check_flags(affine=affine, track_running_stats=track_running_stats, bias=bias)
        arguments.check_flags(inplace=inplace, check_finite=check_finite, reproducible=reproducible)
        # calls SyncBatchNorm's constructor, which checks the other arguments
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        self._finish_init(process_group, bias, activation, inplace)
        self.check_finite, self.reproducible = check_finite, reproducible

    def initialize_parameters(self, input: Tensor, **others: Any) -> None:
        """Create parameters and buffers for the channels of `input`, (N, C, *). `others` are arguments of forward."""
        if not self.has_uninitialized_params():
            return
        arguments.check_channel_axis(input)
        self.num_features = input.shape[1]
        for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
            if tensor is not None and is_lazy(tensor):
                tensor.materialize((self.num_features,))
        self.reset_parameters()


def class_after_conversion(original: type[Any], *, is_lazy: bool) -> type[SyncBatchNorm]:
    """Return the class of a converted layer whose class was `original`. `is_lazy`: the layer still has no channels."""
    was_lazy = issubclass(original, _LazyNormBase) and not is_lazy
    kind: Any = original.cls_to_become if was_lazy else original
    return _synchronized(kind)


@functools.cache
def _synchronized(original: type[Any]) -> type[SyncBatchNorm]:
    """Return a subclass of both `original` and SyncBatchNorm.

    Methods are looked up in `original`, then in SyncBatchNorm, then in torch's _BatchNorm. So SyncBatchNorm.forward
    replaces torch's, and what `original` itself defines is kept: its check of the input, its methods and attributes.
    For torch.nn.SyncBatchNorm the class is SyncBatchNorm itself, since DistributedDataParallel rejects torch's on CPUs.
    A class of another library that is `known` keeps what its forward does after the norm.
    """
    lazy = issubclass(original, _LazyNormBase)
    base: type[Any] = LazySyncBatchNorm if lazy else SyncBatchNorm
    is_of_torch = issubclass(original, nn.SyncBatchNorm)
    parts = known.parts_after(original)
    if (is_of_torch and not parts) or issubclass(base, original):
        return base

    def __new__(cls: type[Any], *_: Any, **__: Any) -> Any:  # noqa: N807
        self = super(kind, cls).__new__(cls)
        vars(self)[ORIGIN] = original, ProcessGroupReference(None)
        return self

    def __reduce_ex__(self: SyncBatchNorm, protocol: Any) -> Any:  # noqa: N807
        constructor, given, *state = super(kind, self).__reduce_ex__(protocol)
        if type(self) is kind:  # not a subclass, such as that of a parametrized layer
            constructor, given = base, () if lazy else (0,)  # __setstate__ restores this class
        return constructor, given, *state

    def fill(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = base.__module__
        namespace["__qualname__"] = f"{base.__qualname__}[{original.__qualname__}]"
        namespace["__doc__"] = base.__doc__
        namespace["__new__"], namespace["__reduce_ex__"] = __new__, __reduce_ex__
        if lazy:
            namespace["cls_to_become"] = _synchronized(original.cls_to_become)
        if parts is not None and original.forward is not _BatchNorm.forward:
            namespace["forward"] = known.forward_of(base, parts)

    bases = (base,) if is_of_torch else (original, base)
    kind: type[Any] = types.new_class(base.__name__, bases, exec_body=fill)
    return kind
