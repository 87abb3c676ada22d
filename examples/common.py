"""What the examples share: the order of the data, the count of what a step sends, checkpoints that are whole."""

import argparse
import functools
import inspect
import io
import math
import os
import time

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from syncnorm.launchers import launched
from syncnorm.testing import Call, CountingCommunicator


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


def learning_rate(args, step):
    """Return the learning rate of a step: constant, or with --decay N risen over N / 10 steps, then fallen to 0."""
    if args.decay is None:
        return args.lr
    return args.lr * min(1, 10 * (step + 1) / args.decay) * (1 + math.cos(math.pi * min(1, step / args.decay))) / 2


def without_buffer_broadcast():
    """DDP's option for leaving buffers alone: synchronized ones agree already. torch 2.13 gave it another name."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if renamed else "broadcast_buffers": False}


class TimedCommunicator(CountingCommunicator):
    """A CountingCommunicator that times its all-reduces; to wait for the slowest rank is part of them.

    On a GPU the times are taken by events, for which nothing waits until `seconds` is called.
    """

    def __init__(self, group, device):
        super().__init__(group)
        self.cuda = device.type == "cuda"
        self.spans = []

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def all_reduce(self, tensor):
        start = self.now()
        result = super().all_reduce(tensor)
        self.spans.append((start, self.now()))
        return result

    def seconds(self):
        """Return the time of all collectives so far."""
        if not self.cuda:
            return sum(end - start for start, end in self.spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.spans) / 1000


def timed_all_reduce(gradient_group, bucket):
    """Average a bucket of gradients as DDP does, and note it and its time in a TimedCommunicator."""
    gradient_group.calls.append(Call("all_reduce", bucket.buffer().nbytes))
    start = gradient_group.now()

    def ended(reduced):
        gradient_group.spans.append((start, gradient_group.now()))
        return reduced.value()[0]

    return allreduce_hook(None, bucket).then(ended)


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
