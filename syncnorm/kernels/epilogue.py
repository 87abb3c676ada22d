"""What follows the affine map of a norm, in the same pass over the data.

Shapes: residual (N, C, *), as the input; signs (R, B) uint8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "LEAST_NOISE", "NEGATIVE_SLOPE", "PLAIN", "Epilogue", "Saved", "rounding"]

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu_tanh")
NEGATIVE_SLOPE = 0.01  # of leaky_relu
LEAST_NOISE = 2.0**-126  # times invstd: float32 holds the inverse of what is not below it


class Epilogue(NamedTuple):
    """y = activation(z), with z = (x - mean) * invstd * weight + bias + residual. It holds no tensor.

    Attributes:
        activation: one of ACTIVATIONS; None: y = z.
        inplace: y takes the memory of the input, and backward computes the input from it. The activation is None or
            leaky_relu, which have an inverse.
        adds_residual: whether a residual is added.
    """

    activation: str | None = None
    inplace: bool = False
    adds_residual: bool = False

    @property
    def saves_signs(self) -> bool:
        """Whether backward needs only the signs of z, which cannot be computed from the input after a residual."""
        return self.adds_residual and self.activation in ("relu", "leaky_relu")

    @property
    def saves_residual(self) -> bool:
        """Whether backward needs the residual itself."""
        return self.adds_residual and self.activation in ("silu", "gelu_tanh")

    @property
    def needs_bias(self) -> bool:
        """Whether backward computes z from the input, or the input from y."""
        return self.inplace or (self.activation is not None and not self.saves_signs)


class Saved(NamedTuple):
    """What forward saved for backward, of the size of the input.

    Attributes:
        input: x; with an epilogue in place, y.
        signs: one bit for each value, whether z > 0, if the epilogue saves signs; see `signs`. The number of rows is up
            to the implementation.
        residual: the residual, if the epilogue saves it.
    """

    input: Tensor
    signs: Tensor | None = None
    residual: Tensor | None = None

    @property
    def has_residual(self) -> bool:
        """Whether dz, the gradient of a residual, is not the gradient of y."""
        return self.signs is not None or self.residual is not None


PLAIN = Epilogue()


def rounding(dtype: torch.dtype, activation: str | None) -> tuple[float, float]:
    """Return the standard deviation of the rounding of z, which is stored as y: relative to z, and at least."""
    info = torch.finfo(dtype)
    relative: float = info.eps / 12**0.5
    return relative, relative * info.tiny / (NEGATIVE_SLOPE if activation == "leaky_relu" else 1)
