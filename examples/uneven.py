"""Train the CNN of cnn.py on shards of unequal length: ranks that run out of batches let the others train on.

One process on all shards, four ranks on Gloo (or NCCL where there is CUDA), four ranks on MPI, with one shard each:

    python examples/uneven.py --batches 6 3 0 4
    torchrun --nproc-per-node 4 examples/uneven.py --batches 6 3 0 4
    mpirun -n 4 python examples/uneven.py --batches 6 3 0 4

A step trains on the next batch of each shard that still has one. All three commands give the same losses, since
`syncnorm.join` lets ranks without batches take part with no samples. Rank 0 prints the loss of each step, over the
samples that are present, and with --out writes them into a JSON file.
"""

import argparse
import functools
import json
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from cnn import NORMS, cnn, scaled
from common import batch_of_step, check_writable, my_device, on_all_ranks, on_rank_0, write
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.communicators import LocalCommunicator


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", required=True, metavar="N", help="of each shard")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="samples of a batch (default: 4)")
    parser.add_argument("--norm", choices=("bn", "sync_bn"), default="sync_bn", help="as of cnn.py (default: sync_bn)")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: float32)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the record")
    args = parser.parse_args(words)
    if min(args.batches) < 0 or max(args.batches) == 0:
        parser.error(f"expected at least one batch, and no negative number, in --batches, got {args.batches}")
    return args


def train(args, group):
    """Return the loss of each step, over the samples of all shards that are present."""
    device, dtype = my_device(), getattr(torch, args.dtype)
    images, labels = [tensor.to(device) for tensor in datasets.load(None)[0]]
    torch.manual_seed(args.seed)
    model = cnn(images.shape[1], int(labels.max()) + 1, NORMS[args.norm]).to(device, dtype)
    if args.norm == "sync_bn":
        model = syncnorm.convert_sync_batchnorm(model)
    if dist.is_initialized() and group.size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)

    shards = list(enumerate(args.batches)) if group.size == 1 else [(group.rank, args.batches[group.rank])]
    losses = torch.zeros(max(args.batches), dtype=torch.float64, device=device)
    # the mean over the ranks that have a batch is the mean over the samples, since all batches have the same size
    with syncnorm.join(model, divide_by_initial_world_size=False):
        for step in range(max(batches for _, batches in shards)):
            batch = batch_of_step(step, len(args.batches) * args.batch_size, len(labels), args.seed)
            mine = torch.cat([batch.view(-1, args.batch_size)[shard] for shard, batches in shards if step < batches])
            optimizer.zero_grad()
            loss = cross_entropy(model(scaled(images[mine], dtype)), labels[mine])
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
    ranks = [sum(step < batches for batches in args.batches) for step in range(len(losses))]
    return (group.all_reduce(losses).cpu() / torch.tensor(ranks if group.size > 1 else 1)).tolist()


def main():
    args = arguments()
    group = syncnorm.init()
    on_all_ranks(group, "--data", functools.partial(datasets.load, None))
    on_all_ranks(group, "--batches", check_shards, args, group)
    if args.out:
        on_rank_0(group, "--out", check_writable, args.out)
    losses = train(args, group)
    if group.rank == 0:
        print("\n".join(f"step {step}: loss {loss:.6f}" for step, loss in enumerate(losses)))
        if args.out:
            record = {"ranks": group.size, "batches": args.batches, "loss": losses}
            on_all_ranks(LocalCommunicator(), "--out", write, args.out, json.dumps(record, indent=1).encode())


def check_shards(args, group):
    if group.size not in (1, len(args.batches)):
        raise ValueError(f"expected 1 rank, or as many as shards ({len(args.batches)}), got {group.size}")


if __name__ == "__main__":
    main()
