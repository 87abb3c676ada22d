"""GroupNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from .. import arguments, functional
from ..communicators import ProcessGroupLike
from .process_group import ProcessGroupMixin

__all__ = ["GroupNorm"]


class GroupNorm(ProcessGroupMixin, nn.GroupNorm):
    """Group normalization over space and the channels of a group, which may be split over ranks (spatial parallelism).

        y = (x - mean) / sqrt(var + eps) * weight + bias

    mean and (biased) var are computed over space and the channels of each group, for each sample. Arguments and
    state-dict keys are those of `torch.nn.GroupNorm` of torch 2.13 (older versions have no `bias`). Without a process
    group the result is torch's, without communication.

    Shapes: input and output (N, C, *) with any number of trailing axes, floating point. The output has the input's
    dtype.

    Args:
        num_groups: number of groups into which this rank's channels are divided.
        num_channels: C, on this rank.
        eps: added to the variance.
        affine: learn weight (and bias), (C,) each.
        device: of the parameters.
        dtype: of the parameters.
        bias: learn the bias, if affine.
        process_group: the ranks over which each group is split: its space (images or volumes split along any axes) or
            its channels. Shards may differ in size and may be empty. N and num_groups must be the same on all ranks. If
            space is split, the gradients of weight and bias are this rank's share, to be summed over the ranks. None:
            the groups are not split.
        reproducible: add up the statistics, and the sums of the gradients over the ranks, in fixed point. Then they
            have the same bits however the axes are divided over ranks and threads, on one rank too. See the docs page
            `reproducible`.

    Collectives: with a process group of more than one rank, one all-reduce of 2 N num_groups + 3 float64 in forward and
    one of 2 N num_groups + 2 in backward. With `reproducible` it is two each way. The first input of each N also issues
    one all-gather of 512 bytes, in which the ranks compare their layer, N and num_groups. Otherwise none.

    Raises:
        DesyncError: on every rank, if the ranks are in different layers or calls, or if their inputs differ in dtype.
        ValueError: the input does not have num_channels channels; num_groups does not divide them; this rank is not in
            the group; on every rank, the ranks differ in N or num_groups at the first input of an N (docs page
            `collectives`, "What is checked across ranks").
        TypeError: the input is not floating point, is nested, sparse or mkldnn, or is a DTensor with a process group;
            weight or bias is not a tensor, or another argument has the wrong type.
        RuntimeError: weight or bias is on another device than the input.

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
        reproducible: bool = False,
    ):
        arguments.check_flags(affine=affine, bias=bias, reproducible=reproducible)
        arguments.check_numbers(eps=eps)
        arguments.check_factory_arguments(device, dtype)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group, self.reproducible = process_group, reproducible

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`, (N, C, *)."""
        if isinstance(input, fx.Proxy) and self._fits_one_node(input):
            return self._as_node(input)
        groups, group = self.num_groups, None
        weight, bias = self._parameters_like(input)
        if self.process_group is not None:
            communicator = self._group.enter(input)  # first: it counts the call
            arguments.check_groups(input, groups, weight, bias, self.num_channels, split=True)
            group = self._group.exchange(communicator, self, input, (len(input), groups))
        elif weight is None:  # the function does not know num_channels
            arguments.check_groups(input, groups, weight, bias, self.num_channels, split=False)
        return functional.group_norm(
            input, groups, weight, bias, self.eps, process_group=group, reproducible=self.reproducible
        )

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0."""
        self._reset_affine()

    def extra_repr(self) -> str:
        """Return the arguments of the constructor."""
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}{self._group_repr()}"
        )
