"""Activation checkpointing: a recomputation takes the statistics of its first pass, and has no collective of its own.

Each way to checkpoint is held against the same steps without it, bit by bit: outputs, gradients and buffers.
"""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.distributed._composable import checkpoint as composable
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import syncnorm
from syncnorm import SyncBatchNorm, checkpointing
from syncnorm.testing import CountingCommunicator

STEPS = 2
WORLD_SIZES = [1, 2, 4]


def block(group, **arguments):
    return nn.Sequential(
        nn.Conv1d(4, 4, 3, padding=1),
        SyncBatchNorm(4, process_group=group, **arguments),
        nn.Dropout(0.3),
        SyncBatchNorm(4, process_group=group, activation="relu", **arguments),
    )


def plain(model, x):
    return model[1](model[0](x))


def each(model, x, reentrant):
    for part in model:
        x = checkpoint(part, x, use_reentrant=reentrant)
    return x


def nested(model, x, outer, inner):
    return checkpoint(lambda x: checkpoint(model[1], model[0](x), use_reentrant=inner), x, use_reentrant=outer)


def in_sequence(model, x):
    return checkpoint_sequential(model, 2, x, use_reentrant=False)


def in_a_loop(model, x):
    """The same part twice in one segment, and once more in another one."""
    x = checkpoint(lambda x: model[0](model[0](x)), x, use_reentrant=False)
    return checkpoint(lambda x: model[1](model[0](x)), x, use_reentrant=False)


def in_a_plain_loop(model, x):
    return model[1](model[0](model[0](model[0](x))))


def without_early_stop(model, x):
    with set_checkpoint_early_stop(False):
        return each(model, x, False)


def selective(model, x, policy):
    contexts = functools.partial(create_selective_checkpoint_contexts, lambda _context, op, *_a, **_k: policy(op))
    return checkpoint(lambda x: plain(model, x), x, use_reentrant=False, context_fn=contexts)


def some(op):
    return CheckpointPolicy.MUST_SAVE if "convolution" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


def all_others(op):
    """All operations that give a tensor which is not written to afterwards: torch refuses to save the others."""
    written = op._schema.is_mutable or "empty" in str(op)
    return CheckpointPolicy.PREFER_RECOMPUTE if written else CheckpointPolicy.MUST_SAVE


def below_other_hooks(model, x):
    def inner(x):
        with torch.autograd.graph.save_on_cpu():
            return plain(model, x)

    return checkpoint(inner, x, use_reentrant=False)


def by_module(model, x):
    for part in model:
        if not getattr(part, "is_checkpointed", False):
            composable(part)
            part.is_checkpointed = True
    return plain(model, x)


WAYS = {
    "reentrant": functools.partial(each, reentrant=True),
    "non-reentrant": functools.partial(each, reentrant=False),
    "non-reentrant in non-reentrant": functools.partial(nested, outer=False, inner=False),
    "reentrant in non-reentrant": functools.partial(nested, outer=False, inner=True),
    "non-reentrant in reentrant": functools.partial(nested, outer=True, inner=False),
    "reentrant in reentrant": functools.partial(nested, outer=True, inner=True),
    "sequential": in_sequence,
    "loop": in_a_loop,
    "no early stop": without_early_stop,
    "policy that saves convolutions": functools.partial(selective, policy=some),
    "policy that saves all": functools.partial(selective, policy=all_others),
    "save_on_cpu": below_other_hooks,
    "composable": by_module,
}


def train(forward, **arguments):
    """Return what a rank has after some steps, and how many collectives each step issued."""
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")  # in a recomputation
    group = CountingCommunicator(syncnorm.communicator())
    torch.manual_seed(0)
    model = nn.Sequential(block(group, **arguments), block(group, **arguments))
    generator = torch.Generator().manual_seed(group.rank)
    results, calls = [], []
    for _ in range(STEPS):
        x = torch.randn(3 + group.rank, 4, 5, generator=generator).requires_grad_()
        group.calls.clear()
        model.zero_grad()
        y = forward(model, x)
        y.backward(torch.randn(y.shape, generator=generator))
        calls.append(len(group.calls))
        results += [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    return [*results, *model.buffers()], calls


def with_and_without(ways, arguments):
    """Return for each way the training with it and without it."""
    return {
        way: (train(WAYS[way], **arguments), train(in_a_plain_loop if way == "loop" else plain, **arguments))
        for way in ways
    }


def assert_alike(of_ways):
    for way, ((tensors, calls), (wanted, wanted_calls)) in of_ways.items():
        assert calls == wanted_calls, way
        for tensor, other in zip(tensors, wanted, strict=True):
            assert torch.equal(tensor, other), way


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_it_changes_no_bit_and_adds_no_collective(run, world_size):
    for of_ways in run(with_and_without, world_size, list(WAYS), {}):
        assert_alike(of_ways)
        for way, (_, (_, calls)) in of_ways.items():
            assert calls == [0 if world_size == 1 else 2 * (8 if way == "loop" else 4)] * STEPS


@pytest.mark.parametrize("arguments", [{"momentum": None}, {"dtype": torch.bfloat16}, {"affine": False}], ids=str)
def test_it_does_for_other_layers(run, arguments):
    ways = ["reentrant", "non-reentrant in non-reentrant", "policy that saves all"]
    for of_ways in run(with_and_without, 2, ways, arguments):
        assert_alike(of_ways)


def unrecognized(way):
    checkpointing.enclosing = lambda: None
    checkpointed = train(WAYS[way])
    return checkpointed, train(plain)


@pytest.mark.parametrize("way", ["reentrant", "non-reentrant"])
def test_a_checkpoint_that_is_not_recognized_adds_collectives(run_alone, way):
    """The negative control, and what a checkpoint does that is not torch's: the same, by more collectives."""
    for (tensors, calls), (wanted, wanted_calls) in run_alone(unrecognized, 2, way):
        assert wanted_calls == [8] * STEPS
        assert calls == [12] * STEPS
        for tensor, other in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(tensor, other)


@pytest.fixture
def run_alone():
    """Return what runs a function on new processes, in which it may change the package."""
    return functools.partial(syncnorm.testing.run_ranks, timeout=60)


def twice(reentrant):
    """Two backward passes through one graph, then double backward."""
    group = CountingCommunicator(syncnorm.communicator())
    results = []
    for wrapped in (False, True):
        torch.manual_seed(group.rank)
        layer = SyncBatchNorm(3, process_group=group, dtype=torch.float64)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        y = checkpoint(lambda x, layer=layer: layer(x).sin(), x, use_reentrant=reentrant) if wrapped else layer(x).sin()
        first, second, third = torch.randn(3, *y.shape, dtype=torch.float64)
        y.backward(first, retain_graph=True)
        y.backward(second, retain_graph=not reentrant)
        grads = [x.grad.clone()]
        if not reentrant:
            (grad,) = torch.autograd.grad(y, x, third, create_graph=True)
            (double,) = torch.autograd.grad(grad.square().sum(), x)
            grads += [grad.detach(), double]
        results.append(([*grads, *layer.buffers()], len(group.calls)))
        group.calls.clear()
    return results


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_graph_can_be_gone_through_more_than_once(run, world_size, reentrant):
    for (expected, wanted_calls), (actual, calls) in run(twice, world_size, reentrant):
        assert calls == wanted_calls
        for tensor, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-12)


