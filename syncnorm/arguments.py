"""Argument checks. Each raises one error, "expected ..., got ...", before any collective is issued.

Functions named `check_*` only check. Those named `parse_*` also return the argument in the form that the norms use.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import _C, Tensor, fx

from .kernels import ACTIVATIONS, PLAIN, Epilogue, quick_check

__all__ = [
    "check_activation",
    "check_batch_norm_arguments",
    "check_channel_axis",
    "check_dense",
    "check_factory_arguments",
    "check_flags",
    "check_groups",
    "check_numbers",
    "check_numbers_or_none",
    "memory_of",
    "parse_epilogue",
    "parse_mask",
    "parse_normalized_shape",
]


def check_flags(**given: Any) -> None:
    """Raise TypeError unless each argument is True or False. Other types come from a wrong argument order."""
    for name, value in given.items():
        if value is not True and value is not False:
            raise TypeError(f"expected {name} to be True or False, got {_described(value)}")


def check_numbers(**given: Any) -> None:
    """Raise TypeError unless each argument is a number. Other types come from a wrong argument order."""
    for name, value in given.items():
        if not _is_number(value):
            raise TypeError(f"expected {name} to be a number, got {_described(value)}")


def check_numbers_or_none(**given: Any) -> None:
    """Raise TypeError unless each argument is a number or None. Other types come from a wrong argument order."""
    for name, value in given.items():
        if value is not None and not _is_number(value):
            raise TypeError(f"expected {name} to be a number or None, got {_described(value)}")


def check_factory_arguments(device: Any, dtype: Any) -> None:
    """Raise TypeError unless parameters can have this device and dtype."""
    if not (device is None or isinstance(device, torch.device | str | int)) or isinstance(device, bool):
        raise TypeError(f"expected device to be a torch.device, a string, an integer or None, got {_described(device)}")
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise TypeError(f"expected dtype to be a torch.dtype or None, got {_described(dtype)}")


def _is_number(value: Any) -> bool:
    """Return whether torch accepts the value as a float. A bool is not accepted: it is probably another argument."""
    if isinstance(value, float):
        return True
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, Real | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_batch_norm_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> bool:
    """Raise ValueError, TypeError or RuntimeError if the arguments are inconsistent.

    Returns:
        True if all tensors are plain ones on the CPU. False: they may be.
    """
    tensors = input, running_mean, running_var, weight, bias, num_batches_tracked
    are_plain = quick_check()(*tensors)
    if not are_plain:
        _check_tensors(*tensors)
    if not (type(training) is bool and type(eps) is type(momentum) is float):  # which is quick to see
        check_flags(training=training)
        check_numbers(eps=eps)
        check_numbers_or_none(momentum=momentum)
    if training and eps <= 0:
        raise ValueError(f"expected a positive eps in training, got {eps}")
    if eps < 0:
        raise ValueError(f"expected an eps of at least 0, got {eps}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var together, got only one of them")
    if not training and running_mean is None:
        raise ValueError("expected running_mean and running_var outside training, got None")
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("expected num_batches_tracked with momentum=None (cumulative average), got None")
    return are_plain


def _check_tensors(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> None:
    vectors = running_mean, running_var, weight, bias
    shape, device = (_parse_channels(input, vectors),), input.device
    for vector in vectors:
        if vector is not None and not (
            isinstance(vector, Tensor)
            and vector.shape == shape
            and vector.is_floating_point()
            and vector.device == device
        ):
            raise _vector_error(
                vector, {"running_mean": running_mean, "running_var": running_var, "weight": weight}, input
            )
    if num_batches_tracked is not None and (num_batches_tracked.device != device or num_batches_tracked.numel() != 1):
        raise _counter_error(num_batches_tracked, input)


def _parse_channels(input: Tensor, vectors: tuple[Tensor | None, ...]) -> int:
    """Return C. As in torch, an input of shape (0,) has 0 channels, unless a vector has another shape."""
    _check_floating_point(input)
    check_dense("input", input)
    if input.dim() > 1:
        return input.shape[1]
    if (
        input.dim() == 1
        and len(input) == 0
        and all(vector is None or (isinstance(vector, Tensor) and vector.shape == (0,)) for vector in vectors)
    ):
        return 0
    raise _axes_error(input)


def _counter_error(num_batches_tracked: Tensor, input: Tensor) -> Exception:
    if num_batches_tracked.numel() != 1:
        return ValueError(f"expected a num_batches_tracked of shape (), got {tuple(num_batches_tracked.shape)}")
    return RuntimeError(
        f"expected num_batches_tracked on the input's device {input.device}, got {num_batches_tracked.device}"
    )


def _vector_error(vector: Tensor, others: dict[str, Tensor | None], input: Tensor) -> Exception:
    """Return the error for a vector over the channels: one of `others`, else the bias."""
    name = next((name for name, other in others.items() if other is vector), "bias")
    if not isinstance(vector, Tensor):
        return TypeError(f"expected {name} to be a tensor or None, got {vector!r}")
    if vector.dim() != 1:
        return ValueError(f"expected a {name} of shape {(input.shape[1],)}, got {tuple(vector.shape)}")
    if len(vector) != input.shape[1]:
        return _channels_error(vector.numel(), f", to match {name}", input)
    if not vector.is_floating_point():
        return TypeError(f"expected a floating-point {name}, got {vector.dtype}")
    return RuntimeError(
        f"expected the parameters and buffers on the input's device {input.device}, got {name} on {vector.device}"
    )


def _channels_error(expected: int, reason: str, input: Tensor) -> ValueError:
    return ValueError(f"expected an input of {expected} channels, (N, {expected}, *){reason}, got {tuple(input.shape)}")


def parse_mask(mask: Tensor | None, input: Tensor) -> Tensor | None:
    """Return the mask of an input (N, C, *) in a shape that broadcasts to (N, 1, *); raise if there is none."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(f"expected a mask of bool or floating point, got {getattr(mask, 'dtype', type(mask).__name__)}")
    check_dense("mask", mask)
    if mask.device != input.device:
        raise RuntimeError(f"expected the mask on the input's device {input.device}, got one on {mask.device}")
    whole = (len(input), 1, *input.shape[2:])
    fitting = mask.unsqueeze(1) if mask.dim() == input.dim() - 1 else mask
    if fitting.dim() != input.dim() or any(size not in (1, n) for size, n in zip(fitting.shape, whole, strict=True)):
        raise ValueError(
            f"expected a mask that broadcasts to {(len(input), *input.shape[2:])} or {whole} for an input of shape "
            f"{tuple(input.shape)}, got shape {tuple(mask.shape)}"
        )
    return fitting.detach()


