"""The running statistics of a model across the ranks: compared, and merged."""

import re

import pytest
import torch
from torch import nn

import syncnorm
from syncnorm import RunningStatsError, SyncNormError, assert_running_stats_agree, sync_running_stats

WORLD_SIZES = [2, 4]


def model_of(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), norm(5), nn.Sequential(nn.Tanh(), norm(5)))


def train(model, rank, steps):
    for step in range(steps):
        x = torch.randn(2 + rank, 3, generator=torch.Generator().manual_seed(10 * step + rank)) * (rank + 1) + rank
        model(x)


def raised(function, *arguments):
    try:
        function(*arguments)
    except SyncNormError as error:
        return type(error).__name__, isinstance(error, AssertionError), str(error)
    return None


def after_training(kind):
    group = syncnorm.communicator()
    model = model_of(getattr(syncnorm if kind == "SyncBatchNorm" else nn, kind))
    before = raised(assert_running_stats_agree, model)
    train(model, group.rank, 3)
    return before, raised(assert_running_stats_agree, nn.ModuleDict({"inner": model}))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_synchronized_statistics_agree(run, world_size):
    assert run(after_training, world_size, "SyncBatchNorm") == [(None, None)] * world_size


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_statistics_of_each_rank_do_not(run, world_size):
    """Each buffer that differs is named on every rank. The counters are equal, and are not."""
    outcomes = run(after_training, world_size, "BatchNorm1d")
    assert len(set(outcomes)) == 1
    before, (kind, is_assertion, text) = outcomes[0]
    assert before is None
    assert kind == "RunningStatsError"
    assert is_assertion
    ranks = r" \| ".join(f"rank {rank}" for rank in range(world_size))
    names = re.findall(rf"^  (inner\.[\w.]+): {ranks}, up to (?!0 )[\d.e+-]+ apart$", text, re.MULTILINE)
    assert names == [f"inner.{layer}.running_{name}" for layer in ("1", "2.1") for name in ("mean", "var")]


def with_another(dtype, value):
    """One rank of three has another value in one buffer of one layer."""
    group = syncnorm.communicator()
    model = model_of(nn.BatchNorm1d).to(dtype)
    if group.rank == 1:
        if value == "counter":
            model[1].num_batches_tracked += 1
        elif value == "nan":
            model[1].running_var[2] = float("nan")
        elif value == "zero":
            model[1].running_mean[0] = -0.0
        else:
            model[1].running_mean = model[1].running_mean.half()
    return raised(assert_running_stats_agree, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("counter", "num_batches_tracked: ranks 0, 2 | rank 1, up to 1 apart"),
        ("nan", "running_var: ranks 0, 2 | rank 1, up to nan apart"),
        ("zero", "running_mean: ranks 0, 2 | rank 1, up to 0 apart"),
        ("dtype", "running_mean: ranks 0, 2 | rank 1, up to 0 apart"),
    ],
)
@pytest.mark.parametrize("world_size", [3])
def test_each_buffer_is_compared_bit_by_bit(run, world_size, dtype, value, said):
    title = "expected the same running statistics on all ranks, got"
    expected = ("RunningStatsError", True, f"{title}\n  1.{said}")
    assert run(with_another, world_size, dtype, value) == [expected] * world_size


def merged(counts, numbered):
    """Return the statistics of a rank before and after, and the problem that is left."""
    group = syncnorm.communicator()
    model = model_of(nn.BatchNorm1d).double()
    train(model.float(), group.rank, counts[group.rank])
    if not numbered:
        for layer in (model[1], model[2][1]):
            layer.num_batches_tracked = None
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    sync_running_stats(model)
    return before, dict(model.named_buffers()), raised(assert_running_stats_agree, model)


@pytest.mark.parametrize("numbered", [True, False], ids=["counted", "not counted"])
@pytest.mark.parametrize(
    ("world_size", "counts"), [(2, (3, 3)), (2, (1, 4)), (2, (0, 2)), (2, (0, 0)), (4, (2, 0, 3, 1))], ids=str
)
def test_statistics_are_merged_by_the_number_of_batches(run, world_size, counts, numbered):
    """The oracle takes mean and variance of values that have those of each rank, as often as its batches count."""
    outcomes = run(merged, world_size, counts, numbered)
    weights = counts if numbered else [1] * world_size
    for layer in ("1", "2.1"):
        for _, after, problem in outcomes:
            assert problem is None
            if sum(weights) == 0:
                for name, tensor in after.items():
                    torch.testing.assert_close(tensor, outcomes[0][0][name], rtol=0, atol=0)
                continue
            values = []
            for (before, _, _), weight in zip(outcomes, weights, strict=True):
                mean, std = before[f"{layer}.running_mean"].double(), before[f"{layer}.running_var"].double().sqrt()
                values += [mean - std, mean + std] * weight
            expected = torch.stack(values)
            torch.testing.assert_close(after[f"{layer}.running_mean"].double(), expected.mean(0), rtol=1e-6, atol=1e-6)
            var = expected.var(0, correction=0)
            torch.testing.assert_close(after[f"{layer}.running_var"].double(), var, rtol=1e-6, atol=1e-6)
            if numbered:
                assert after[f"{layer}.num_batches_tracked"] == max(counts)


def of_other_models():
    group = syncnorm.communicator()
    model = model_of(nn.BatchNorm1d)
    if group.rank == 1:
        model.append(nn.BatchNorm1d(5))
    before = [tensor.clone() for tensor in model.buffers()]
    errors = raised(assert_running_stats_agree, model), raised(sync_running_stats, model)
    return errors, all(map(torch.equal, before, model.buffers()))


def test_other_layers_are_named_on_every_rank(run):
    for (compared, synced), is_unchanged in run(of_other_models, 2):
        assert compared[0] == synced[0] == "SyncNormError"
        assert "got 3.num_batches_tracked, 3.running_mean, 3.running_var either on rank 0 or on rank 1" in compared[2]
        assert "got 3 either on rank 0 or on rank 1" in synced[2]
        assert is_unchanged


def in_groups():
    """Layers with a process group of their own agree in it. The whole job need not."""
    group = syncnorm.communicator()
    pair = syncnorm.new_subgroups(2)
    model = model_of(lambda features: syncnorm.SyncBatchNorm(features, process_group=pair))
    train(model, group.rank, 2)
    return raised(assert_running_stats_agree, model), raised(assert_running_stats_agree, model, group)


@pytest.mark.parametrize("world_size", [4])
def test_layers_are_compared_in_their_own_group(run, world_size):
    for own, whole in run(in_groups, world_size):
        assert own is None
        assert whole[0] == "RunningStatsError"
        assert "1.running_mean: ranks 0, 1 | ranks 2, 3, up to " in whole[2]


def test_alone_and_without_statistics_there_is_nothing_to_compare():
    for model in (nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)):
        before = [tensor.clone() for tensor in model.buffers()]
        assert_running_stats_agree(model)
        sync_running_stats(model)
        assert all(map(torch.equal, before, model.buffers()))
    lazy = nn.LazyBatchNorm1d()
    assert_running_stats_agree(lazy)
    sync_running_stats(lazy)
    assert lazy.has_uninitialized_params()


def test_the_error_is_what_tests_expect():
    assert issubclass(RunningStatsError, SyncNormError)
    assert issubclass(RunningStatsError, AssertionError)
