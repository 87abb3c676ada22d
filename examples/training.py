"""What the trainings of the examples share: the options, the loop with its checkpoints, and the record."""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import load, save
from common import (
    backend,
    batch_of_step,
    check_writable,
    learning_rate,
    my_device,
    on_all_ranks,
    on_rank_0,
    per_step,
    timed_all_reduce,
    without_buffer_broadcast,
    write,
)
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import TimedCommunicator


def positive(word):
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {word}")
    return number


def option_parser(description, *, steps, lr):
    """Return a parser with the options that every example has; `steps` and `lr` are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-per-rank", type=positive, default=16, metavar="N", help="samples (default: 16)")
    parser.add_argument("--steps", type=positive, default=steps, metavar="N", help=f"of training (default: {steps})")
    parser.add_argument("--lr", type=float, default=lr, help=f"learning rate (default: {lr})")
    parser.add_argument("--decay", type=positive, metavar="N", help="warm it up and let it fall to 0 in N steps")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="of the whole training (default: float32)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the record (default: a name in runs/)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="write the state of the training there")
    parser.add_argument("--checkpoint-every", type=positive, default=50, metavar="N", help="steps (default: 50)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if it is there")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for a rank that does not come")
    return parser


def parsed(parser, words=None):
    """Return the options in `words`, or on the command line. Options that contradict each other end the program."""
    args = parser.parse_args(words)
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint FILE")
    if args.out is not None and args.out == args.checkpoint:
        parser.error(f"expected different files for --out and --checkpoint, got {args.out} for both")
    return args


def run(name, args, load_data, train, evaluate, summary):
    """Join the job, train, evaluate, and write the record on rank 0.

    Args:
        name: of the example, for the name of the record.
        args: the options.
        load_data: reads the data and keeps them. It is called first, so that bad data end the program on all ranks.
        train: (args, group, track) -> model, record.
        evaluate: (model, args, group) -> what to add to the record. All ranks call it.
        summary: record -> what to print, before and after the name of the file.
    """
    from rich.console import Console
    from rich.progress import track

    group = syncnorm.init(timeout=args.timeout)
    path = args.out or Path("runs") / (
        f"{name}-{args.norm}-{backend()}-{group.size}x{args.batch_per_rank}-seed{args.seed}.json"
    )
    on_all_ranks(group, "--data", load_data)
    on_rank_0(group, "--out", check_writable, path)
    if args.checkpoint:
        on_rank_0(group, "--checkpoint", check_writable, args.checkpoint)
    description = f"{args.norm}, {group.size} x {args.batch_per_rank} samples"

    def shown(steps):
        return track(steps, description, console=Console(stderr=True), disable=group.rank != 0)

    model, record = train(args, group, shown)
    record |= evaluate(model, args, group)
    if group.rank == 0:
        on_all_ranks(LocalCommunicator(), "--out", write, path, json.dumps(record, indent=1).encode())
        before, after = summary(record)
        print(f"{before} -> {path}{after}")


def training_loop(args, group, model, norm_group, optimizer, loss_of, samples, about, track=iter):
    """Train the model on the ranks of the group, from a checkpoint if there is one and --resume; return the record.

    Args:
        args: the options.
        group: the ranks that share each global batch.
        model: the same weights on all ranks.
        norm_group: TimedCommunicator of the model's norms.
        optimizer: of the model's parameters.
        loss_of: (net, batch, share) -> the loss of this rank, whose mean over the ranks is that of the global batch.
            `net` is the model, or DistributedDataParallel around it. `batch`, (global batch,), are the numbers of the
            samples, and `share` is this rank's slice of it.
        samples: number of samples in the data.
        about: what decides the losses beside the shared options. A checkpoint of another training is refused.
        track: passes the steps on, and may show them.
    """
    global_batch = args.batch_per_rank * group.size
    shared = {name: getattr(args, name) for name in ("norm", "dtype", "lr", "decay", "seed")}
    training = {**shared, "global_batch": global_batch, **about}
    losses = torch.zeros(args.steps, dtype=torch.float64, device=my_device())
    first = load(args.checkpoint, training, model, optimizer, losses, group) if args.resume else 0
    gradient_group = TimedCommunicator(group)
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
        optimizer.zero_grad()
        loss = loss_of(net, batch_of_step(step, global_batch, samples, args.seed), share)
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
    return {
        **training,
        "backend": backend(),
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
        "device": str(losses.device),
        "loss": losses.tolist(),
    }
