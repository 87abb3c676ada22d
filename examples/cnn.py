"""Train a small residual CNN on handwritten digits, or images of yours, with one of five norms.

One process, four ranks on Gloo (or NCCL where there is CUDA), four ranks on MPI, four tasks of Slurm's, with a global
batch of 16 each time:

    python examples/cnn.py --norm sync_bn --batch-per-rank 16
    torchrun --nproc-per-node 4 examples/cnn.py --norm sync_bn --batch-per-rank 4
    mpirun -n 4 python examples/cnn.py --norm sync_bn --batch-per-rank 4
    srun -n 4 python examples/cnn.py --norm sync_bn --batch-per-rank 4

The norms (--norm), with what they take their statistics over:

    bn          the samples of one rank and space, for each channel
    sync_bn     the samples of all ranks and space, for each channel
    gn          space and the channels of each of 8 groups, for each sample: 2 channels in the narrowest layer, as
                Wu and He's 32 groups have in a ResNet
    ln, rms     the channels, for each sample and position: LayerNorm as in ConvNeXt, and RMSNorm in its place

The data are scikit-learn's digits, 8 x 8; --data FOLDER takes CIFAR-10 or a folder of images (examples/datasets.py).

With --dtype float64 the losses on several ranks agree with those on one to about 1e-14 over the whole training. In
float32 rounding errors grow with the steps.

Rank 0 writes a JSON record: the loss of each step over the global batch, the test accuracy, the speed, and what a step
costs in collectives, bytes and seconds of communication. With --checkpoint FILE it also writes the state of the
training from time to time; the same command with --resume goes on from there, on any number of ranks with the same
global batch. Rank 0 reads it for all: the other hosts need not see the file. A training whose loss or weights are no
longer finite ends, and leaves the last good checkpoint.
"""

import functools
from pathlib import Path

import datasets
import torch
from common import my_device
from torch import nn
from torch.nn.functional import cross_entropy
from training import option_parser, parsed, run, training_loop

import syncnorm
from syncnorm.testing import TimedCommunicator

GROUPS = 8  # of GroupNorm


class OverChannels(nn.Module):
    """A norm over the last axis, taken over the channels of (N, C, H, W)."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1).contiguous()


NORMS = {  # of C channels
    "bn": nn.BatchNorm2d,
    "sync_bn": nn.BatchNorm2d,  # is converted when the model is complete, as a model of yours would be
    "gn": functools.partial(syncnorm.GroupNorm, GROUPS),
    "ln": lambda channels: OverChannels(syncnorm.LayerNorm(channels)),
    "rms": lambda channels: OverChannels(syncnorm.RMSNorm(channels)),
}


class Residual(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), then relu; a strided 1x1 convolution on the way where the shape changes."""

    def __init__(self, channels_in, channels, stride, norm):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            norm(channels),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x):
        return (self.body(x) + self.shortcut(x)).relu()


def cnn(channels, classes, norm):
    """Images (N, channels, H, W) -> logits (N, classes)."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        norm(16),
        nn.ReLU(),
        Residual(16, 16, 1, norm),
        Residual(16, 32, 2, norm),
        Residual(32, 64, 2, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def scaled(images, dtype):
    """Return images as `dtype` in [0, 1]; they are stored as uint8 where that is all that they have."""
    return images.to(dtype) if images.is_floating_point() else images.to(dtype) / 255


def arguments(words=None):
    parser = option_parser(__doc__, steps=200, lr=0.05)
    parser.add_argument("--norm", choices=NORMS, default="sync_bn", help="see above (default: sync_bn)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10 or images (default: digits)")
    return parsed(parser, words)


def train(args, group, track=iter):
    """Train on the ranks of the group; return the model and a record. `track` passes the steps on and may show them."""
    device, dtype = my_device(), getattr(torch, args.dtype)
    images, labels = [tensor.to(device) for tensor in datasets.load(args.data)[0]]

    torch.manual_seed(args.seed)
    model = cnn(images.shape[1], int(labels.max()) + 1, NORMS[args.norm]).to(device, dtype)
    norm_group = TimedCommunicator(group)
    if args.norm == "sync_bn":
        model = syncnorm.convert_sync_batchnorm(model, norm_group)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    about = {"data": args.data.name if args.data else "digits"}

    def loss_of(net, batch, share):
        mine = batch[share]
        return cross_entropy(net(scaled(images[mine], dtype)), labels[mine])

    return model, training_loop(args, group, model, norm_group, optimizer, loss_of, len(labels), about, track)


def evaluate(model, args, group):
    """Return, on rank 0, the share of test images that the model, in eval mode, labels right. No collective."""
    if group.rank != 0:
        return {}
    model.eval()
    weight = next(model.parameters())
    right, count = 0, len(datasets.load(args.data)[1][1])
    with torch.no_grad():
        for images, labels in zip(*(tensor.split(500) for tensor in datasets.load(args.data)[1]), strict=True):
            scores = model(scaled(images.to(weight.device), weight.dtype))
            right += (scores.argmax(1).cpu() == labels).sum().item()
    return {"test_accuracy": right / count, "test_images": count}


def summary(record):
    return f"test accuracy {record['test_accuracy']:.3f}, {record['samples_per_second']:.0f} samples/s", ""


def main():
    args = arguments()
    run("cnn", args, functools.partial(datasets.load, args.data), train, evaluate, summary)


if __name__ == "__main__":
    main()
