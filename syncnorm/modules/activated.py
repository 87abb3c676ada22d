"""The output of a norm that has already computed the activation function that the model calls next.

A model that calls F.relu(norm(x)) calls it whatever the norm does. So a norm that has absorbed the function returns an
`Activated` tensor, for which the function is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..kernels.epilogue import NEGATIVE_SLOPE

__all__ = ["Activated", "activation_of"]

_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    F.silu: "silu",
    F.gelu: "gelu_tanh",
}


def activation_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return what `SyncBatchNorm(activation=)` calls the function that a call computes, if anything.

    Args:
        function: of torch or torch.nn.functional, or a method of Tensor.
        args: of the call. The first one is the input.
        kwargs: of the call.
    """
    name = _FUNCTIONS.get(function)
    options = args[1:]
    if name == "leaky_relu" and (options[0] if options else kwargs.get("negative_slope", 0.01)) != NEGATIVE_SLOPE:
        return None
    if name == "gelu_tanh" and kwargs.get("approximate") != "tanh":
        return None
    return name if args else None


class Activated(Tensor):
    """A tensor to which an activation has been applied. Any operation on it gives plain tensors."""

    activation: str

    @staticmethod
    def of(tensor: Tensor, activation: str) -> Activated:
        """Return a tensor, of which this is the activation, as one for which that activation is the identity."""
        activated: Activated = tensor.as_subclass(Activated)
        activated.activation = activation
        return activated

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor itself for the function that it has seen, else what the function returns."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            input = args[0] if args else None
            if isinstance(input, Activated) and activation_of(func, args, kwargs) == input.activation:
                return input.as_subclass(Tensor)
            return func(*args, **kwargs)
