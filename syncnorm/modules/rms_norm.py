"""RMSNorm as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from .. import arguments, functional
from ..communicators import ProcessGroupLike
from .process_group import Grouped

__all__ = ["RMSNorm"]


class RMSNorm(Grouped, nn.RMSNorm):
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
        arguments.check_flags(elementwise_affine=elementwise_affine, bias=bias, eps_outside=eps_outside)
        arguments.check_numbers_or_none(eps=eps)
        arguments.check_factory_arguments(device, dtype)
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
        arguments.parse_normalized_shape(x, shape, weight, bias, split=split)  # before the ranks compare anything
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
