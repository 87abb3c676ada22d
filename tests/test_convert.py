"""Conversion to SyncBatchNorm and back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import syncnorm
from syncnorm import LazySyncBatchNorm, SyncBatchNorm, convert, convert_sync_batchnorm, revert_sync_batchnorm
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import run_ranks

PLAIN = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
LAZY = [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d]


@pytest.mark.parametrize("kind", PLAIN)
def test_there_and_back(kind):
    original = kind(4, eps=1e-3, momentum=0.3)
    sync = convert_sync_batchnorm(original)
    assert isinstance(sync, SyncBatchNorm)
    assert (sync.num_features, sync.eps, sync.momentum) == (4, 1e-3, 0.3)
    back = revert_sync_batchnorm(sync)
    assert type(back) is kind
    for module in (sync, back):
        for name, tensor in [*original.named_parameters(), *original.named_buffers()]:
            assert getattr(module, name) is tensor
    assert vars(back).keys() == vars(original).keys()


@pytest.mark.parametrize("kind", PLAIN[:3])
def test_a_converted_layer_computes_the_same(kind):
    original = kind(3, dtype=torch.float64)
    x = torch.randn(4, 3, *[5] * (PLAIN.index(kind) + 1), dtype=torch.float64)
    sync = convert_sync_batchnorm(copy.deepcopy(original))
    torch.testing.assert_close(sync(x), original(x))
    torch.testing.assert_close(sync.state_dict(), original.state_dict())
    torch.testing.assert_close(revert_sync_batchnorm(sync).eval()(x), original.eval()(x))


def test_what_a_layer_holds_is_kept():
    original = nn.BatchNorm2d(4).eval()
    original.weight.requires_grad_(False)
    original.qconfig = object()
    original.note = "mine"
    calls = []
    handles = [
        original.register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__)),
        original.register_forward_hook(lambda module, args, output: calls.append("after")),
        original.register_load_state_dict_pre_hook(lambda module, *_: calls.append(type(module).__name__)),
    ]
    sync = convert_sync_batchnorm(original)
    sync(torch.zeros(2, 4, 3, 3))
    sync.load_state_dict(sync.state_dict())
    assert calls == ["SyncBatchNorm", "after", "SyncBatchNorm"]
    assert not sync.training
    assert not sync.weight.requires_grad
    assert sync.bias.requires_grad
    assert sync.qconfig is original.qconfig
    assert sync.note == "mine"
    back = revert_sync_batchnorm(sync)
    back(torch.zeros(2, 4, 3, 3))
    assert calls[3:] == ["BatchNorm2d", "after"]
    for handle in handles:
        handle.remove()
    back(torch.zeros(2, 4, 3, 3))
    back.load_state_dict(back.state_dict())
    assert len(calls) == 5


def test_a_model_keeps_its_names_and_its_other_layers():
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(1, 4, 3), shared, nn.ReLU()),
            "head": nn.ModuleList(
                [shared, nn.InstanceNorm2d(4, affine=True), nn.LazyInstanceNorm2d(), nn.GroupNorm(2, 4)]
            ),
        }
    )
    names = [name for name, _ in model.named_modules()]
    parameters = {id(p) for p in model.parameters()}
    kinds = [type(m) for m in model.modules()]
    sync = convert_sync_batchnorm(model)
    assert sync is model
    assert sync["stem"][1] is sync["head"][0]
    assert isinstance(sync["stem"][1], SyncBatchNorm)
    assert [type(m) for m in model["head"]][1:] == [nn.InstanceNorm2d, nn.LazyInstanceNorm2d, nn.GroupNorm]
    assert [name for name, _ in sync.named_modules()] == names
    assert {id(p) for p in sync.parameters()} == parameters
    revert_sync_batchnorm(model)
    assert [type(m) for m in model.modules()] == kinds
    assert model["stem"][1] is model["head"][0]


def test_a_second_conversion_changes_nothing():
    sync = convert_sync_batchnorm(nn.BatchNorm2d(4))
    assert convert_sync_batchnorm(sync) is sync
    plain = nn.BatchNorm2d(4)
    assert revert_sync_batchnorm(plain) is plain
    constructed = SyncBatchNorm(4)
    assert revert_sync_batchnorm(constructed) is constructed


@pytest.mark.parametrize(("lazy", "plain"), list(zip(LAZY, PLAIN[:3], strict=True)))
def test_lazy_layers(lazy, plain):
    x = torch.randn(4, 3, *[2] * (LAZY.index(lazy) + 1))
    sync = convert_sync_batchnorm(lazy(momentum=0.3))
    assert isinstance(sync, LazySyncBatchNorm)
    assert type(revert_sync_batchnorm(convert_sync_batchnorm(lazy()))) is lazy
    back = revert_sync_batchnorm(convert_sync_batchnorm(lazy()))
    back(x)
    assert type(back) is plain
    sync(x)
    assert isinstance(sync, SyncBatchNorm)
    assert isinstance(sync, plain)
    assert not isinstance(sync, nn.modules.lazy.LazyModuleMixin)
    assert sync.momentum == 0.3
    assert not sync._forward_pre_hooks
    assert type(revert_sync_batchnorm(sync)) is plain


class Quiet(nn.BatchNorm2d):
    """Adds no computation."""

    def __init__(self, num_features):
        super().__init__(num_features, momentum=0.01)


class Activated(nn.BatchNorm2d):
    """Computes something else in forward."""

    def forward(self, input):
        return super().forward(input).relu()


def test_a_subclass_with_torchs_forward():
    sync = convert_sync_batchnorm(Quiet(4))
    assert isinstance(sync, SyncBatchNorm)
    assert sync.momentum == 0.01
    assert type(revert_sync_batchnorm(sync)) is Quiet


def test_a_subclass_with_its_own_forward_is_an_error_that_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(Activated(4)))
    with pytest.raises(TypeError, match=r"'1\.0': Activated; .*syncnorm\.register_conversion\(Activated, converter\)"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match="at 'the root': Activated"):
        convert_sync_batchnorm(Activated(4))


def test_a_registered_conversion(monkeypatch):
    monkeypatch.setattr(convert, "_registered", {})

    def converter(layer, process_group):
        sync = SyncBatchNorm(layer.num_features, process_group=process_group)
        sync.load_state_dict(layer.state_dict())
        return nn.Sequential(sync, nn.ReLU())

    syncnorm.register_conversion(Activated, converter)
    group = LocalCommunicator()
    model = convert_sync_batchnorm(nn.Sequential(Activated(4)), group)
    assert model[0][0].process_group is group
    assert (model(torch.randn(3, 4, 2, 2)) >= 0).all()


class Container(nn.Module):
    """Holds a BatchNorm that its own code deals with."""

    def __init__(self):
        super().__init__()
        self.norm = Activated(4)


def test_a_registered_container_is_left_to_its_converter(monkeypatch):
    monkeypatch.setattr(convert, "_registered", {})
    syncnorm.register_conversion(Container, lambda container, group: container)
    model = convert_sync_batchnorm(nn.Sequential(Container(), nn.BatchNorm2d(4)))
    assert type(model[0].norm) is Activated
    assert isinstance(model[1], SyncBatchNorm)


def test_a_layer_whose_forward_was_replaced_is_an_error():
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    with pytest.raises(TypeError, match="one with its own forward at 'the root': BatchNorm2d"):
        convert_sync_batchnorm(layer)


def test_the_original_goes_on_by_itself():
    original = nn.BatchNorm2d(4)
    sync = convert_sync_batchnorm(original)
    weight, original.weight = original.weight, nn.Parameter(torch.zeros(4))
    original.register_buffer("extra", torch.zeros(1))
    assert sync.weight is weight
    assert "extra" not in sync._buffers


def test_a_parametrized_layer_is_an_error():
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    with pytest.raises(TypeError, match=r"a parametrized one \(convert before parametrizing\)"):
        convert_sync_batchnorm(layer)


def shard_and_convert():
    model = nn.Sequential(nn.BatchNorm2d(4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TypeError, match=r"a sharded one \(convert before fully_shard and parallelize_module\) at '0'"):
        convert_sync_batchnorm(model)


def test_a_sharded_layer_is_an_error():
    run_ranks(shard_and_convert, 2)


def test_bad_conversions(monkeypatch):
    monkeypatch.setattr(convert, "_registered", {})
    with pytest.raises(TypeError, match="expected a class and a function"):
        syncnorm.register_conversion("Activated", lambda layer, group: layer)
    syncnorm.register_conversion(Activated, lambda layer, group: None)
    with pytest.raises(TypeError, match="expected the converter of Activated to return a module, got None"):
        convert_sync_batchnorm(Activated(4))


def test_a_second_conversion_may_set_the_group():
    group = LocalCommunicator()
    sync = convert_sync_batchnorm(nn.BatchNorm2d(4))
    assert convert_sync_batchnorm(sync, group) is sync
    assert convert_sync_batchnorm(sync).process_group is group


def test_the_process_group_is_set():
    group = LocalCommunicator()
    assert convert_sync_batchnorm(nn.BatchNorm2d(4), group).process_group is group
    assert SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4), group).process_group is group
    assert convert_sync_batchnorm(nn.BatchNorm2d(4)).process_group is None


def torch_sync_batch_norm_with_a_group():
    group = torch.distributed.new_group([0, 1])
    other = torch.distributed.new_group([0, 1])
    kept = convert_sync_batchnorm(nn.SyncBatchNorm(4, process_group=group))
    changed = convert_sync_batchnorm(nn.SyncBatchNorm(4, process_group=group), other)
    return (
        kept.process_group is group,
        changed.process_group is other,
        revert_sync_batchnorm(changed).process_group is group,
        pickle.loads(pickle.dumps(changed)).process_group is None,
    )


def test_torchs_own_process_group():
    assert run_ranks(torch_sync_batch_norm_with_a_group, 2) == [(True, True, True, True)] * 2


def test_copies_of_a_converted_layer_revert_too():
    sync = convert_sync_batchnorm(nn.BatchNorm3d(4))
    assert type(revert_sync_batchnorm(copy.deepcopy(sync))) is nn.BatchNorm3d
    assert type(revert_sync_batchnorm(pickle.loads(pickle.dumps(sync)))) is nn.BatchNorm3d
