"""What the examples share: the order of the data, the count of what a step sends, errors of all ranks, files."""

import contextlib
import functools
import inspect
import math
import os
import secrets
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


@functools.lru_cache(maxsize=2)
def permutation(size, seed, epoch):
    """Return the order of `size` samples in an epoch, (size,)."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def batch_of_step(step, global_batch, size, seed):
    """Return which of `size` samples are the global batch of a step, (global_batch,), whatever the number of ranks."""
    positions = range(step * global_batch, (step + 1) * global_batch)
    return torch.stack([permutation(size, seed, p // size)[p % size] for p in positions])


def learning_rate(args, step):
    """Return the learning rate of a step: constant, or with --decay N risen over N / 10 steps, then fallen to 0."""
    if args.decay is None:
        return args.lr
    return args.lr * min(1, 10 * (step + 1) / args.decay) * (1 + math.cos(math.pi * min(1, step / args.decay))) / 2


def without_buffer_broadcast():
    """DDP's option for leaving buffers alone: synchronized ones agree already. torch 2.13 gave it another name."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}


def timed_all_reduce(gradient_group, bucket):
    """Average a bucket of gradients as DDP does, and note it and its time in a TimedCommunicator."""
    stop = gradient_group.start("all_reduce", bucket.buffer())

    def averaged(reduced):
        stop()
        return reduced.value()[0]

    return allreduce_hook(None, bucket).then(averaged)


def per_step(calls, steps):
    return {"collectives": len(calls) / steps, "bytes": sum(call.nbytes for call in calls) / steps}


def my_device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backend():
    """Return the backend of torch.distributed, which tells Gloo, NCCL and MPI apart, or "alone"."""
    return dist.get_backend() if dist.is_initialized() else "alone"


def on_all_ranks(group, option, function, *args):
    """Return function(*args) of this rank. If it fails on any rank, the program ends on all of them.

    The exit status is 1 then, and rank 0 prints one line for each reason, which begins with the option concerned. All
    ranks of the group call it; `function` uses no collective.
    """
    result = problem = None
    try:
        result = function(*args)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    problems = group.all_gather_object(problem)
    if any(problems):
        if group.rank == 0:
            for reason in dict.fromkeys(filter(None, problems)):
                rank = problems.index(reason)
                print(f"{option}: {reason}" + f" (on rank {rank})" * (rank > 0), file=sys.stderr, flush=True)
        group.barrier()  # where one rank ends, launchers end the others: not before rank 0 has spoken
        raise SystemExit(1)
    return result


def on_rank_0(group, option, function, *args):
    """Return function(*args) on rank 0, None on the others; if it fails there, the program ends on all ranks."""
    return on_all_ranks(group, option, *((function, *args) if group.rank == 0 else (lambda: None,)))


def write(path, content):
    """Write a file so that whatever happens meanwhile leaves the old one or the new one, whole."""
    with beside(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the new name too
        os.close(directory)


def check_writable(path):
    """Raise what `write` would, unless for lack of space; leave nothing behind but the folder of the file."""
    with beside(path):
        pass


@contextlib.contextmanager
def beside(path):
    """Open a new file in the folder of `path`, made if need be; take it away again unless it was renamed.

    Its name is random and it is made exclusively, so nothing is written through a link that somebody put there. Only a
    process that is killed leaves it behind, as NAME.*.unfinished.

    Raises:
        OSError: it cannot be made or written, or what is at `path` is no file; with the path and the reason.
    """
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise OSError(
                f"expected a file or nothing there, got a {'link' if path.is_symlink() else 'folder or device'}"
            )
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.{secrets.token_hex(8)}.unfinished").open("xb") as file:
            try:
                yield file
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
