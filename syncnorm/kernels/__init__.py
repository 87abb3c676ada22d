"""The passes over the data. An implementation is a module with the functions of `Kernels`; `select` picks one.

`reference` defines what they compute. Kernels import nothing of the package: they know tensors alone.
"""

from __future__ import annotations

import functools
import os
from typing import Protocol

import torch
from torch import Tensor, nn

from . import reference
from .epilogue import ACTIVATIONS, PLAIN, Epilogue

__all__ = ["ACTIVATIONS", "PLAIN", "Epilogue", "Kernels", "reference", "select"]


class Kernels(Protocol):
    """What an implementation has. Inputs are (N, C, *) in any memory format; `reference` has the formulas."""

    def moments(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Input -> [mean, M2, count]."""
        ...

    def pack(self, moments: Tensor) -> Tensor:
        """[mean, M2, n] -> [n·mean, M2 + n·mean², n]."""
        ...

    def unpack(self, packed: Tensor) -> Tensor:
        """[n·mean, M2 + n·mean², n] -> [mean, M2, n]."""
        ...

    def update_running(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor | None,
        moments: Tensor,
        momentum: float | None,
    ) -> None:
        """Move the buffers in place."""
        ...

    def normalize(
        self,
        input: Tensor,
        moments: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        eps_outside: bool = False,
        epilogue: Epilogue = PLAIN,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input and moments -> y, [mean, invstd], and the signs of z if the epilogue keeps them."""
        ...

    def reduce_grad(
        self,
        grad_output: Tensor,
        input: Tensor,
        statistics: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        mask: Tensor | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> tuple[Tensor, Tensor]:
        """Gradient, input and [mean, invstd] -> gradients of bias and weight, and [Σ dz, Σ dz * x̂] times weight."""
        ...

    def grad_input(
        self,
        grad_output: Tensor,
        input: Tensor,
        statistics: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sums: Tensor | None,
        count: Tensor | None,
        *,
        centered: bool = True,
        eps_outside: float = 0.0,
        mask: Tensor | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient, input, [mean, invstd], sums and count of all shards -> dx, and dz if a residual was there."""
        ...


def select(tensor: Tensor) -> Kernels:
    """Return the implementation for a tensor: the fastest there is, or what SYNCNORM_KERNELS names.

    Tensors that are not what they seem, such as those of a compiler that traces the program, go to the reference.

    Raises:
        RuntimeError: SYNCNORM_KERNELS names an implementation that is missing or cannot take the tensor.
    """
    if type(tensor) not in _PLAIN or torch.compiler.is_compiling():
        return reference
    if tensor.is_cpu:  # asking for the device's type takes longer
        return _implementation("cpu", tensor.dtype)
    return _implementation(tensor.device.type, tensor.dtype)


@functools.cache
def _implementation(device: str, dtype: torch.dtype) -> Kernels:
    choice = os.environ.get("SYNCNORM_KERNELS")
    if choice not in (None, "reference", "cpu"):
        raise RuntimeError(f"expected SYNCNORM_KERNELS to be reference or cpu, got {choice!r}")
    if choice == "reference" or dtype not in _DTYPES:
        return reference
    if device == "cpu":
        try:
            from . import cpu
        except OSError as error:
            if choice == "cpu":
                raise RuntimeError(
                    f"expected the compiled kernels that SYNCNORM_KERNELS=cpu asks for, got {error}; install syncnorm "
                    "where there is a C++ compiler: pip install --force-reinstall --no-deps syncnorm"
                ) from None
            return reference
        return cpu
    return reference


_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
