"""The passes over the data. An implementation is a module with four functions; `select` picks one by device.

`reference` defines what they compute. Kernels import nothing of the package: they know tensors alone.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import reference

__all__ = ["Kernels", "reference", "select"]


class Kernels(Protocol):
    """What an implementation has. Inputs are (N, C, *) in any memory format; see `reference` for the formulas."""

    def moments(self, input: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Input -> mean, M2, each (C,) float64."""
        ...

    def normalize(self, input: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Input and mean, scale (C,) float64, bias (C,) -> (x - mean) * scale + bias, like the input."""
        ...

    def reduce_grad(
        self, grad_output: Tensor, input: Tensor, mean: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient, input and mean (C,) float64 -> Σ dy, Σ dy * (x - mean), each (C,) float64."""
        ...

    def grad_input(
        self,
        grad_output: Tensor,
        input: Tensor,
        mean: Tensor,
        scale: Tensor,
        slope: Tensor | None,
        offset: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Gradient, input, four (C,) float64 -> scale * dy + mask * (slope * (x - mean) + offset), like the input."""
        ...


def select(device: torch.device) -> Kernels:
    """Return the implementation for tensors on `device`."""
    return reference
