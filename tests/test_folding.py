"""Code that folds a norm into the layer before it, or replaces it, meets layers with an activation inside.

What such code drops has to be nothing: the folded model gives what the model gave, or an error says what to do.
"""

import copy
import inspect
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from torch import fx, nn
from torch.ao.quantization import fuse_modules
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports what torch has deprecated
    from torch.fx.experimental import optimization

REFUSED = r"expected to read eps from a norm without an activation, got activation='{}'.*revert_sync_batchnorm\(model\)"
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU}


class Block(nn.Module):
    """A convolution, a norm and an activation, as detection models have them, with a way to go without the norm."""

    def __init__(self, activation=nn.SiLU, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(2, 2, 3, bias=False), norm(2), activation()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_folded(self, x):
        return self.act(self.conv(x))


def trained(model):
    """Give the norms statistics and parameters that are not all alike; return the model in eval mode."""
    model.double()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    for _ in range(3):
        model(torch.randn(4, 2, 6, 6, dtype=torch.float64))
    return model.eval()


def folded_by_attributes(conv, bn):
    """Fold by what the layers hold, as YOLO and its like do."""
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, dtype=conv.weight.dtype)
    scale = bn.weight / torch.sqrt(bn.eps + bn.running_var)
    folded.weight.data = conv.weight * scale.view(-1, 1, 1, 1)
    folded.bias.data = bn.bias - bn.running_mean * scale
    return folded


def fold_blocks(model, fold):
    """Fold wherever a block has a norm, and go without it."""
    for block in model.modules():
        if isinstance(block, Block):
            block.conv = fold(block.conv, block.bn)
            del block.bn
            block.forward = block.forward_folded
    return model


def fold_by_class(model, fold):
    """Fold each BatchNorm2d that follows a convolution in a container, and leave an Identity."""
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, conv), (next_name, bn) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                setattr(parent, name, fold(conv, bn))
                setattr(parent, next_name, nn.Identity())
    return model


FOLDS = [fuse_conv_bn_eval, folded_by_attributes]
WAYS = [fold_blocks, fold_by_class]


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_converted_model_folds_as_the_original_does(fold, way):
    model = trained(nn.Sequential(Block(), Block(nn.ReLU)))
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = model(x)
    for converted in (copy.deepcopy(model), convert_sync_batchnorm(copy.deepcopy(model))):
        folded = way(converted, fold)
        assert not any(isinstance(layer, SyncBatchNorm) for layer in folded.modules())
        torch.testing.assert_close(folded(x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_fused_model_does_not_fold_without_its_activation(activation, fold, way):
    model = trained(nn.Sequential(Block(ACTIVATIONS[activation])))
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = model(x)
    fused = convert_sync_batchnorm(copy.deepcopy(model), fuse=True)
    assert fused[0].bn.activation == activation
    for twin in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with pytest.raises(TypeError, match=REFUSED.format(activation)):
            way(twin, fold)
        torch.testing.assert_close(twin(x), expected)  # nothing was folded
        folded = way(revert_sync_batchnorm(twin), fold)
        torch.testing.assert_close(folded(x), expected)


def test_the_activation_would_have_been_dropped():
    """The negative control: a norm that hides its activation loses it in the same code."""

    class Hiding(nn.BatchNorm2d):
        def forward(self, x):
            return nn.functional.silu(super().forward(x))

    model = trained(nn.Sequential(Block(nn.Identity, Hiding)))
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = model(x)
    assert (fold_blocks(model, fuse_conv_bn_eval)(x) - expected).abs().max() > 0.1


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "gelu_tanh"])
def test_a_layer_constructed_with_an_activation_does_not_fold(activation):
    layer = trained(SyncBatchNorm(2, activation=activation))
    for fold, before in ((fuse_conv_bn_eval, nn.Conv2d(2, 2, 1)), (fuse_linear_bn_eval, nn.Linear(2, 2))):
        with pytest.raises(TypeError, match=REFUSED.format(activation)):
            fold(before.double().eval(), layer)
        assert fold(before, trained(SyncBatchNorm(2))).bias is not None


