"""The norms whose cost is measured: this library's, PyTorch's, and their formulas composed of PyTorch's operations.

All take the same number of values, N * 65536: N images (N, 64, 32, 32), in NCHW or NHWC memory, or (N * 256, 256)
features.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn

import syncnorm
from syncnorm.communicators import LocalCommunicator

CHANNELS, SIDE, FEATURES = 64, 32, 256
VALUES = CHANNELS * SIDE * SIDE  # of one image
GROUPS = 8
MADE_FOR = {"rms": "features", "bn": "NCHW", "gn": "NCHW", "ln": "features"}
NORMS = {  # by implementation: norms of so many channels or features
    "ours": {
        "rms": syncnorm.RMSNorm,
        "bn": functools.partial(syncnorm.SyncBatchNorm, process_group=LocalCommunicator()),
        "gn": functools.partial(syncnorm.GroupNorm, GROUPS),
        "ln": syncnorm.LayerNorm,
    },
    "torch": {
        "rms": nn.RMSNorm,
        "bn": nn.BatchNorm2d,
        "gn": functools.partial(nn.GroupNorm, GROUPS),
        "ln": nn.LayerNorm,
    },
}
LAYOUTS = {  # beside the one that each is made for
    "rms": ("features", "NHWC"),
    "bn": ("NCHW", "NHWC", "features"),
    "gn": ("NCHW", "NHWC"),
    "ln": ("features", "NHWC"),
}


class Name(NamedTuple):
    """What a layer is called: norm, implementation and layout. A metric has a name, and what is measured of it."""

    norm: str
    implementation: str
    layout: str

    def metric(self, what):
        return "/".join([*self, what])


class Composed(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, each operation by itself; RMSNorm has neither mean nor bias.

    Args:
        axes: over which mean and variance are taken.
        shape: of weight and bias, which broadcasts.
        centered: False is RMSNorm.
        groups: into which the channels are divided; 0 leaves them.
    """

    def __init__(self, axes, shape, centered=True, groups=0):
        super().__init__()
        self.axes, self.centered, self.groups = axes, centered, groups
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if centered else None

    def forward(self, x):
        shape = x.shape
        if self.groups:
            x = x.unflatten(1, (self.groups, -1))
        if self.centered:
            x = x - x.mean(self.axes, keepdim=True)
        y = (x * (x.square().mean(self.axes, keepdim=True) + 1e-5).rsqrt()).view(shape) * self.weight
        return y if self.bias is None else y + self.bias


COMPOSED = {
    "rms": functools.partial(Composed, -1, (FEATURES,), centered=False),
    "bn": functools.partial(Composed, (0, 2, 3), (CHANNELS, 1, 1)),
    "gn": functools.partial(Composed, (2, 3, 4), (CHANNELS, 1, 1), groups=GROUPS),
    "ln": functools.partial(Composed, -1, (FEATURES,)),
}


def layers():
    """Return modules by Name: norms by themselves, and followed by a ReLU, which BatchNorm can compute itself."""
    made = {}
    for implementation, norms in NORMS.items():
        for norm, layouts in LAYOUTS.items():
            for layout in layouts:
                kind = nn.BatchNorm1d if (norm, implementation, layout) == ("bn", "torch", "features") else norms[norm]
                made[Name(norm, implementation, layout)] = kind(FEATURES if layout == "features" else CHANNELS)
    made |= {Name(norm, "composed", MADE_FOR[norm]): module() for norm, module in COMPOSED.items()}
    for norm, layout in MADE_FOR.items():
        alone = NORMS["ours"][norm](FEATURES if layout == "features" else CHANNELS)
        made[Name(norm, "ours, then ReLU", layout)] = nn.Sequential(alone, nn.ReLU(inplace=True))
    fused = NORMS["ours"]["bn"](CHANNELS, activation="relu")
    return made | {Name("bn", "ours with ReLU", MADE_FOR["bn"]): fused}


def tensors(batch, device, seed):
    """Return random values in each layout, which share memory where they can."""
    generator = torch.Generator(device).manual_seed(seed)
    images = torch.randn(batch, CHANNELS, SIDE, SIDE, generator=generator, device=device)
    last = images.contiguous(memory_format=torch.channels_last)
    return {"NCHW": images, "NHWC": last, "features": images.view(-1, FEATURES)}


def of_layer(name, tensor):
    """Return a tensor as the layer takes it: LayerNorm and RMSNorm want the channels last."""
    return tensor.permute(0, 2, 3, 1) if name.norm in ("ln", "rms") and name.layout == "NHWC" else tensor


def kept(layer, x):
    """Return the bytes that a layer keeps for backward, its input included. Each storage counts once."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)  # alive until all is counted, lest another tensor get its memory
    del y
    return sum(saved.values())


def nodes(y):
    """Return the number of operations whose gradients autograd computes for y."""
    found, ahead = set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found and "AccumulateGrad" not in node.name():
            found.add(node)
            ahead += [below for below, _ in node.next_functions]
    return len(found)
