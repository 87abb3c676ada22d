"""Ranks that are in different layers: an error on every rank at the first call, not a sum of what does not belong."""

import contextlib
import copy
import re

import pytest
import torch
import torch.distributed as dist
from reports import check_report
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm import DesyncError, SyncBatchNorm
from syncnorm.testing import CountingCommunicator, run_ranks

X = torch.linspace(-1, 1, 4 * 6 * 3).view(4, 6, 3)


def error_of(train):
    """Return the text of the DesyncError that train(rank) raises, and whether the ranks can go on together after it."""
    group = syncnorm.communicator()
    try:
        train(group.rank)
    except DesyncError as error:
        return str(error), group.all_reduce(torch.ones(2)).tolist() == [group.size] * 2
    return None, True


class Block(nn.Module):
    """Two norms, of which rank 1 calls the second first if it is told to."""

    def __init__(self, channels=(6, 6), swap=None):
        super().__init__()
        self.first, self.second = (SyncBatchNorm(c) for c in channels)
        self.swap = swap

    def forward(self, x):
        norms = [self.first, self.second]
        for norm in norms[::-1] if self.swap == syncnorm.communicator().rank else norms:
            x = norm(x)
        return x


def another_order(rank):
    a, b = SyncBatchNorm(6), SyncBatchNorm(6)
    for layer in (a, b) if rank == 0 else (b, a):
        layer(X)


def another_order_of_copies(rank):
    layers = [copy.deepcopy(layer) for layer in 2 * [SyncBatchNorm(6)]]
    for layer in layers if rank == 0 else layers[::-1]:
        layer(X)


def another_order_on_a_group_of_its_own(rank):
    group = syncnorm.communicator().split(0)
    layers = SyncBatchNorm(6, process_group=group), SyncBatchNorm(6, process_group=group)
    for layer in layers if rank == 0 else layers[::-1]:
        layer(X)


def another_order_in_a_model(rank):
    nn.Sequential(nn.Identity(), Block(swap=1))(X)


def another_order_under_ddp(rank):
    DistributedDataParallel(Block(swap=1))(X)


def another_order_of_equal_models(rank):
    models = nn.Sequential(SyncBatchNorm(6)), nn.Sequential(SyncBatchNorm(6))
    for model in models if rank == 0 else models[::-1]:
        model(X)


def a_layer_left_out(rank):
    layers = [SyncBatchNorm(6) for _ in range(3)]
    for i, layer in enumerate(layers):
        if (rank, i) != (1, 0):
            layer(X)


def an_exception_that_was_caught(rank):
    """Rank 1 stops in the middle of a step, and goes on with the next one."""
    model = Block()
    for step in range(2):
        with contextlib.suppress(ValueError):
            y = model.first(X)
            if (rank, step) == (1, 0):
                raise ValueError("a bad sample")
            model.second(y)


def other_channels(rank):
    nn.Sequential(SyncBatchNorm(6 - rank))(X[:, : 6 - rank])


def another_dtype(rank):
    SyncBatchNorm(6)(X.double() if rank else X)


def another_norm(rank):
    group = syncnorm.communicator()
    layers = SyncBatchNorm(6), syncnorm.LayerNorm(3, process_group=group)
    layers[rank > 0](X)


def another_split_norm(rank):
    group = syncnorm.communicator()
    layers = [syncnorm.RMSNorm(3, process_group=group) for _ in range(2)]
    for layer in layers if rank == 0 else layers[::-1]:
        layer(X)


OUTSIDE = r"call 1 of \w+ no\. \d+, called outside a model: C = 6, float32, input \(4, 6, 3\)"


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("train", "of_rank_0", "of_rank_1"),
    [
        (another_order, OUTSIDE, OUTSIDE),
        (another_order_of_copies, OUTSIDE, OUTSIDE),
        (another_order_on_a_group_of_its_own, OUTSIDE, OUTSIDE),
        (another_order_in_a_model, r"1\.first of Sequential .*: C = 6", r"1\.second of Sequential .*: C = 6"),
        (another_order_of_equal_models, "0 of Sequential", "0 of Sequential"),
        (a_layer_left_out, OUTSIDE, OUTSIDE),
        (other_channels, "0 of Sequential .*: C = 6, float32", "0 of Sequential .*: C = 5, float32"),
        (another_dtype, "C = 6, float32", "C = 6, float64"),
        (another_norm, "SyncBatchNorm no. .*: C = 6", r"LayerNorm no. .*: sizes \(4, 6\)"),
        (another_split_norm, r"RMSNorm no. .*: sizes \(4, 6\)", r"RMSNorm no. .*: sizes \(4, 6\)"),
    ],
)
def test_ranks_in_different_layers(run, world_size, train, of_rank_0, of_rank_1):
    found = run(error_of, world_size, train)
    check_report(found, "expected all ranks to call the same layer, got", world_size, of_rank_0, of_rank_1)


def test_ranks_in_different_layers_under_ddp():
    for text, _ in run_ranks(error_of, 2, another_order_under_ddp):
        assert "  rank 0: call 1 of first of Block (" in text
        assert "  rank 1: call 1 of second of Block (" in text


def test_an_exception_that_one_rank_caught(run):
    (text, goes_on), other = run(error_of, 2, an_exception_that_was_caught)
    assert other == (text, goes_on)
    assert goes_on
    assert re.search(r"rank 0: call 1 of SyncBatchNorm no\. \d+, called", text)
    assert re.search(r"rank 1: call 2 of SyncBatchNorm no\. \d+, called", text)


class Nested(nn.Module):
    """A model that some ranks call by its part, or without a wrapper."""

    def __init__(self):
        super().__init__()
        self.body = Block()

    def forward(self, x):
        return self.body(x)


class Wrapper(nn.Module):
    """What DistributedDataParallel and its like are in the tree of modules."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def steps_without_a_false_alarm():
    """Do what may differ between ranks that are in the same layers. Return the collectives of some steps."""
    rank = syncnorm.communicator().rank
    if rank == 0:
        SyncBatchNorm(3)  # as a reference, which shifts the order of construction
    model = Nested()
    (model if rank else model.body)(X)
    wrapped = Nested()
    (Wrapper(wrapped) if rank else wrapped)(X)
    lone = SyncBatchNorm(6)
    nn.Sequential(lone)(X) if rank else lone(X)
    renewed = SyncBatchNorm(6)
    for _ in range(2):
        renewed(X[: rank + 1])
    counter = CountingCommunicator()
    renewed.process_group = counter
    renewed(X)
    renewed(X)
    for layer in (copy.deepcopy(renewed), renewed.eval()):
        layer(X)
    return [call.name for call in counter.calls]


def test_same_layers_that_are_reached_in_different_ways(run):
    assert run(steps_without_a_false_alarm, 2) == 2 * [3 * ["all_reduce"]]


def one_communicator_for_each_group():
    group = dist.new_group([0, 1])
    dist.barrier()  # none leaves while the other still connects
    return syncnorm.communicator(group) is syncnorm.communicator(group)


def test_layers_of_one_group_share_its_communicator():
    assert run_ranks(one_communicator_for_each_group, 2) == [True, True]
