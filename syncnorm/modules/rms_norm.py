"""RMSNorm as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from .. import arguments, functional
from ..communicators import ProcessGroupLike
from .process_group import ProcessGroupMixin

__all__ = ["RMSNorm"]


class RMSNorm(ProcessGroupMixin, nn.RMSNorm):
    """Root-mean-square normalization over the last axes, which may be split over ranks (tensor parallelism).

        y = x / sqrt(mean(x²) + eps) * weight + bias        with eps_outside: x / (sqrt(mean(x²)) + eps) * weight + bias

    The mean is computed over the last axes, for each position of the other axes. Positional arguments and state-dict
    keys are those of `torch.nn.RMSNorm`, but eps defaults to 1e-6 instead of None. A bias is optional. Without a
    process group the norm does not communicate. With one, normalized_shape, weight and bias are this rank's shards, and
    so are the gradients of weight and bias.

    Shapes: input and output (*, *normalized_shape), floating point. The output has the input's dtype.

    Args:
        normalized_shape: sizes of the last axes on this rank, or size of the last one.
        eps: added to the mean square, or to its root. None: torch.finfo(torch.float64).eps for a float64 input, else
            torch.finfo(torch.float32).eps, as in torch.
        elementwise_affine: learn weight (and bias), of normalized_shape.
        device: of the parameters.
        dtype: of the parameters.
        bias: learn a bias, if elementwise_affine.
        eps_outside: add eps to the root. Both conventions exist. Use the one that the checkpoint was trained with.
        process_group: the ranks over which the last axes are split, each with a shard of any size, which may be 0. The
            other axes must be the same on all ranks. None: the last axes are not split.
        reproducible: add up the statistics, and the sums of the gradients over the ranks, in fixed point. Then they
            have the same bits however the axes are divided over ranks and threads, on one rank too. See the docs page
            `reproducible`.

    Collectives: with a process group of more than one rank, one all-reduce of R + 3 float64 in forward, for R
    positions, and one of R + 2 in backward. With `reproducible` it is two each way. The first input of each size also
    issues one all-gather of 512 bytes, in which the ranks compare their layer and their other axes. Otherwise none.

    Raises:
        DesyncError: on every rank, if the ranks are in different layers or calls, or if their inputs differ in dtype.
        ValueError: the last axes of the input are not normalized_shape; this rank is not in the group; on every rank,
            the ranks' other axes differ at the first input of a size (docs page `collectives`, "What is checked across
            ranks").
        TypeError: the input is not floating point, or is sparse or mkldnn; with a process group also if it is nested or
            a DTensor; weight or bias is not a tensor, or another argument has the wrong type.
        RuntimeError: weight or bias is on another device than the input.

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
        reproducible: bool = False,
    ):
        arguments.check_flags(
            elementwise_affine=elementwise_affine, bias=bias, eps_outside=eps_outside, reproducible=reproducible
        )
        arguments.check_numbers_or_none(eps=eps)
        arguments.check_factory_arguments(device, dtype)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        has_bias = elementwise_affine and bias
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(self.weight)) if has_bias else None)
        self.eps_outside = eps_outside
        self.process_group, self.reproducible = process_group, reproducible

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, (*, *normalized_shape)."""
        if isinstance(x, fx.Proxy) and self._fits_one_node(x):
            return self._as_node(x)
        shape, group = self.normalized_shape, None
        weight, bias = self._parameters_like(x)
        if self.process_group is not None:
            communicator = self._group.enter(x)  # first: it counts the call
            arguments.parse_normalized_shape(x, shape, weight, bias, split=True)  # before the ranks compare sizes
            group = self._group.exchange(communicator, self, x, x.shape[: -len(shape)])
        return functional.rms_norm(
            *(x, shape, weight, self.eps),
            bias=bias,
            eps_outside=self.eps_outside,
            process_group=group,
            reproducible=self.reproducible,
        )

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}, eps_outside={self.eps_outside}{self._group_repr()}"
        )

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0."""
        super().reset_parameters()
        if getattr(self, "bias", None) is not None:
            nn.init.zeros_(self.bias)  # type: ignore[arg-type]
