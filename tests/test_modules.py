"""The module in a user's hands: state, copies, DistributedDataParallel, checkpointing, lazy shapes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm import LazySyncBatchNorm, SyncBatchNorm
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import CountingCommunicator, run_ranks


def test_it_is_a_batch_norm_that_ddp_takes_on_cpu():
    assert issubclass(SyncBatchNorm, _BatchNorm)
    assert not issubclass(SyncBatchNorm, nn.SyncBatchNorm)


@pytest.mark.parametrize("plain", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"track_running_stats": False}])
def test_state_dicts_fit_both_ways(plain, arguments):
    plain, sync = plain(4, **arguments), SyncBatchNorm(4, **arguments)
    for tensor in [*plain.parameters(), *plain.buffers()]:
        with torch.no_grad():
            tensor.copy_(torch.rand(tensor.shape) * 10)
    assert list(plain.state_dict()) == list(sync.state_dict())
    sync.load_state_dict(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(sync.state_dict()[name], value)
    plain.load_state_dict(sync.state_dict())


def test_repr_tells_the_arguments():
    assert repr(SyncBatchNorm(4, momentum=None, bias=False)) == (
        "SyncBatchNorm(4, eps=1e-05, momentum=None, affine=True, bias=False, track_running_stats=True)"
    )


def test_repr_tells_the_ranks_that_were_given():
    group = LocalCommunicator()
    text = "SyncBatchNorm(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True"
    assert repr(SyncBatchNorm(4)) == f"{text})"
    assert repr(SyncBatchNorm(4, process_group=group)) == f"{text}, process_group=1 rank)"
    assert repr(LazySyncBatchNorm(process_group=group)).endswith("track_running_stats=True, process_group=1 rank)")
    assert repr(syncnorm.convert_sync_batchnorm(nn.BatchNorm2d(4))) == f"{text})"
    converted = syncnorm.convert_sync_batchnorm(nn.BatchNorm2d(4), group)
    assert repr(converted) == f"{text}, process_group=1 rank)"
    assert "process_group" not in repr(syncnorm.revert_sync_batchnorm(converted))


def spoiled(state, name, value):
    return {**state, name: value} if value is not None else {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("running_var", torch.zeros(5), "size mismatch for running_var"),
        ("weight", None, "Missing key.*weight"),
        ("extra", torch.zeros(4), "Unexpected key.*extra"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_that_does_not_fit_changes_nothing(name, value, message, assign):
    layer = SyncBatchNorm(4)
    other = SyncBatchNorm(4)
    other(torch.randn(8, 4))
    before = copy.deepcopy(layer.state_dict())
    buffer, checkpoint = layer.running_mean, spoiled(copy.deepcopy(other.state_dict()), name, value)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(checkpoint, assign=assign)
    assert layer.running_mean is buffer
    for key, tensor in before.items():
        assert torch.equal(layer.state_dict()[key], tensor), key
    assert torch.equal(checkpoint["running_mean"], other.running_mean)


def test_a_model_is_loaded_as_torch_loads_it_without_strict():
    model, plain = (nn.Sequential(kind(4)) for kind in (SyncBatchNorm, nn.BatchNorm2d))
    state = {"0.weight": torch.full((4,), 5.0), "0.running_mean": torch.full((4,), 6.0), "0.extra": torch.zeros(1)}
    assert model.load_state_dict(state, strict=False) == plain.load_state_dict(state, strict=False)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_layer_of_a_model_whose_shapes_do_not_fit_is_left_alone():
    model = nn.Sequential(SyncBatchNorm(4))
    state = {f"0.{name}": value + 1 for name, value in SyncBatchNorm(4).state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "0.running_var": torch.ones(5)})
    for name, value in SyncBatchNorm(4).state_dict().items():
        assert torch.equal(model[0].state_dict()[name], value), name


def test_a_checkpoint_from_before_num_batches_tracked():
    layer = SyncBatchNorm(4)
    state = {k: v + 1 for k, v in layer.state_dict().items() if k != "num_batches_tracked"}
    layer.load_state_dict(state)
    assert torch.equal(layer.running_mean, torch.ones(4))
    assert layer.num_batches_tracked == 0


def test_copies_share_the_process_group_and_pickles_leave_it_out():
    group = LocalCommunicator()
    layer = SyncBatchNorm(4, process_group=group)
    assert copy.deepcopy(layer).process_group is group
    assert copy.copy(layer).process_group is group
    assert pickle.loads(pickle.dumps(layer)).process_group is None
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False).process_group is None


def copies_of_a_used_layer():
    layer = SyncBatchNorm(2, process_group=torch.distributed.group.WORLD)
    layer(torch.randn(4, 2) + torch.distributed.get_rank())
    twin = copy.deepcopy(layer)
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(4, 2) + torch.distributed.get_rank()
    return [m(x) for m in (layer, twin, again)], [m.running_mean for m in (layer, twin, again)]


def test_copies_of_a_layer_on_a_real_group_work():
    for outputs, means in run_ranks(copies_of_a_used_layer, 2):
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(means[0], means[1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        SyncBatchNorm(4, momentum=None),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        SyncBatchNorm(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5),
    ).double()


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.1, 3, 8).view(-1, 1, 1, 1).double(), torch.randint(5, (8,), generator=generator)


def train(model, shard, scale):
    """Take five steps; the loss is the sum over the samples, times `scale`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(5):
        x, target = data(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[shard]), target[shard], reduction="sum") * scale
        loss.backward()
        optimizer.step()
    return model.state_dict()


