"""LayerNorm as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from .. import arguments, functional
from ..communicators import ProcessGroupLike
from .process_group import ProcessGroupMixin

__all__ = ["LayerNorm"]


class LayerNorm(ProcessGroupMixin, nn.LayerNorm):
    """Layer normalization over the last axes, which may be split over ranks (tensor parallelism).

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and (biased) var are computed over the last axes, for each position of the other axes. Arguments and state-dict
    keys are those of `torch.nn.LayerNorm`. Without a process group the result is torch's, without communication. With
    one, normalized_shape, weight and bias are this rank's shards, and so are the gradients of weight and bias.

    Shapes: input and output (*, *normalized_shape), floating point. The output has the input's dtype.

    Args:
        normalized_shape: sizes of the last axes on this rank, or size of the last one.
        eps: added to the variance.
        elementwise_affine: learn weight (and bias), of normalized_shape.
        bias: learn the bias, if elementwise_affine.
        device: of the parameters.
        dtype: of the parameters.
        process_group: the ranks over which the last axes are split, each with a shard of any size, which may be 0. The
            other axes must be the same on all ranks. None: the last axes are not split.
        reproducible: add up the statistics, and the sums of the gradients over the ranks, in fixed point. Then they
            have the same bits however the axes are divided over ranks and threads, on one rank too. See the docs page
            `reproducible`.

    Collectives: with a process group of more than one rank, one all-reduce of 2R + 3 float64 in forward, for R
    positions, and one of 2R + 2 in backward. With `reproducible` it is two each way. The first input of each size also
    issues one all-gather of 512 bytes, in which the ranks compare their layer and their other axes. Otherwise none.

    Raises:
        DesyncError: on every rank, if the ranks are in different layers or calls, or if their inputs differ in dtype.
        ValueError: the last axes of the input are not normalized_shape; this rank is not in the group; on every rank,
            the ranks' other axes differ at the first input of a size (docs page `collectives`, "What is checked across
            ranks").
        TypeError: the input is not floating point, or is sparse or mkldnn; with a process group also if it is nested or
            a DTensor; weight or bias is not a tensor, or another argument has the wrong type.
        RuntimeError: weight or bias is on another device than the input.

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
        reproducible: bool = False,
    ):
        arguments.check_flags(elementwise_affine=elementwise_affine, bias=bias, reproducible=reproducible)
        arguments.check_numbers(eps=eps)
        arguments.check_factory_arguments(device, dtype)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.process_group, self.reproducible = process_group, reproducible

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (*, *normalized_shape)."""
        if isinstance(input, fx.Proxy) and self._fits_one_node(input):
            return self._as_node(input)
        shape, group = self.normalized_shape, None
        weight, bias = self._parameters_like(input)
        if self.process_group is not None:
            communicator = self._group.enter(input)  # first: it counts the call
            arguments.parse_normalized_shape(input, shape, weight, bias, split=True)  # before the ranks compare sizes
            group = self._group.exchange(communicator, self, input, input.shape[: -len(shape)])
        return functional.layer_norm(
            input, shape, weight, bias, self.eps, process_group=group, reproducible=self.reproducible
        )

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}{self._group_repr()}"
        )
