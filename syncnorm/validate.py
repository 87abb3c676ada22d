"""What bad input gets: one exception that says what was expected and what came, before any collective."""

from __future__ import annotations

from torch import Tensor

__all__ = ["batch_norm_arguments"]


def batch_norm_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> None:
    """Raise ValueError, TypeError or RuntimeError if the arguments do not fit together."""
    channel_axis(input)
    if training and eps <= 0:
        raise ValueError(f"expected a positive eps in training, got {eps}")
    channels = input.shape[1]
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if vector is None:
            continue
        if vector.shape != (channels,):
            raise ValueError(
                f"expected an input of {vector.numel()} channels, (N, {vector.numel()}, *) as {name} has it, "
                f"got {tuple(input.shape)}"
            )
        if not vector.is_floating_point():
            raise TypeError(f"expected a floating-point {name}, got {vector.dtype}")
        if vector.device != input.device:
            raise RuntimeError(
                f"expected the parameters and buffers on the input's device {input.device}, "
                f"got {name} on {vector.device}"
            )
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var together, got only one of them")
    if not training and running_mean is None:
        raise ValueError("expected running_mean and running_var outside training, got None")
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("expected num_batches_tracked with momentum=None (cumulative average), got None")


def channel_axis(input: Tensor) -> None:
    """Raise unless the input is floating point and has a channel axis."""
    if not isinstance(input, Tensor):
        raise TypeError(f"expected a tensor as input, got {type(input).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"expected a floating-point input, got {input.dtype}")
    if input.dim() < 2:
        raise ValueError(f"expected an input of at least 2 axes (N, C, *), got shape {tuple(input.shape)}")