def train_in_ddp(sizes, convert):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = convert(network())
    shard = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return train(DistributedDataParallel(model), shard, size / 8).copy()  # DDP averages over the ranks


def keep(model):
    return model


def unsynchronize(model):
    for i, layer in enumerate(model):
        if isinstance(layer, SyncBatchNorm):
            model[i] = nn.BatchNorm2d(layer.num_features, momentum=layer.momentum, dtype=torch.float64)
    return model


def assert_same_training(results):
    expected = train(network(), slice(None), 1 / 8)
    for state in results:
        for name, value in expected.items():
            torch.testing.assert_close(state["module." + name], value, rtol=1e-11, atol=1e-11)
            assert torch.equal(state["module." + name], results[0]["module." + name]), f"{name} differs between ranks"


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (5, 2, 1), (2, 2, 2, 2)])
def test_five_steps_of_ddp_match_one_process(sizes):
    assert_same_training(run_ranks(train_in_ddp, len(sizes), sizes, keep))


def test_five_steps_of_ddp_with_plain_batch_norm_do_not():
    """The negative control."""
    results = run_ranks(train_in_ddp, 2, (4, 4), unsynchronize)
    with pytest.raises(AssertionError):
        assert_same_training(results)


def two_forwards_before_backward(model, shard, training):
    model(data(9)[0][shard])
    model.train(training)
    x = data(0)[0][shard]
    (model(x).square().sum() + model(2 * x + 1).sin().sum()).backward()
    return [p.grad for p in model.parameters()]


def two_forwards_in_ddp(convert, training):
    rank = torch.distributed.get_rank()
    shard = slice(0, 5) if rank == 0 else slice(5, 8)
    return two_forwards_before_backward(DistributedDataParallel(convert(network())), shard, training)


def assert_same_gradients_of_two_forwards(results, training):
    expected = two_forwards_before_backward(network(), slice(None), training)
    for grads in results:
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(2 * grad, wanted, rtol=1e-11, atol=1e-11)  # DDP averages over the ranks


@pytest.mark.parametrize("training", [True, False])
def test_two_forwards_before_one_backward_under_ddp(training):
    assert_same_gradients_of_two_forwards(run_ranks(two_forwards_in_ddp, 2, keep, training), training)


@pytest.mark.parametrize("training", [True, False])
def test_two_forwards_before_one_backward_with_plain_batch_norm_differ(training):
    """The negative control."""
    results = run_ranks(two_forwards_in_ddp, 2, unsynchronize, training)
    with pytest.raises(AssertionError):
        assert_same_gradients_of_two_forwards(results, training)