def test_other_norms_are_not_put_in_the_place_of_an_activated_one():
    model = convert_sync_batchnorm(nn.Sequential(Block(nn.ReLU)), fuse=True)
    with pytest.raises(TypeError, match=REFUSED.format("relu")):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(revert_sync_batchnorm(model))[0].bn) is nn.SyncBatchNorm


def test_what_folds_by_the_exact_class_leaves_converted_layers_alone():
    model = trained(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.SiLU()))
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = model(x)
    assert len(list(optimization.fuse(model).children())) == 2  # it does fold the original

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, SyncBatchNorm) or super().is_leaf_module(m, name)

    for fuse in (False, True):
        converted = convert_sync_batchnorm(copy.deepcopy(model), fuse=fuse)
        graph = fx.GraphModule(converted, Tracer().trace(converted))
        folded = optimization.fuse(graph, no_trace=True)
        torch.testing.assert_close(folded(x), expected)
        assert isinstance(folded.get_submodule("1"), SyncBatchNorm)
        for names in (["0", "1"], ["0", "1", "2"]):
            with pytest.raises(AssertionError, match="did not find fuser method"):
                fuse_modules(converted, [names])
        torch.testing.assert_close(converted(x), expected)


# ---- eps, which is what such code reads


def test_eps_of_an_activated_layer():
    layer = SyncBatchNorm(2, eps=1e-3, activation="relu")
    with pytest.raises(TypeError, match=REFUSED.format("relu")):
        layer.eps  # noqa: B018
    with pytest.raises(TypeError):
        getattr(layer, "eps", 1e-5)  # no default instead
    assert vars(layer)["eps"] == 1e-3
    assert "eps=0.001" in repr(layer)
    assert "activation=relu" in repr(layer)
    layer.activation = None
    assert layer.eps == 1e-3


@pytest.mark.parametrize("activation", [None, "relu"])
def test_all_listed_attributes_can_be_read(activation):
    """As torch.jit.trace, debuggers and inspect.getmembers do."""
    layer = SyncBatchNorm(2, activation=activation)
    assert ("eps" in dict(inspect.getmembers(layer))) == (activation is None)


def test_eps_can_be_set_and_counts():
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for layer in (SyncBatchNorm(2), convert_sync_batchnorm(nn.BatchNorm1d(2)), SyncBatchNorm(2, activation="relu")):
        layer.double().eps = 0.5
        expected = nn.functional.batch_norm(x, None, None, training=True, eps=0.5)
        expected = expected.relu() if layer.activation else expected
        torch.testing.assert_close(layer(x), expected)
        assert vars(copy.deepcopy(layer))["eps"] == vars(pickle.loads(pickle.dumps(layer)))["eps"] == 0.5


def test_a_fused_model_goes_on_as_before():
    """Hooks, activation checkpointing and torch.compile read no eps."""
    model = trained(nn.Sequential(Block(), Block(nn.ReLU))).train()
    fused = convert_sync_batchnorm(copy.deepcopy(model), fuse=True)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    seen = []
    handle = fused[0].bn.register_forward_hook(lambda layer, args, y: seen.append(y.shape))
    for run in (
        lambda twin: twin(x),
        lambda twin: checkpoint(twin, x, use_reentrant=False),
        torch.compile(lambda twin: twin(x), backend="eager", fullgraph=True),
    ):
        twin = copy.deepcopy(fused)
        torch.testing.assert_close(run(twin), expected)
        assert twin[0].bn.num_batches_tracked == fused[0].bn.num_batches_tracked + 1
    handle.remove()
    assert len(seen) == 3
    assert syncnorm.revert_sync_batchnorm(fused)[0].bn.eps == 1e-5
