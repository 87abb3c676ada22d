"""BatchNorm classes of other libraries with a forward of their own, told by their paths; here with stand-ins."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from syncnorm import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncnorm.testing import run_ranks


def named(path):
    """Give a class the path of another."""

    def rename(kind):
        kind.__module__, _, kind.__qualname__ = path.rpartition(".")
        return kind

    return rename


class WithParts:
    def add(self, act, drop):
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act
        return self


@named("timm.layers.norm_act.BatchNormAct2d")
class BatchNormAct2d(WithParts, nn.BatchNorm2d):
    def forward(self, x):
        x = F.batch_norm(
            *(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        )
        return self.act(self.drop(x))


@named("timm.layers.norm_act.SyncBatchNormAct")
class SyncBatchNormAct(WithParts, nn.SyncBatchNorm):
    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@named("detectron2.layers.batch_norm.NaiveSyncBatchNorm")
class NaiveSyncBatchNorm(nn.BatchNorm2d):
    def forward(self, input):
        raise NotImplementedError


@named("lightly.models.batchnorm.SplitBatchNorm")
class SplitBatchNorm(nn.BatchNorm2d):
    def forward(self, input):
        raise NotImplementedError


class Scaled(BatchNormAct2d):
    def forward(self, x):
        return 2 * super().forward(x)


def network(act, drop=None):
    torch.manual_seed(0)
    norm = BatchNormAct2d(3, dtype=torch.float64).add(act, drop)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.Sequential(nn.Conv2d(2, 3, 3, dtype=torch.float64), norm, nn.Conv2d(3, 2, 1, dtype=torch.float64))


def batch(seed=1):
    return torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def results(model, training, x=None):
    """Return the output, the gradients and the buffers of a step."""
    x = batch() if x is None else x
    x.requires_grad_()
    torch.manual_seed(3)  # for dropout
    y = model.train(training)(x)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(y, [x, *model.parameters()], dy)
    return [y.detach(), *grads, *(b.clone() for name, b in model.named_buffers() if "num_batches" not in name)]


def assert_equal(model, other):
    for training in (True, False):
        for actual, expected in zip(results(model, training), results(other, training), strict=True):
            torch.testing.assert_close(actual, expected)


ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "silu": nn.SiLU(inplace=True),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "leaky_relu": nn.LeakyReLU(),
    "another slope": nn.LeakyReLU(0.2),
    "hardswish": nn.Hardswish(),
    "none": None,
}
ABSORBED = list(ACTIVATIONS)[:4]


@pytest.mark.parametrize("fuse", [False, True, "auto"])
@pytest.mark.parametrize("drop", [None, nn.Dropout2d(0.5)], ids=["", "drop"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_follows_the_norm_is_kept(name, drop, fuse):
    act = copy.deepcopy(ACTIVATIONS[name])
    original = network(act, copy.deepcopy(drop))
    expected = copy.deepcopy(original)
    attributes, children = dict(vars(original[1])), list(original[1].children())
    model = convert_sync_batchnorm(original, fuse=fuse)
    layer = model[1]
    assert isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, BatchNormAct2d)
    absorbed = bool(fuse) and drop is None and name in ABSORBED
    assert layer.activation == (name if absorbed else None)
    assert type(layer.act) is (nn.Identity if absorbed or act is None else type(act))
    assert_equal(model, copy.deepcopy(expected))
    assert_equal(copy.deepcopy(model), model)
    reverted = revert_sync_batchnorm(model)
    assert type(reverted[1]) is BatchNormAct2d
    assert vars(reverted[1]).keys() == attributes.keys()
    assert [type(child) for child in reverted[1].children()] == [type(child) for child in children]
    assert_equal(reverted, model.train() if model is not reverted else copy.deepcopy(reverted))


def test_the_activation_makes_a_difference():
    """The negative control."""
    with pytest.raises(AssertionError, match="not close"):
        assert_equal(convert_sync_batchnorm(network(nn.ReLU())), network(None))


def test_a_layer_without_activation_absorbs_the_one_after_it():
    model = network(None)
    model.insert(2, nn.ReLU())
    expected = copy.deepcopy(model)
    model = convert_sync_batchnorm(model, fuse=True)
    assert (model[1].activation, type(model[2])) == ("relu", nn.Identity)
    assert_equal(model, expected)
    assert type(revert_sync_batchnorm(model)[2]) is nn.ReLU


def test_converted_layers_can_be_fused_later():
    model = convert_sync_batchnorm(network(nn.ReLU()))
    expected = copy.deepcopy(model)
    assert convert_sync_batchnorm(model, fuse=True)[1].activation == "relu"
    assert_equal(model, expected)
    assert type(revert_sync_batchnorm(model)[1].act) is nn.ReLU


def test_an_activation_that_a_hook_reads_stays():
    model = network(nn.ReLU())
    model[1].act.register_forward_hook(lambda module, inputs, output: None)
    assert convert_sync_batchnorm(model, fuse=True)[1].activation is None


def test_an_activation_that_is_called_elsewhere_too():
    act = nn.SiLU()
    model = nn.Sequential(*network(act), act)
    expected = copy.deepcopy(model)
    model = convert_sync_batchnorm(model, fuse=True)
    assert model[1].activation is None  # else the second call would compute nothing
    assert_equal(model, expected)


def test_a_layer_alone():
    layer = convert_sync_batchnorm(BatchNormAct2d(3).add(nn.ReLU(), None), fuse=True)
    assert layer.activation == "relu"
    assert layer(torch.randn(4, 3, 2, 2)).min() == 0


def test_a_synchronized_class_of_torch_becomes_no_subclass_of_torch_s():
    model = nn.Sequential(SyncBatchNormAct(3, dtype=torch.float64).add(nn.ReLU(), None))
    x = batch()[:, :1].expand(-1, 3, -1, -1)
    expected = F.relu(F.batch_norm(x, None, None, training=True))
    converted = convert_sync_batchnorm(model)
    assert not isinstance(converted[0], nn.SyncBatchNorm)  # which DistributedDataParallel refuses on CPUs
    torch.testing.assert_close(converted(x), expected)
    torch.testing.assert_close(copy.deepcopy(converted)(x), expected)
    reverted = revert_sync_batchnorm(converted)
    assert type(reverted[0]) is SyncBatchNormAct
    assert reverted[0].process_group is None


def test_a_naive_class_only_synchronizes():
    model = nn.Sequential(NaiveSyncBatchNorm(2, dtype=torch.float64))
    x = batch()
    torch.testing.assert_close(convert_sync_batchnorm(model)(x), F.batch_norm(x, None, None, training=True))
    assert type(revert_sync_batchnorm(model)[0]) is NaiveSyncBatchNorm


def test_a_class_that_splits_its_batch_is_refused_with_the_reason():
    with pytest.raises(TypeError, match=r"'0': SplitBatchNorm; it splits its batch on purpose.*replace it by"):
        convert_sync_batchnorm(nn.Sequential(SplitBatchNorm(2)))


def test_a_subclass_with_a_forward_of_its_own_is_not_known():
    with pytest.raises(TypeError, match="one with its own forward at '0': Scaled"):
        convert_sync_batchnorm(nn.Sequential(Scaled(2).add(None, None)))


def on_ranks(fuse):
    import syncnorm

    group = syncnorm.communicator()
    model = convert_sync_batchnorm(network(nn.SiLU()), fuse=fuse)
    x = batch().tensor_split([1])[group.rank]
    x.requires_grad_()
    y = model(x)
    dy = torch.randn(4, *y.shape[1:], dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(y, [x, *model.parameters()], dy.tensor_split([1])[group.rank])
    return y.detach(), grads, model[1].running_var


@pytest.mark.parametrize("fuse", [False, True])
def test_shards_match_the_whole_batch(fuse):
    y, dx, *expected = results(network(nn.SiLU()), training=True)
    grads, (_, var) = expected[:-2], expected[-2:]
    outputs = run_ranks(on_ranks, 2, fuse)
    torch.testing.assert_close(torch.cat([out[0] for out in outputs]), y)
    torch.testing.assert_close(torch.cat([out[1][0] for out in outputs]), dx)
    for sums, expected in zip(zip(*(out[1][1:] for out in outputs), strict=True), grads, strict=True):
        torch.testing.assert_close(sum(sums), expected)
    torch.testing.assert_close(outputs[0][2], var)
