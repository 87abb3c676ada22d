"""Weights that are kept and put back, to look at a network away from the path of its training."""

import torch


def kept(module):
    """Return copies of the parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


@torch.no_grad()
def put(module, values):
    """Set the parameters to values."""
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.copy_(value)