def check_activation(activation: str | None, inplace: bool) -> None:
    """Raise unless the activation is supported, with `inplace` in place."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if inplace and activation not in (None, "leaky_relu"):
        raise ValueError(f"expected activation None or 'leaky_relu' with inplace=True, got {activation!r}")


def parse_epilogue(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    inplace: bool,
) -> Epilogue:
    """Return the epilogue, which follows the affine map; raise if the arguments do not allow it."""
    if residual is None and activation is None and not inplace:
        return PLAIN
    check_activation(activation, inplace)
    if inplace:
        if residual is not None:
            raise ValueError("expected no residual with inplace=True, got one")
        _check_writable(input, weight, bias)
    elif residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"expected a tensor as residual, got {type(residual).__name__}")
        check_dense("residual", residual)
        if residual.shape != input.shape:
            raise ValueError(
                f"expected a residual of the input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
            )
        if residual.dtype != input.dtype:
            raise TypeError(f"expected a residual of the input's dtype {input.dtype}, got {residual.dtype}")
        if residual.device != input.device:
            raise RuntimeError(f"expected the residual on the input's device {input.device}, got {residual.device}")
    return Epilogue(activation, inplace, adds_residual=residual is not None)


def _check_writable(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise if autograd does not allow the input to be overwritten. Torch would raise only after the collective."""
    if input.numel() and any(
        stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True)
    ):
        raise RuntimeError("expected an input that is not expanded with inplace=True, got an expanded one")
    if input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "expected an input that was not created in inference mode with inplace=True, got one that was"
        )
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return
    if input.requires_grad and input.is_leaf:
        raise RuntimeError("a leaf Variable that requires grad has been used in an in-place operation.")
    if memory_of(input)._is_view():
        raise RuntimeError(
            "expected an input that is not a view with inplace=True, got a view, which autograd cannot track"
        )


