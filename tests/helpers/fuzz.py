"""Drawn cases on the ranks and against the oracle, and a long training run that reports what the process holds.

The ranks import this file, so it imports no hypothesis.
"""

import os
import threading
from unittest import mock

import oracle
import torch
from oracle import assert_matches, on_shard, rows, shard
from torch import nn

import syncnorm
from syncnorm import communicators

REFUSAL = "Expected more than 1 value per channel when training, got input size"
LEAST_DEVIATION = 0.2  # of a channel, in cases to which the oracle's tolerance applies: it is for one of about 1
PAGE = os.sysconf("SC_PAGE_SIZE")
oracle_tolerance = oracle.tolerance
FEATURES = 5  # of the input of the soaked model


def of_width(case):
    """Let the oracle's functions work on the number of channels that the shapes of the case have."""
    return mock.patch.object(oracle, "CHANNELS", case.shapes[0][1])


def tolerance(dtype, mean=0.0):
    """Return the oracle's tolerance; of float64, whose moments lose mean²/var, that for the least deviation."""
    return 1e-11 + 8e-15 * mean**2 if dtype == torch.float64 else oracle_tolerance(dtype, mean)


def described(case):
    """Return the case for a reader, and as code that repeats it."""
    return f"{case}\n{case!r}"


def counted(case):
    """Return, for each step, the positions that count, as (positions, C) float64."""
    with of_width(case):
        steps = [[shard(case, rank, step) for rank in range(case.world_size)] for step in range(case.steps)]
        return [rows([s.x for s in shards])[torch.cat([s.mask.flatten() for s in shards])] for shards in steps]


def expectation(case):
    """Return what a training run of the case ends with, or None if the oracle has no answer.

    It is "normalized"; "refused", as the whole batch has one value per channel; or "unmoved", as nothing counts.
    """
    steps = counted(case)
    sizes = [len(values) for values in steps]
    if not any(sizes):
        return "unmoved"
    if min(sizes) == 0:
        return None
    if min(sizes) == 1:
        return "refused"
    deviations = torch.stack([values.std(0, correction=0) for values in steps])
    # Nearly equal values amplify the rounding of the gradients. Equal ones, as bfloat16 has far from zero, do not.
    return None if ((deviations > 0) & (deviations < LEAST_DEVIATION)).any() else "normalized"


def on_ranks(cases, kind=syncnorm.SyncBatchNorm):
    """Run the cases one after another on this rank. Return for each the result, or the text of the refusal."""
    return [outcome(case, kind) for case in cases]


def in_pairs(cases_of_pairs):
    """Run other cases in each pair of ranks, at the same time. Return the outcomes of this rank's pair."""
    world, had_default = syncnorm.communicator(), communicators.has_default()
    communicators.set_default(world.split(world.rank // 2))
    try:
        outcomes = on_ranks(cases_of_pairs[world.rank // 2])
    finally:
        communicators.set_default(world if had_default else None)
    world.barrier()
    return outcomes


def outcome(case, kind):
    try:
        with of_width(case):
            return on_shard(case, kind)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(REFUSAL):
            return str(error)
        raise AssertionError(f"{type(error).__name__} in {described(case)}: {error}") from error


def check(case, outcomes):
    """Compare the outcomes of all ranks with what the oracle expects. Raise AssertionError that names the case."""
    expected = expectation(case)
    try:
        if expected == "refused":
            assert all(isinstance(text, str) for text in outcomes), "expected a ValueError on every rank"
            return
        assert not any(isinstance(text, str) for text in outcomes), f"expected no error, got {outcomes}"
        if expected == "unmoved":
            assert_unmoved(outcomes, case)
        else:
            with of_width(case), mock.patch.object(oracle, "tolerance", tolerance):
                assert_matches(outcomes, case)
    except AssertionError as error:
        raise AssertionError(f"{described(case)}: {error}") from error


def assert_unmoved(results, case):
    """Check a case in which nothing counts."""
    options = {key: value for key, value in case.layer.items() if key != "inplace"}
    initial = dict(syncnorm.SyncBatchNorm(case.shapes[0][1], **options).named_buffers())
    for result in results:
        assert result.buffers.keys() == initial.keys()
        for name, buffer in result.buffers.items():
            assert torch.equal(buffer.double(), initial[name].double()), f"{name} moved"
        if case.dtype != torch.float16:  # whose range the values that do not count may exceed
            assert all(tensor.isfinite().all() for tensor in [*result.tensors, *result.grads.values()])


class Held:
    """What this process holds: resident memory in bytes, open descriptors, threads."""

    def __init__(self):
        with open("/proc/self/statm") as statm:
            self.resident = PAGE * int(statm.read().split()[1])
        with open("/proc/self/status") as status:
            self.threads = next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
        self.python_threads = threading.active_count()
        self.descriptors = len(os.listdir("/proc/self/fd"))

    def __repr__(self):
        return (
            f"{self.resident / 2**20:.1f} MiB, {self.descriptors} descriptors, {self.threads} threads "
            f"({self.python_threads} of Python)"
        )


def held_around(step, steps, warmup):
    """Call step(i) for each i below `steps`. Return what is held after the warm-up, and after the last step."""
    for i in range(warmup):
        step(i)
    before = Held()
    for i in range(warmup, steps):
        step(i)
    return before, Held()


def sizes_of(steps, world_size):
    """Return the number of samples of each rank in each step, 0 to 3, the same on all ranks. No total is 1."""
    sizes = torch.randint(4, (steps, world_size), generator=torch.Generator().manual_seed(7))
    sizes[sizes.sum(1) == 1, 0] += 1
    return sizes.tolist()


def soaked_model(norm, dtype):
    """Return a small model with two norms. Its weights are the same on all ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(FEATURES, 8), norm(8), nn.ReLU(), nn.Linear(8, 4), norm(4)
    return nn.Sequential(*layers).to(dtype)


def batch_of(step, rank, size):
    generator = torch.Generator().manual_seed(step * 16 + rank)
    return torch.randn(size, FEATURES, generator=generator) + 0.3 * rank


def training_step(model, x):
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def soak(steps, warmup, compared):
    """Train on shards of which some are empty, with a pass in eval mode now and then.

    Return what is held after the warm-up and at the end, and the running statistics after `compared` steps and at the
    end.
    """
    group = syncnorm.communicator()
    model = soaked_model(syncnorm.SyncBatchNorm, torch.float32)
    sizes = sizes_of(steps, group.size)
    passes_in_eval = (torch.rand(steps, generator=torch.Generator().manual_seed(8)) < 0.05).tolist()
    early = {}

    def step(i):
        training_step(model, batch_of(i, group.rank, sizes[i][group.rank]))
        if passes_in_eval[i]:
            assert model.eval()(batch_of(i, group.rank, 2)).isfinite().all()
            model.train()
        if i == compared - 1:
            early.update(statistics(model))

    held = held_around(step, steps, warmup)
    return held, early, statistics(model)


def soak_in_one_process(steps, world_size):
    """Return the running statistics of `steps` steps on the whole batches in float64."""
    model = soaked_model(nn.BatchNorm1d, torch.float64)
    for i, sizes in enumerate(sizes_of(steps, world_size)):
        if any(sizes):
            training_step(model, torch.cat([batch_of(i, rank, size).double() for rank, size in enumerate(sizes)]))
    return statistics(model)
