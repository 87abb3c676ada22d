"""Shards against one process on the whole batch: the heart of the suite."""

import pytest
import torch
from oracle import CHANNELS, Case, Plain, assert_matches, on_shard
from torch import nn

import syncnorm
from syncnorm.testing import CountingCommunicator

SPLITS = [(8,), (5, 3), (4, 4), (7, 0, 1), (1, 1, 1, 1), (0, 2, 3, 5)]
TRAILING = [(), (6,), (5, 4), (2, 3, 4)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def split(sizes, trailing):
    return tuple((n, CHANNELS, *trailing) for n in sizes)


CASES = [
    *[Case(split(sizes, trailing)) for sizes in SPLITS for trailing in TRAILING],
    *[Case(split((5, 0, 3), (5, 4)), dtype=dtype) for dtype in DTYPES],
    *[Case(split((5, 3), ()), dtype=dtype) for dtype in DTYPES],
    *[Case(split((5, 3), (5, 4)), dtype, torch.channels_last) for dtype in DTYPES],
    Case(split((5, 0, 3), (5, 4)), memory_format=torch.channels_last),
    Case(split((5, 3), (2, 3, 4)), memory_format=torch.channels_last_3d),
    Case(((2, 3, 5, 4), (3, 3, 2, 7), (1, 3, 1, 1))),  # H and W differ between ranks
    Case(((2, 3, 9), (4, 3, 2))),
    *[Case(split((40, 24), (4, 4)), mean=mean) for mean in (1e3, 1e4, 1e6)],
    *[Case(split((40, 0, 7, 17), ()), mean=mean) for mean in (1e3, 1e4, 1e6)],
    Case(split((40, 24), (4, 4)), torch.float64, mean=1e4),
    Case(split((5, 3), (4,)), layer={"affine": False}),
    Case(split((5, 3), (4,)), layer={"bias": False}),
    Case(split((5, 3), (4,)), layer={"track_running_stats": False}),
    Case(split((5, 3), (4,)), layer={"momentum": 0.7}, steps=3),
    Case(split((5, 3), (4,)), layer={"momentum": None}, steps=4),
    Case(split((5, 3), (4,)), layer={"momentum": 0.0}, steps=2),
    Case(split((5, 3), (4,)), layer={"momentum": 1.0}, steps=2),
    Case(split((5, 3), (4,)), layer={"eps": 1e-2}),
    Case(split((5, 3), (4,)), torch.float16, param_dtype=torch.float16),
    Case(split((5, 3), (4,)), torch.bfloat16, param_dtype=torch.float64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_match_the_whole_batch(run, case):
    assert_matches(run(on_shard, case.world_size, case), case)


@pytest.mark.parametrize("case", [c for c in CASES if len(c.shapes) == 2 and not c.param_dtype], ids=str)
def test_plain_batch_norm_on_shards_does_not(run, case):
    """The negative control: the same assertion fails without synchronization."""
    results = run(on_shard, case.world_size, case, Plain)
    with pytest.raises(AssertionError):
        assert_matches(results, case)


def tiny_variance():
    group = syncnorm.communicator()
    torch.manual_seed(group.rank)
    x = 1e-5 * torch.randn(64, 2)
    y = syncnorm.functional.sync_batch_norm(x, None, None, training=True, eps=1e-3)
    return x, y


@pytest.mark.parametrize("world_size", [2])
def test_variance_far_below_eps(run, world_size):
    shards = run(tiny_variance, world_size)
    x = torch.cat([x for x, _ in shards]).double()
    expected = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt()
    torch.testing.assert_close(torch.cat([y for _, y in shards]).double(), expected, rtol=1e-6, atol=1e-9)


def all_empty():
    layer = syncnorm.SyncBatchNorm(2, momentum=None)
    x = torch.empty(0, 2, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    return y, x.grad, layer.state_dict(), [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_ranks_empty_moves_nothing(run, world_size):
    for y, grad, state, grads in run(all_empty, world_size):
        assert y.shape == grad.shape == (0, 2, 4)
        for name, buffer in syncnorm.SyncBatchNorm(2).named_buffers():
            assert torch.equal(state[name], buffer), name
        assert all(torch.equal(g, torch.zeros(2)) for g in grads)


def one_value(sizes):
    layer = syncnorm.SyncBatchNorm(2)
    try:
        layer(torch.ones(sizes[syncnorm.communicator().rank], 2, 1, 1))
    except ValueError as error:
        return str(error), layer.state_dict()
    return None, layer.state_dict()


@pytest.mark.parametrize(("world_size", "sizes"), [(1, (1,)), (2, (1, 0)), (3, (0, 0, 1))])
def test_one_value_in_all_is_an_error_on_every_rank(run, world_size, sizes):
    for message, state in run(one_value, world_size, sizes):
        assert message.startswith("Expected more than 1 value per channel when training, got input size")
        for name, buffer in syncnorm.SyncBatchNorm(2).named_buffers():
            assert torch.equal(state[name], buffer), f"{name} moved"


@pytest.mark.parametrize(("world_size", "sizes"), [(2, (1, 1)), (3, (0, 2, 0))])
def test_two_values_in_all_are_enough(run, world_size, sizes):
    assert [message for message, _ in run(one_value, world_size, sizes)] == [None] * world_size


def counted_calls(needs_grad, training, tracks):
    group = CountingCommunicator(syncnorm.communicator())
    layer = syncnorm.SyncBatchNorm(5, process_group=group, track_running_stats=tracks).train(training)
    x = torch.randn(4, 5, 3, requires_grad=needs_grad)
    y = layer(x)
    forward = list(group.calls)
    y.backward(torch.randn_like(y))
    return forward, group.calls[len(forward) :]


@pytest.mark.parametrize("world_size", [2, 4])
def test_one_all_reduce_each_way(run, world_size):
    for forward, backward in run(counted_calls, world_size, True, True, True):
        assert forward == [("all_reduce", 8 * (2 * 5 + 3))]
        assert backward == [("all_reduce", 8 * (2 * 5 + 2))]


@pytest.mark.parametrize("world_size", [2])
def test_no_collective_in_backward_if_the_input_needs_no_gradient(run, world_size):
    for forward, backward in run(counted_calls, world_size, False, True, True):
        assert len(forward) == 1
        assert backward == []


@pytest.mark.parametrize(("world_size", "training", "tracks"), [(2, False, True), (2, False, False), (1, True, True)])
def test_eval_and_a_group_of_one_issue_no_collective(run, world_size, training, tracks):
    for forward, backward in run(counted_calls, world_size, True, training, tracks):
        assert forward == backward == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_eval_normalizes_by_the_running_statistics(dtype, mean):
    x = (torch.randn(6, 3, 4, 5, dtype=torch.float64) + mean).to(dtype).requires_grad_()
    running_mean, running_var = torch.full((3,), mean), torch.tensor([0.5, 1.0, 2.0])
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(3, dtype=param_dtype, requires_grad=True) for _ in range(2))
    y = syncnorm.functional.sync_batch_norm(x, running_mean, running_var, weight, bias)
    grad_output = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, weight, bias), grad_output)
    reference = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = nn.functional.batch_norm(reference[0], running_mean.double(), running_var.double(), *reference[1:])
    expected_grads = torch.autograd.grad(expected, reference, grad_output.double())
    tolerance = max(torch.finfo(dtype).eps, 1e-6) if dtype != torch.float64 else 1e-12
    for actual, wanted in zip([y, *grads], [expected, *expected_grads], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


def normalized_alone(x, weight, bias):
    return syncnorm.functional.sync_batch_norm(x, None, None, weight, bias, training=True)


def normalized_by_torch(x, weight, bias):
    return nn.functional.batch_norm(x, None, None, weight, bias, training=True)


@pytest.mark.parametrize(
    ("function", "at_most", "at_least"), [(normalized_alone, 2e-6, 0), (normalized_by_torch, 1, 1e-4)]
)
def test_large_means_cost_torch_digits_and_us_none(function, at_most, at_least):
    x = torch.randn(64, 4, 8, 8) + 1e4
    weight, bias = torch.ones(4), torch.zeros(4)
    expected = normalized_by_torch(x.double(), weight.double(), bias.double())
    assert at_least <= (function(x, weight, bias).double() - expected).abs().max() <= at_most


def decisions_on_tensor_values(shape):
    """Count how often a training step asks a tensor for its value, for which a GPU would have to be waited for."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("__bool__", "__int__", "__float__", "item", "tolist"):
            patch.setattr(torch.Tensor, name, lambda self, name=name: asked.append(name) or True)
        layer = syncnorm.SyncBatchNorm(2, momentum=None)
        y = layer(torch.randn(shape, requires_grad=True))
        y.backward(torch.ones_like(y))
    return asked


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_step_never_waits_for_a_value(run, world_size):
    assert run(decisions_on_tensor_values, world_size, (4, 2, 3)) == [[]] * world_size


def test_a_single_value_is_asked_for():
    """The negative control: it could be the only one."""
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        decisions_on_tensor_values((1, 2))


def autocast_step():
    layer = syncnorm.SyncBatchNorm(3)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
    y.backward(torch.randn_like(y))
    return y.dtype, x.grad.dtype, layer.weight.grad.dtype, layer.running_mean.dtype


def test_autocast():
    assert autocast_step() == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
