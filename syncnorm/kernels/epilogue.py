"""What follows the affine map of a norm, in the same pass over the data.

Shapes: residual (N, C, *), as the input; positive bits (⌈numel / 8⌉,) uint8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "LEAST_NOISE", "NEGATIVE_SLOPE", "PLAIN", "Epilogue", "rounding"]

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu_tanh")
NEGATIVE_SLOPE = 0.01  # of leaky_relu
LEAST_NOISE = 2.0**-126  # times invstd: float32 holds the inverse of what is not below it


class Epilogue(NamedTuple):
    """y = activation(z), with z = (x - mean) * invstd * weight + bias + residual.

    Attributes:
        activation: one of ACTIVATIONS; None: y = z.
        residual: forward: what is added, or None. Backward: what forward kept of it, the signs of z or the residual.
        inplace: y takes the memory of the input, and backward computes the input from it; the activation is None or
            leaky_relu, which have an inverse.
    """

    activation: str | None = None
    residual: Tensor | None = None
    inplace: bool = False

    @property
    def keeps_signs(self) -> bool:
        """Whether backward needs no more than the signs of z, which with a residual cannot be had from the input."""
        return self.residual is not None and self.activation in ("relu", "leaky_relu")

    @property
    def keeps_residual(self) -> bool:
        """Whether backward needs the residual itself."""
        return self.residual is not None and self.activation in ("silu", "gelu_tanh")

    @property
    def needs_bias(self) -> bool:
        """Whether backward computes z from the input, or the input from y."""
        return self.inplace or (self.activation is not None and not self.keeps_signs)


PLAIN = Epilogue()


def rounding(dtype: torch.dtype, activation: str | None) -> tuple[float, float]:
    """Return the standard deviation of the rounding of z, which is stored as y: relative to z, and at least."""
    info = torch.finfo(dtype)
    relative: float = info.eps / 12**0.5
    return relative, relative * info.tiny / (NEGATIVE_SLOPE if activation == "leaky_relu" else 1)