def checkpointed(use_reentrant):
    group = CountingCommunicator(syncnorm.communicator())
    torch.manual_seed(group.rank)
    states, grads = [], []
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    grad_output = torch.randn_like(x)
    for wrap in (False, True):
        layer = SyncBatchNorm(3, momentum=None, process_group=group, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=use_reentrant) if wrap else layer(leaf)
        y.backward(grad_output)
        states.append(layer.state_dict())
        grads.append(leaf.grad)
    return states, grads


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_counts_once(run, world_size, use_reentrant):
    for (plain, recomputed), (grad, grad_recomputed) in run(checkpointed, world_size, use_reentrant):
        assert recomputed["num_batches_tracked"] == 1
        assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
        torch.testing.assert_close(grad, grad_recomputed)


def test_averaged_models_and_their_statistics():
    model = nn.Sequential(nn.Linear(3, 4), SyncBatchNorm(4))
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    batches = [torch.randn(6, 3) for _ in range(3)]
    update_bn(batches, averaged)
    means = torch.stack([averaged.module[0](batch).mean(0) for batch in batches])
    torch.testing.assert_close(averaged.module[1].running_mean, means.mean(0))


def test_running_statistics_freeze_where_torch_freezes_them():
    layer = SyncBatchNorm(2)
    layer.track_running_stats = False  # buffers are there: eval uses them, training leaves them
    layer(torch.randn(4, 2) + 3)
    assert torch.equal(layer.running_mean, torch.zeros(2))
    assert layer.num_batches_tracked == 0
    x = torch.randn(4, 2)
    torch.testing.assert_close(layer.eval()(x), x, rtol=1e-4, atol=0)


def test_eval_without_running_statistics_uses_the_batch():
    layer = SyncBatchNorm(2, track_running_stats=False).eval()
    torch.testing.assert_close(layer(torch.randn(50, 2) + 3).mean(0), torch.zeros(2), rtol=0, atol=1e-6)


def test_momentum_none_is_the_cumulative_average():
    layer = SyncBatchNorm(2, momentum=None)
    batches = [torch.randn(6, 2) + i for i in range(5)]
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([b.var(0) for b in batches]).mean(0))


def test_parameters_can_be_left_out():
    assert [name for name, _ in SyncBatchNorm(3, bias=False).named_parameters()] == ["weight"]
    assert list(SyncBatchNorm(3, affine=False).parameters()) == []
    layer = SyncBatchNorm(3, bias=False)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(3))


def test_parameters_go_where_they_are_sent():
    layer = SyncBatchNorm(3, device="meta", dtype=torch.float64)
    assert {(t.device.type, t.dtype) for t in layer.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"affine": False}, {"track_running_stats": False}])
def test_lazy_takes_the_channels_from_its_input(arguments):
    group = LocalCommunicator()
    layer = LazySyncBatchNorm(momentum=0.3, process_group=group, **arguments)
    layer(torch.randn(4, 7, 2))
    expected = SyncBatchNorm(7, momentum=0.3, process_group=group, **arguments)
    assert type(layer) is SyncBatchNorm
    assert layer.num_features == 7
    assert layer.process_group is group
    assert repr(layer) == repr(expected)
    torch.testing.assert_close(dict(layer.named_parameters()), dict(expected.named_parameters()))
    assert [(k, v.shape) for k, v in layer.state_dict().items()] == [
        (k, v.shape) for k, v in expected.state_dict().items()
    ]


def lazy_on_an_empty_shard():
    rank = syncnorm.communicator().rank
    layer = LazySyncBatchNorm()
    layer(torch.ones(0 if rank == 0 else 3, 5))
    return layer.running_mean


def test_lazy_on_an_empty_shard():
    first, second = run_ranks(lazy_on_an_empty_shard, 2)
    assert first.shape == (5,)
    assert torch.equal(first, second)


def test_lazy_rejects_bad_input_and_stays_lazy():
    layer = LazySyncBatchNorm()
    with pytest.raises(ValueError, match="expected an input of at least 2 axes"):
        layer(torch.randn(4))
    layer(torch.randn(4, 2))
    assert type(layer) is SyncBatchNorm
