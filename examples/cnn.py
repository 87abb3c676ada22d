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

Rank 0 writes a JSON record: the loss of each step over the global batch, the test accuracy, the speed, and what a step
costs in collectives, bytes and seconds of communication. With --checkpoint FILE it also writes the state of the
training from time to time; the same command with --resume goes on from there, on any number of ranks with the same
global batch. Rank 0 reads it for all: the other hosts need not see the file. A training whose loss or weights are no
longer finite ends, and leaves the last good checkpoint.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from checkpoints import load, save
from common import (
    TimedCommunicator,
    batch_of_step,
    check_writable,
    launcher,
    learning_rate,
    my_device,
    on_all_ranks,
    on_rank_0,
    per_step,
    positive,
    timed_all_reduce,
    without_buffer_broadcast,
    write,
)
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.communicators import LocalCommunicator

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


def scaled(images):
    """Return images as float32 in [0, 1]; they are stored as uint8 where that is all that they have."""
    return images if images.is_floating_point() else images.float() / 255


def evaluate(model, args, group):
    """Return, on rank 0, the share of test images that the model, in eval mode, labels right. No collective."""
    if group.rank != 0:
        return {}
    model.eval()
    device = next(model.parameters()).device
    right, count = 0, len(datasets.load(args.data)[1][1])
    with torch.no_grad():
        for images, labels in zip(*(tensor.split(500) for tensor in datasets.load(args.data)[1]), strict=True):
            right += (model(scaled(images.to(device))).argmax(1).cpu() == labels).sum().item()
    return {"test_accuracy": right / count, "test_images": count}


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=NORMS, default="sync_bn", help="see above (default: sync_bn)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10 or images (default: digits)")
    parser.add_argument("--batch-per-rank", type=positive, default=16, metavar="N", help="samples (default: 16)")
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help="optimizer steps (default: 200)")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate (default: 0.05)")
    parser.add_argument("--decay", type=positive, metavar="N", help="warm it up and let it fall to 0 in N steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the record (default: runs/cnn-....json)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the state of the training there")
    parser.add_argument("--checkpoint-every", type=positive, default=50, metavar="N", help="steps (default: 50)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if it is there")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for a rank that does not come")
    args = parser.parse_args(words)
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint FILE")
    if args.out is not None and args.out == args.checkpoint:
        parser.error(f"expected different files for --out and --checkpoint, got {args.out} for both")
    return args


def main():
    args = arguments()
    group = syncnorm.init(timeout=args.timeout)
    path = args.out or Path("runs") / (
        f"cnn-{args.norm}-{launcher()}-{group.size}x{args.batch_per_rank}-seed{args.seed}.json"
    )
    on_all_ranks(group, "--data", datasets.load, args.data)  # which keeps it
    on_rank_0(group, "--out", check_writable, path)
    if args.checkpoint:
        on_rank_0(group, "--checkpoint", check_writable, args.checkpoint)
    description = f"{args.norm}, {group.size} x {args.batch_per_rank} samples"
    model, record = train(
        args, group, lambda steps: track(steps, description, console=Console(stderr=True), disable=group.rank != 0)
    )
    record |= evaluate(model, args, group)
    if group.rank == 0:
        on_all_ranks(LocalCommunicator(), "--out", write, path, json.dumps(record, indent=1).encode())
        print(f"test accuracy {record['test_accuracy']:.3f}, {record['samples_per_second']:.0f} samples/s -> {path}")


def train(args, group, track=iter):
    """Train on the ranks of the group; return the model and a record. `track` passes the steps on and may show them."""
    device = my_device()
    images, labels = [tensor.to(device) for tensor in datasets.load(args.data)[0]]

    torch.manual_seed(args.seed)
    model = cnn(images.shape[1], int(labels.max()) + 1, NORMS[args.norm]).to(device)
    norm_group, gradient_group = TimedCommunicator(group, device), TimedCommunicator(group, device)
    if args.norm == "sync_bn":
        model = syncnorm.convert_sync_batchnorm(model, norm_group)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    global_batch = args.batch_per_rank * group.size
    training = {
        "norm": args.norm,
        "data": args.data.name if args.data else "digits",
        "global_batch": global_batch,
        "lr": args.lr,
        "decay": args.decay,
        "seed": args.seed,
    }
    losses = torch.zeros(args.steps, dtype=torch.float64, device=device)
    first = 0
    if args.resume:
        first = load(args.checkpoint, training, model, optimizer, losses, group)
    net = model
    if dist.is_initialized() and group.size > 1:
        net = DistributedDataParallel(model, **without_buffer_broadcast())
        net.register_comm_hook(gradient_group, timed_all_reduce)

    share = slice(group.rank * args.batch_per_rank, (group.rank + 1) * args.batch_per_rank)
    averaged = first  # losses that are those of the global batch; those after them are this rank's
    group.barrier()
    start = time.perf_counter()
    for step in track(range(first, args.steps)):
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        batch = batch_of_step(step, global_batch, len(labels), args.seed)[share]
        optimizer.zero_grad()
        loss = cross_entropy(net(scaled(images[batch])), labels[batch])
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        done = step + 1
        if done == args.steps or (args.checkpoint and done % args.checkpoint_every == 0):
            losses[averaged:done] = group.all_reduce(losses[averaged:done].clone()) / group.size
            averaged = done
            if args.checkpoint:
                save(args.checkpoint, training, model, optimizer, losses[:done], group)
    group.barrier()
    seconds = time.perf_counter() - start

    trained = args.steps - first
    return model, {
        **training,
        "launcher": launcher(),
        "ranks": group.size,
        "batch_per_rank": args.batch_per_rank,
        "steps": args.steps,
        "resumed_at_step": first,
        "samples_per_second": trained * global_batch / seconds,
        "seconds_per_step": seconds / trained,
        "communication_seconds_per_step": (norm_group.seconds() + gradient_group.seconds()) / trained,
        "per_step": {
            "norm": per_step(norm_group.calls, trained),
            "gradients": per_step(gradient_group.calls, trained),
        },
        "torch": torch.__version__,
        "device": str(device),
        "loss": losses.tolist(),
    }


if __name__ == "__main__":
    main()
