"""GroupNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .. import arguments, functional
from ..communicators import ProcessGroupLike
from .process_group import Grouped

__all__ = ["GroupNorm"]


class GroupNorm(Grouped, nn.GroupNorm):
    """Group normalization over space and the channels of a group, which may be split over ranks (spatial parallelism).

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Arguments and state-dict keys are those of `torch.nn.GroupNorm` (torch 2.13: older ones have no `bias`), and so is
    the result without a process group: it needs no communication.

    Shapes: input and output (N, C, *) with any number of trailing axes.

    Args:
        num_groups: into how many groups the channels of this rank are divided.
        num_channels: C, on this rank.
        eps: added to the variance.
        affine: learn weight (and bias), (C,) each.
        device: of the parameters.
        dtype: of the parameters.
        bias: learn the bias, if affine.
        process_group: the ranks that have a part of each group: of its space, or of its channels; None: they are whole.
            Parts may differ in size. Where space is split, the gradients of weight and bias are this rank's share.

    Collectives: with a process group of more than one rank, one all-reduce of 2 N num_groups + 1 float64 in forward and
    one of 2 N num_groups in backward. At the first input of each N, also one all-gather of 512 bytes, by which the
    ranks compare their layer, N and num_groups. Otherwise none.

    Raises:
        DesyncError: on every rank; the ranks are in different layers, or their inputs differ in dtype.
        ValueError: the input has not num_channels, or the groups do not divide them; this rank is not in the group; on
            every rank, the ranks have unequal N or num_groups. Ranks that have met their N before do not compare it.
        TypeError: the input is not floating point, or is a DTensor beside a process group; an argument of the
            constructor has the wrong type.

    Source: Wu and He, Group Normalization, 2018.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        process_group: ProcessGroupLike = None,
    ):
        arguments.check_flags(affine=affine, bias=bias)
        arguments.check_numbers(eps=eps)
        arguments.check_factory_arguments(device, dtype)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C, *)."""
        if isinstance(input, fx.Proxy) and self._is_whole(input):
            return self._node(input)
        groups, split = self.num_groups, self.process_group is not None
        weight, bias = self._parameters_beside(input)
        arguments.check_groups(input, groups, weight, bias, self.num_channels, split=split)
        group = self._group.resolve_for(self, input, (len(input), groups))
        return functional.group_norm(input, groups, weight, bias, self.eps, process_group=group)

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0."""
        self._reset_affine()

    def extra_repr(self) -> str:
        """Return the arguments that the module was made with."""
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}{self._ranks()}"
        )
