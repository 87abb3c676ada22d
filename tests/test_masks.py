"""Masked statistics: the positions that count, on all ranks, against one process on just these positions."""

import pytest
import torch
from oracle import CHANNELS, Case, assert_matches, on_shard

import syncnorm
from syncnorm.functional import sync_batch_norm

SHAPES = ((4, CHANNELS, 6), (3, CHANNELS, 5))
CASES = [
    Case(SHAPES[:1], valid=(0.6,)),
    Case(SHAPES, valid=(0.3, 0.8)),
    Case(SHAPES, valid=(0, 0.8)),  # nothing counts on one rank
    Case(SHAPES, valid=(1, 1)),
    Case(((4, CHANNELS), (3, CHANNELS)), valid=(0.5, 0.7)),
    Case(((2, CHANNELS, 5, 4), (1, CHANNELS, 3, 7), (0, CHANNELS, 2, 2)), valid=(0.5, 0.4, 1)),
    Case(((9, CHANNELS, 2),) * 4, valid=(0.5, 0, 0.2, 1)),
    *[Case(SHAPES, dtype, valid=(0.3, 0.8)) for dtype in (torch.float64, torch.float16, torch.bfloat16)],
    *[Case(SHAPES, valid=(0.3, 0.8), mask_dtype=dtype) for dtype in (torch.float32, torch.float64, torch.float16)],
    Case(SHAPES, valid=(0.3, 0.8), mask_has_channel_axis=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_valid_positions_count(run, case):
    assert_matches(run(on_shard, case.world_size, case), case)


@pytest.mark.parametrize("case", [case for case in CASES if min(case.valid) < 1], ids=str)
def test_without_the_mask_all_do(run, case):
    """The negative control."""
    results = run(on_shard, case.world_size, case, syncnorm.SyncBatchNorm, False)
    with pytest.raises(AssertionError):
        assert_matches(results, case)


def with_garbage(value):
    x = torch.randn(4, CHANNELS, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor([[6], [2], [3], [1]])
    outcomes = []
    for filling in (0.0, value):
        filled = torch.where(mask.unsqueeze(1), x, filling).requires_grad_()
        layer = syncnorm.SyncBatchNorm(CHANNELS)
        y = layer(filled, mask=mask)
        (y.masked_fill(~mask.unsqueeze(1), 0).sin()).sum().backward()
        outcomes.append([y.detach().movedim(1, -1)[mask], filled.grad, layer.weight.grad, layer.running_var])
    return outcomes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_does_not_count_may_be_anything(value):
    zeros, garbage = with_garbage(value)
    for expected, actual in zip(zeros, garbage, strict=True):
        assert torch.equal(actual, expected)


def nothing_counts():
    layer = syncnorm.SyncBatchNorm(CHANNELS)
    x = torch.randn(4, CHANNELS, 6, requires_grad=True)
    y = layer(x, mask=torch.zeros(4, 6, dtype=torch.bool))
    y.backward(torch.randn(4, CHANNELS, 6))
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_where_nothing_counts_running_statistics_stay(run, world_size):
    for buffers in run(nothing_counts, world_size):
        assert torch.equal(buffers["running_mean"], torch.zeros(CHANNELS))
        assert torch.equal(buffers["running_var"], torch.ones(CHANNELS))
        assert buffers["num_batches_tracked"] == 0


def one_counts():
    group = syncnorm.communicator()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 0] = group.rank == 0
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        syncnorm.SyncBatchNorm(CHANNELS)(torch.randn(4, CHANNELS, 6), mask=mask)
    return str(raised.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_position_has_no_variance(run, world_size):
    assert all("and a mask" in text for text in run(one_counts, world_size))


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients(check):
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.6

    def masked(x, weight, bias):
        return sync_batch_norm(x, None, None, weight, bias, training=True, eps=1e-2, mask=mask)

    torch.manual_seed(0)
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in [(4, 2, 6), (2,), (2,)]]
    assert check(masked, [t.requires_grad_() for t in arguments])


def test_eval_takes_a_mask_and_needs_none():
    layer = syncnorm.SyncBatchNorm(CHANNELS).eval()
    x = torch.randn(4, CHANNELS, 6)
    assert torch.equal(layer(x, mask=torch.rand(4, 6) < 0.5), layer(x))


def with_fractions():
    """Return this rank's x and mask, y, and the running statistics."""
    torch.manual_seed(syncnorm.communicator().rank)
    x, mask = torch.randn(4, CHANNELS, 6, dtype=torch.float64) + 2, torch.rand(4, 6, dtype=torch.float64)
    layer = syncnorm.SyncBatchNorm(CHANNELS, momentum=1.0, dtype=torch.float64)
    y = layer(x, mask=mask).detach()
    return x, mask, y, layer.running_mean, layer.running_var


@pytest.mark.parametrize("world_size", [1, 2])
def test_fractions_count_by_their_size(run, world_size):
    results = run(with_fractions, world_size)
    x, mask, y = (torch.cat([result[i] for result in results]) for i in range(3))
    weight, n = mask.unsqueeze(1), mask.sum()
    mean = (weight * x).sum((0, 2), keepdim=True) / n
    m2 = (weight * (x - mean).square()).sum((0, 2), keepdim=True)
    torch.testing.assert_close(y, (x - mean) / (m2 / n + 1e-5).sqrt())
    for *_, running_mean, running_var in results:
        torch.testing.assert_close(running_mean, mean.flatten())
        torch.testing.assert_close(running_var, m2.flatten() / (n - 1))


@pytest.mark.parametrize("shape", [(4, 5), (4, CHANNELS, 6), (3, 6), (6,), (4, 1, 1, 6), ()])
def test_a_mask_that_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"expected a mask that broadcasts to \(4, 6\) or \(4, 1, 6\) for an input of"):
        syncnorm.SyncBatchNorm(CHANNELS)(torch.randn(4, CHANNELS, 6), mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1, 6), (4, 1), (4, 1, 6), (1, 1, 6)])
def test_a_mask_that_broadcasts(shape):
    x = torch.randn(4, CHANNELS, 6)
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    whole = (mask if mask.dim() == 3 else mask.unsqueeze(1)).expand(4, 1, 6)
    torch.testing.assert_close(
        syncnorm.SyncBatchNorm(CHANNELS)(x, mask=mask), syncnorm.SyncBatchNorm(CHANNELS)(x, mask=whole)
    )


@pytest.mark.parametrize("mask", [torch.ones(4, 6, dtype=torch.int64), [[True] * 6] * 4])
def test_a_mask_of_another_type(mask):
    with pytest.raises(TypeError, match="expected a mask of bool or floating point, got"):
        syncnorm.SyncBatchNorm(CHANNELS)(torch.randn(4, CHANNELS, 6), mask=mask)