def several_before_one_backward(reentrant):
    """Calls in segments and outside of them, whose recomputations come in the reverse order."""
    group = CountingCommunicator(syncnorm.communicator())
    results = []
    for wrapped in (False, True):
        torch.manual_seed(group.rank)
        layer = SyncBatchNorm(3, process_group=group)
        inputs = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
        ys = [
            checkpoint(layer, x, use_reentrant=reentrant) if wrapped and number != 1 else layer(x)
            for number, x in enumerate(inputs)
        ]
        torch.stack(ys).sin().sum().backward()
        results.append([*(x.grad for x in inputs), *layer.buffers()])
    return results, [call.name for call in group.calls]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_several_forwards_before_one_backward(run, world_size, reentrant):
    for (expected, actual), calls in run(several_before_one_backward, world_size, reentrant):
        assert calls == [] if world_size == 1 else ["all_reduce"] * 12
        for tensor, other in zip(actual, expected, strict=True):
            assert torch.equal(tensor, other)


def on_one_rank_alone():
    """Only one of the ranks checkpoints. The ranks' steps match, since it changes no collective."""
    group = syncnorm.communicator()
    results = []
    for wraps in (False, group.rank == 0):
        torch.manual_seed(0)
        model = block(group)
        x = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(group.rank))
        for _ in range(3):
            y = checkpoint(model, x, use_reentrant=False) if wraps else model(x)
            y.square().sum().backward()
        results.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    return results


def test_ranks_need_not_all_checkpoint(run):
    for expected, actual in run(on_one_rank_alone, 2):
        for tensor, other in zip(actual, expected, strict=True):
            assert torch.equal(tensor, other)


def of_a_split_norm():
    """The features of a LayerNorm are split over the ranks, which sum its moments again."""
    group = CountingCommunicator(syncnorm.communicator())
    torch.manual_seed(group.rank)
    layer, x = syncnorm.LayerNorm(3, process_group=group), torch.randn(4, 3)
    grads = []
    for wrapped in (False, True):
        leaf = x.clone().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=False) if wrapped else layer(leaf)
        y.sin().sum().backward()
        grads.append(leaf.grad)
    return grads, len(group.calls)


def test_norms_whose_features_are_split_communicate_again(run):
    for grads, calls in run(of_a_split_norm, 2):
        assert torch.equal(*grads)
        assert calls == 2 + 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_with_another_call_is_refused(reentrant):
    layer, calls = SyncBatchNorm(3), []

    def function(x):
        calls.append(x)
        for _ in calls:
            x = layer(x)
        return x.sin()

    y = checkpoint(function, torch.randn(4, 3, requires_grad=True), use_reentrant=reentrant)
    if not reentrant:
        calls.append(None)  # without early stop it would call once more
    with set_checkpoint_early_stop(False), pytest.raises(RuntimeError, match="with the calls of its first pass"):
        y.sum().backward()


def test_what_is_kept_ends_with_the_graph():
    import gc
    import weakref

    layer, kept = SyncBatchNorm(3), []
    keep = checkpointing.Segments.keep

    def noting(segments, call):
        keep(segments, call)
        kept.extend(weakref.ref(segment.calls[-1].moments.values) for segment in segments.running)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing.Segments, "keep", noting)
        for reentrant in (False, True):
            y = checkpoint(layer, torch.randn(4, 3, requires_grad=True), use_reentrant=reentrant)
            assert kept.pop()() is not None
            y.sum().backward()
    y = None
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]
