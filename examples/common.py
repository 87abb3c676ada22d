"""What the examples share: the order of the data, the count of what a step sends, checkpoints that are whole."""

import argparse
import functools
import inspect
import io
import os

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from syncnorm.launchers import launched
from syncnorm.testing import Call


def positive(word):
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {word}")
    return number


@functools.lru_cache(maxsize=2)
def permutation(size, seed, epoch):
    """Return the order of `size` samples in an epoch, (size,)."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def batch_of_step(step, global_batch, size, seed):
    """Return which of `size` samples are the global batch of a step, (global_batch,), whatever the number of ranks."""
    positions = range(step * global_batch, (step + 1) * global_batch)
    return torch.stack([permutation(size, seed, p // size)[p % size] for p in positions])


def without_buffer_broadcast():
    """DDP's option for leaving buffers alone: synchronized ones agree already. torch 2.13 gave it another name."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}


def counted_all_reduce(calls, bucket):
    """Average a bucket of gradients as DDP does, and note it in `calls`."""
    calls.append(Call("all_reduce", bucket.buffer().nbytes))
    return allreduce_hook(None, bucket)


def per_step(calls, steps):
    return {"collectives": len(calls) / steps, "bytes": sum(call.nbytes for call in calls) / steps}


def launcher():
    return launched().launcher.replace("none", "alone")


def save(path, training, model, optimizer, losses):
    """Write the state of a training after len(losses) steps."""
    state = {
        "training": training,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "loss": losses,
    }
    memory = io.BytesIO()
    torch.save(state, memory)
    write(path, memory.getbuffer())


def load(path, training, model, optimizer, losses):
    """Read the state of a training into model, optimizer and losses; return how many steps it has behind it."""
    state = torch.load(path, map_location=losses.device, weights_only=True)
    if state["training"] != training:
        raise SystemExit(f"expected a checkpoint of {training}, got one of {state['training']}: {path}")
    steps = len(state["loss"])
    if steps >= len(losses):
        raise SystemExit(f"expected a checkpoint of less than {len(losses)} steps, got one of {steps}: {path}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    losses[:steps] = state["loss"]
    return steps


def write(path, content):
    """Write a file so that whatever happens meanwhile leaves the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the new name too
    os.close(directory)
