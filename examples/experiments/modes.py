"""The loss of a model in train mode and in eval mode, and BatchNorm with several running statistics at once."""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.models import NORMS

MOMENTA = {"0.5": 0.5, "0.1": 0.1, "0.01": 0.01, "cumulative": None}


class Tracking(nn.Module):
    """BatchNorm with running statistics of each of MOMENTA. In eval mode it uses those of the `chosen` one."""

    def __init__(self, channels):
        super().__init__()
        self.norms = nn.ModuleList(NORMS["bn"](channels, momentum=momentum) for momentum in MOMENTA.values())
        for norm in self.norms[1:]:
            norm.weight, norm.bias = self.norms[0].weight, self.norms[0].bias
        self.chosen = 0

    def forward(self, x):
        if not self.training:
            return self.norms[self.chosen](x)
        with torch.no_grad():
            for norm in self.norms[1:]:
                norm(x)
        return self.norms[0](x)


def chosen(model, place):
    for module in model.modules():
        if isinstance(module, Tracking):
            module.chosen = place
    return model


@torch.no_grad()
def loss(model, batches):
    return sum(cross_entropy(model(images), labels).item() for images, labels in batches) / len(batches)


def ratios(in_eval_mode, in_train_mode):
    """Return the loss in train mode, and the logarithm of that in eval mode over it, by statistics."""
    logarithms = {f"logarithm {name}".strip(): math.log(one / in_train_mode) for name, one in in_eval_mode.items()}
    return {"loss in train mode": in_train_mode} | logarithms
