"""Train a small residual CNN on scikit-learn's handwritten digits, normalized per rank or over all ranks.

One process, four ranks on Gloo (or NCCL where there is CUDA), four ranks on MPI, four tasks of Slurm's, with a global
batch of 16 each time:

    python examples/cnn.py --norm sync_bn --batch-per-rank 16
    torchrun --nproc-per-node 4 examples/cnn.py --norm sync_bn --batch-per-rank 4
    mpirun -n 4 python examples/cnn.py --norm sync_bn --batch-per-rank 4
    srun -n 4 python examples/cnn.py --norm sync_bn --batch-per-rank 4

Rank 0 writes a JSON record: the loss of each step over the global batch, the test accuracy, the speed, and what a step
costs in collectives and bytes. With --checkpoint FILE it also writes the state of the training from time to time;
the same command with --resume goes on from there, on any number of ranks with the same global batch.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import counted_all_reduce, launcher, load, per_step, positive, save, without_buffer_broadcast, write
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import CountingCommunicator

TRAIN_SIZE = 1500  # of 1797; the split is the same in every run


def digits():
    """Return train and test (images, labels): (N, 1, 8, 8) float32 in [0, 1] and (N,) int64, in a fixed order."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images / 16, dtype=torch.float32).unsqueeze(1)[order]
    labels = torch.tensor(bunch.target, dtype=torch.int64)[order]
    return (images[:TRAIN_SIZE], labels[:TRAIN_SIZE]), (images[TRAIN_SIZE:], labels[TRAIN_SIZE:])


class Residual(nn.Module):
    """x + BN(conv(relu(BN(conv(x))))), then relu; a strided 1x1 convolution on the way where the shape changes."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        return (self.body(x) + self.shortcut(x)).relu()


def cnn():
    """Images (N, 1, 8, 8) -> logits (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch):
    """Return the order of the training set in an epoch, (TRAIN_SIZE,)."""
    return torch.randperm(TRAIN_SIZE, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def batch_of_step(step, global_batch, seed):
    """Return which samples the global batch of a step holds, (global_batch,), whatever the number of ranks."""
    positions = range(step * global_batch, (step + 1) * global_batch)
    return torch.stack([permutation(seed, p // TRAIN_SIZE)[p % TRAIN_SIZE] for p in positions])


def accuracy(model, images, labels):
    """Return the share of images that the model, in eval mode, labels right. No collective."""
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=["bn", "sync_bn"], default="sync_bn", help="per rank, or over all ranks")
    parser.add_argument("--batch-per-rank", type=positive, default=16, metavar="N", help="samples (default: 16)")
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help="optimizer steps (default: 200)")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the data")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the record (default: runs/cnn-....json)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the state of the training there")
    parser.add_argument("--checkpoint-every", type=positive, default=50, metavar="N", help="steps (default: 50)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if it is there")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for a rank that does not come")
    args = parser.parse_args()
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint FILE")
    return args


def main():
    args = arguments()
    group = syncnorm.init(timeout=args.timeout)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    (images, labels), test = [[t.to(device) for t in part] for part in digits()]

    torch.manual_seed(args.seed)
    model = cnn().to(device)
    norm_group, gradient_group = CountingCommunicator(group), CountingCommunicator(group)
    if args.norm == "sync_bn":
        model = syncnorm.convert_sync_batchnorm(model, norm_group)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    global_batch = args.batch_per_rank * group.size
    training = {"norm": args.norm, "global_batch": global_batch, "lr": args.lr, "seed": args.seed}
    losses = torch.zeros(args.steps, dtype=torch.float64, device=device)
    first = 0
    if args.resume and args.checkpoint.exists():
        first = load(args.checkpoint, training, model, optimizer, losses)
    net = model
    if dist.is_initialized():
        net = DistributedDataParallel(model, **without_buffer_broadcast())
        net.register_comm_hook(gradient_group.calls, counted_all_reduce)

    share = slice(group.rank * args.batch_per_rank, (group.rank + 1) * args.batch_per_rank)
    averaged = first  # losses that are those of the global batch; those after them are this rank's
    steps = track(
        range(first, args.steps),
        f"{args.norm}, {group.size} x {args.batch_per_rank} samples",
        console=Console(stderr=True),
        disable=group.rank != 0,
    )
    group.barrier()
    start = time.perf_counter()
    for step in steps:
        batch = batch_of_step(step, global_batch, args.seed)[share]
        optimizer.zero_grad()
        loss = cross_entropy(net(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
        done = step + 1
        if done == args.steps or (args.checkpoint and done % args.checkpoint_every == 0):
            losses[averaged:done] = group.all_reduce(losses[averaged:done].clone()) / group.size
            averaged = done
            if args.checkpoint and group.rank == 0:
                save(args.checkpoint, training, model, optimizer, losses[:done])
    group.barrier()
    seconds = time.perf_counter() - start

    if group.rank == 0:
        trained = args.steps - first
        record = {
            "norm": args.norm,
            "launcher": launcher(),
            "ranks": group.size,
            "batch_per_rank": args.batch_per_rank,
            "steps": args.steps,
            "resumed_at_step": first,
            "lr": args.lr,
            "seed": args.seed,
            "test_accuracy": accuracy(model, *test),
            "samples_per_second": trained * global_batch / seconds,
            "per_step": {
                "norm": per_step(norm_group.calls, trained),
                "gradients": per_step(gradient_group.calls, trained),
            },
            "torch": torch.__version__,
            "device": str(device),
            "loss": losses.tolist(),
        }
        path = args.out or Path("runs") / "cnn-{norm}-{launcher}-{ranks}x{batch_per_rank}-seed{seed}.json".format(
            **record
        )
        write(path, json.dumps(record, indent=1).encode())
        print(f"test accuracy {record['test_accuracy']:.3f}, {record['samples_per_second']:.0f} samples/s -> {path}")


if __name__ == "__main__":
    main()
