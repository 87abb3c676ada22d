"""Small models without anything but the norm under test: a plain CNN and a perceptron.

Shapes: N samples, C channels, F features.
"""

import functools

import torch
from cnn import NORMS as CNN_NORMS
from torch import nn

import syncnorm


class Affine(nn.Module):
    """weight * x + bias, by channel: what a norm adds beside normalization. Stands for "no norm"."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):  # (N, C, *)
        shape = (-1, *[1] * (x.ndim - 2))
        return x * self.weight.view(shape) + self.bias.view(shape)


NORMS = {  # of C channels, for (N, C, *)
    **CNN_NORMS,
    "bn": functools.partial(syncnorm.SyncBatchNorm, process_group=syncnorm.communicators.LocalCommunicator()),
    "none": Affine,
}
FEATURE_NORMS = {  # of F features, for (N, F)
    "bn": NORMS["bn"],
    "ln": syncnorm.LayerNorm,
    "rms": syncnorm.RMSNorm,
    "none": Affine,
}


def plain_cnn(channels, classes, norm, widths=(16, 16, 32, 32, 64, 64)):
    """Images (N, channels, H, W) -> logits (N, classes): 3x3 convolutions, a norm and ReLU after each, no shortcuts.

    The weights are drawn as in He et al., 2015, which helps a network without norms most. Height and width are halved
    where the number of channels grows. Each layer is one Sequential of the result.
    """
    layers = []
    for wide in widths:
        stride = 2 if layers and wide > channels else 1
        conv = nn.Conv2d(channels, wide, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers.append(nn.Sequential(conv, norm(wide), nn.ReLU()))
        channels = wide
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    return nn.Sequential(*layers, head)


def perceptron(features, classes, norm, activation, widths=(100, 100, 100)):
    """Vectors (N, features) -> logits (N, classes): linear, norm, activation, for each width, and a linear head."""
    layers = []
    for wide in widths:
        layers.append(nn.Sequential(nn.Linear(features, wide, bias=False), norm(wide), activation()))
        features = wide
    return nn.Sequential(*layers, nn.Linear(features, classes))


def draw_as_he(model, kind):
    """Draw the weights of all layers of a kind as in He et al., 2015, which helps a network without norms most."""
    for layer in model.modules():
        if isinstance(layer, kind):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
