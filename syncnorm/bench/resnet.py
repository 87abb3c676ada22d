"""A ResNet of bottleneck blocks, in torchvision's architecture, on a norm that can hold the add and the ReLU after it.

Source: He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, 2016; stride in the 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["BLOCKS", "InPlace", "NormFactory", "ResNet", "Separate"]

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # by depth
EXPANSION = 4

NormFactory = Callable[[int, bool, bool], nn.Module]
"""Channels, whether a ReLU follows, whether a residual is added before it -> norm(x), or norm(x, residual=r)."""


class Separate(nn.Module):
    """A norm, then the residual's addition and the ReLU as passes of their own."""

    def __init__(self, norm: nn.Module, relu: bool):
        super().__init__()
        self.norm, self.relu = norm, relu

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Return relu(norm(x) + residual), as far as there are these."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y.add_(residual)
        return F.relu(y, inplace=True) if self.relu else y


class InPlace(nn.Module):
    """A norm that writes over its input, and whose output must be kept: the residual's sum is another tensor.

    Args:
        norm: without an activation.
        activation: applied to the sum, whose memory it may take.
    """

    def __init__(self, norm: nn.Module, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, *, residual: Tensor) -> Tensor:
        """Return activation(norm(x) + residual)."""
        return self.activation(self.norm(x) + residual)


class Bottleneck(nn.Module):
    """relu(x + f(x)), f being convolutions of 1x1, 3x3 and 1x1; x itself is convolved where its shape changes."""

    def __init__(self, channels: int, width: int, stride: int, norm: NormFactory):
        super().__init__()
        wide = EXPANSION * width
        self.conv1, self.norm1 = _conv(channels, width, 1), norm(width, True, False)
        self.conv2, self.norm2 = _conv(width, width, 3, stride), norm(width, True, False)
        self.conv3, self.norm3 = _conv(width, wide, 1), norm(wide, True, True)
        changes = stride != 1 or channels != wide
        convolved = (_conv(channels, wide, 1, stride), norm(wide, False, False)) if changes else ()
        self.shortcut = nn.Sequential(*convolved)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4 width, H / stride, W / stride)."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(y), residual=self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Images (N, 3, H, W) -> scores (N, classes).

    Args:
        blocks: how many in each of the four stages.
        norm: makes the norms.
        width: channels of the first stage, before expansion.
        classes: how many.
    """

    def __init__(self, blocks: Sequence[int], norm: NormFactory, width: int = 64, classes: int = 1000):
        super().__init__()
        stem = [_conv(3, width, 7, 2), norm(width, True, False), nn.MaxPool2d(3, 2, padding=1)]
        channels, stages = width, []
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Bottleneck(channels, width * 2**stage, stride, norm))
                channels = EXPANSION * width * 2**stage
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        self.layers = nn.Sequential(*stem, *stages, *head)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores."""
        return self.layers(images)  # type: ignore[no-any-return]


def _conv(channels: int, out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)
