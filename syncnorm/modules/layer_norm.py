"""LayerNorm as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from .. import arguments, functional
from ..communicators import ProcessGroupLike
from .process_group import Grouped

__all__ = ["LayerNorm"]


class LayerNorm(Grouped, nn.LayerNorm):
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
        arguments.check_flags(elementwise_affine=elementwise_affine, bias=bias)
        arguments.check_numbers(eps=eps)
        arguments.check_factory_arguments(device, dtype)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (*, *normalized_shape)."""
        if isinstance(input, fx.Proxy) and self._is_whole(input):
            return self._node(input)
        shape, split = self.normalized_shape, self.process_group is not None
        weight, bias = self._parameters_beside(input)
        arguments.parse_normalized_shape(input, shape, weight, bias, split=split)  # before the ranks compare anything
        group = self._group.resolve_for(self, input, input.shape[: -len(shape)])
        return functional.layer_norm(input, shape, weight, bias, self.eps, process_group=group)

    def extra_repr(self) -> str:
        """Return the arguments that the module was made with."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}{self._ranks()}"
        )