def memory_of(input: Tensor) -> Tensor:
    """Return the plain tensor that an instance of a subclass aliases completely, else the tensor itself.

    By default torch's operations on a subclass return an alias of the plain result, which autograd treats as a view.
    Writing to the plain tensor changes both.
    """
    base = input._base
    if type(input) is Tensor or base is None or type(base) is not Tensor:
        return input
    geometry = [(t.shape, t.stride(), t.storage_offset(), t.dtype) for t in (input, base)]
    tracked = _C._autograd._get_creation_meta(input) == _C._autograd.CreationMeta.DEFAULT  # else autograd may raise
    return base if geometry[0] == geometry[1] and tracked else input


def parse_normalized_shape(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    split: bool,
) -> tuple[int, ...]:
    """Return normalized_shape as a tuple; raise unless it is the shape of the input's last axes and the parameters.

    With `split` the axes are split over a process group. The input is then this rank's shard and not a DTensor.
    """
    _check_floating_point(input)
    check_dense("input", input, jagged=not split)  # torch's own norms accept nested tensors of that layout
    _check_is_local(input, split)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"expected an input of shape (*, {', '.join(map(str, shape))}), got {tuple(input.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check_parameter(name, tensor, shape, input)
    return shape


def check_groups(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    num_channels: int | None = None,
    *,
    split: bool,
) -> None:
    """Raise unless num_groups divides the channels of an input (N, C, *) and the parameters have shape (C,).

    Without weight and bias, C must be num_channels if that is given. `split` is as in `parse_normalized_shape`.
    """
    check_channel_axis(input)
    _check_is_local(input, split)
    channels = input.shape[1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if isinstance(parameter, Tensor) and parameter.dim() == 1 and len(parameter) != channels:
            raise _channels_error(len(parameter), f", to match {name}", input)
    if weight is None and bias is None and num_channels is not None and num_channels != channels:
        raise _channels_error(num_channels, "", input)
    if isinstance(num_groups, bool) or not isinstance(num_groups, Integral | torch.SymInt):
        raise TypeError(f"expected num_groups to be an integer, got {_described(num_groups)}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"expected a number of groups that divides the {channels} channels, got {num_groups}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check_parameter(name, tensor, (channels,), input)


def _check_parameter(name: str, tensor: Tensor | None, shape: tuple[int, ...], input: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a tensor or None, got {tensor!r}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"expected a {name} of shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != input.device:
        raise RuntimeError(f"expected {name} on the input's device {input.device}, got one on {tensor.device}")


def check_channel_axis(input: Tensor) -> None:
    """Raise unless the input is floating point and has a channel axis."""
    _check_floating_point(input)
    check_dense("input", input)
    if input.dim() < 2:
        raise _axes_error(input)


def _axes_error(input: Tensor) -> ValueError:
    return ValueError(f"expected an input of at least 2 axes (N, C, *), got shape {tuple(input.shape)}")


def _check_is_local(input: Tensor, split: bool) -> None:
    if split and hasattr(input, "to_local"):
        raise TypeError(
            "expected this rank's shard of the input as a plain tensor with a process group, got a DTensor of shape "
            f"{tuple(input.shape)}: pass its to_local(), or use ColwiseParallel without use_local_output=False"
        )


def check_dense(name: str, tensor: Tensor, *, jagged: bool = False) -> None:
    """Raise if the tensor is nested, sparse, or packed in another way. With `jagged`, allow jagged nested tensors."""
    layout, nested = tensor.layout, tensor.is_nested
    if (layout is torch.strided and not nested) or (jagged and nested and layout is torch.jagged):
        return
    kind = "nested tensor" if nested else "tensor"
    advice = "pad it with torch.nested.to_padded_tensor" if nested else "call its to_dense()"
    raise TypeError(f"expected a dense {name}, got a {kind} of layout {layout}: {advice}")


def _check_floating_point(input: Tensor) -> None:
    if not isinstance(input, Tensor):
        advice = isinstance(input, fx.Proxy) and (
            " of torch.fx, which cannot trace into a norm: trace the model that contains the layer, pass the function "
            "to torch.fx.wrap, or call syncnorm.revert_sync_batchnorm(model) first"
        )
        raise TypeError(f"expected a tensor as input, got {type(input).__name__}{advice or ''}")
    if not input.is_floating_point():
        raise TypeError(f"expected a floating-point input, got {input.dtype}")
