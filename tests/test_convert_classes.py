"""A converted layer is an instance of what it was: who looks for BatchNorm by class finds it."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import syncnorm
from syncnorm import LazySyncBatchNorm, SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncnorm.modules import ProcessGroupReference
from syncnorm.testing import run_ranks

KINDS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
LAZY = [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d]
BY_FORMER_CODE = Path(__file__).parent / "data" / "converted.pt"  # converted and saved when all were SyncBatchNorm


def inputs(kind):
    """Return an input that the class takes."""
    axes = {nn.BatchNorm1d: 1, nn.BatchNorm3d: 3}.get(kind, 2)
    return torch.randn(4, 2, *[3] * axes)


class Named(nn.BatchNorm2d):
    """A subclass with all that a subclass may have but a forward."""

    momentum_of_new_layers = 0.01

    def __init__(self, num_features, name="norm"):
        super().__init__(num_features, momentum=self.momentum_of_new_layers)
        self.name = name

    def extra_repr(self):
        return f"{self.name}, {super().extra_repr()}"

    def scale(self):
        return self.weight / (self.running_var + self.eps).sqrt()

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.5)

    def _check_input_dim(self, input):
        if input.dim() != 4 or input.shape[-1] != input.shape[-2]:
            raise ValueError(f"square images, please, not {tuple(input.shape)}")

    def __setstate__(self, state):
        state.setdefault("name", "nameless")
        super().__setstate__(state)


class NamedLazily(nn.LazyBatchNorm2d):
    """Becomes a subclass."""

    cls_to_become = Named
    name = "lazy"


@pytest.mark.parametrize("kind", [*KINDS, *LAZY, Named, NamedLazily])
def test_a_converted_layer_is_what_it_was(kind):
    lazy = issubclass(kind, nn.modules.lazy.LazyModuleMixin)
    layer = convert_sync_batchnorm(kind() if lazy else kind(2))
    assert isinstance(layer, kind)
    assert isinstance(layer, LazySyncBatchNorm if lazy else SyncBatchNorm)
    assert isinstance(layer, _BatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert type(revert_sync_batchnorm(layer)) is kind


@pytest.mark.parametrize(("lazy", "becomes"), [*zip(LAZY, KINDS, strict=True), (NamedLazily, Named)])
def test_a_lazy_layer_becomes_what_it_would_have_become(lazy, becomes):
    layer = pickle.loads(pickle.dumps(convert_sync_batchnorm(lazy())))
    assert isinstance(layer, lazy)
    layer(inputs(becomes))
    for met in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(met, becomes)
        assert isinstance(met, SyncBatchNorm)
        assert not isinstance(met, nn.modules.lazy.LazyModuleMixin)
        assert type(revert_sync_batchnorm(met)) is becomes


def test_torchs_synchronized_layer_becomes_a_plain_one():
    class Own(nn.SyncBatchNorm):
        pass

    for kind in (nn.SyncBatchNorm, Own):
        layer = convert_sync_batchnorm(kind(2))
        assert type(layer) is SyncBatchNorm
        assert type(revert_sync_batchnorm(layer)) is kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_checks_of_the_class_stay(kind):
    original, layer = kind(2), convert_sync_batchnorm(kind(2))
    taken = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}[kind]
    for axes in range(1, 7):
        x = torch.randn(*[2] * axes)
        if axes in taken:
            torch.testing.assert_close(layer(x), original(x))
            continue
        errors = []
        for module in (original, layer):
            with pytest.raises(ValueError, match=rf"^expected .* input \(got {axes}D input\)$") as caught:
                module(x)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    assert layer.num_batches_tracked == original.num_batches_tracked == len(taken)
    with pytest.raises(TypeError, match="expected a tensor as input, got list"):
        layer([x])


def test_a_constructed_layer_takes_any_number_of_axes():
    for axes in range(2, 6):
        assert SyncBatchNorm(2)(torch.randn(*[2] * axes)).dim() == axes


def test_what_a_subclass_defines_stays():
    layer = convert_sync_batchnorm(Named(2, "mine"))
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert isinstance(twin, Named)
        assert isinstance(twin, SyncBatchNorm)
        assert twin.name == "mine"
        assert twin.momentum == 0.01
        torch.testing.assert_close(twin.scale(), torch.full((2,), 0.5))
        assert repr(twin).startswith("SyncBatchNorm(mine, 2, eps=1e-05")
        with pytest.raises(ValueError, match=r"square images, please, not \(1, 2, 3, 4\)"):
            twin(torch.randn(1, 2, 3, 4))
        x = torch.randn(3, 2, 4, 4)
        torch.testing.assert_close(twin(x), Named(2)(x))
        nn.init.zeros_(twin.weight)
        twin.reset_parameters()
        assert twin.weight.tolist() == [0.5, 0.5]
        assert type(revert_sync_batchnorm(twin)) is Named


def test_a_new_layer_of_the_converted_class():
    layer = convert_sync_batchnorm(Named(2))
    other = type(layer)(3, "other")
    assert (other.num_features, other.name) == (3, "other")
    assert type(convert_sync_batchnorm(Named(5))) is type(layer)
    for twin in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert type(twin) is type(layer)
        assert twin(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    assert type(revert_sync_batchnorm(other)) is Named


def test_a_subclass_may_be_local_and_have_a_metaclass():
    class Meta(type):
        pass

    class Local(nn.BatchNorm1d, metaclass=Meta):
        pass

    layer = copy.deepcopy(convert_sync_batchnorm(Local(2)))
    assert isinstance(layer, Local)
    assert isinstance(type(layer), Meta)
    assert type(revert_sync_batchnorm(layer)) is Local


def test_a_batch_norm_base_class_and_a_subclass_of_it():
    class AnyAxes(_BatchNorm):
        def _check_input_dim(self, input):
            pass

    assert type(convert_sync_batchnorm(_BatchNorm(2))) is SyncBatchNorm
    layer = convert_sync_batchnorm(AnyAxes(2))
    assert isinstance(layer, AnyAxes)
    assert layer(torch.randn(3, 2, 1, 1, 1, 4)).shape == (3, 2, 1, 1, 1, 4)
    assert type(revert_sync_batchnorm(layer)) is AnyAxes


# ---- copies and pickles


@pytest.mark.parametrize("kind", [*KINDS, nn.SyncBatchNorm, Named])
@pytest.mark.parametrize("protocol", [0, 1, 2, pickle.HIGHEST_PROTOCOL])
def test_copies_and_pickles_are_converted_too(kind, protocol):
    layer = convert_sync_batchnorm(kind(2, momentum=0.3) if kind is not Named else kind(2))
    layer.train()(inputs(kind))
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer, protocol))):
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        torch.testing.assert_close(twin.state_dict(), layer.state_dict(), rtol=0, atol=0)
        assert type(revert_sync_batchnorm(twin)) is kind


def model_of_all_kinds():
    torch.manual_seed(0)
    layers = [*(kind(2) for kind in KINDS), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d(), SyncBatchNorm(2)]
    return convert_sync_batchnorm(nn.ModuleList(layers))


IN_A_NEW_PROCESS = """
import sys, torch
from torch import nn
model = torch.load(sys.argv[1], weights_only=False)
import syncnorm
kinds = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, syncnorm.SyncBatchNorm, nn.LazyBatchNorm2d]
assert all(isinstance(layer, kind) for layer, kind in zip(model, kinds)), model
assert all(isinstance(layer, syncnorm.SyncBatchNorm) for layer in model), model
names = [type(layer).__name__ for layer in syncnorm.revert_sync_batchnorm(model)]
expected = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LazyBatchNorm2d", "SyncBatchNorm"]
assert names == expected, names
print("loaded")
"""


def test_a_saved_model_loads_in_a_new_process(tmp_path):
    torch.save(model_of_all_kinds(), tmp_path / "model.pt")
    command = [sys.executable, "-W", "error", "-c", IN_A_NEW_PROCESS, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "loaded\n", done.stderr


def test_a_saved_model_loads_with_weights_only(tmp_path):
    """The list of classes does not depend on what was converted, nor holds one that was made for it."""
    model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU()))
    torch.save(model, tmp_path / "model.pt")
    allowed = [SyncBatchNorm, ProcessGroupReference, nn.BatchNorm2d, nn.Sequential, nn.Conv2d, nn.ReLU]
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in allowed}
    assert set(torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "model.pt")) <= names
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert type(loaded[1]) is type(model[1])
    assert type(revert_sync_batchnorm(loaded)[1]) is nn.BatchNorm2d


def test_what_former_code_saved_loads_and_reverts():
    saved = torch.load(BY_FORMER_CODE, weights_only=False)
    assert [isinstance(layer, kind) for layer, kind in zip(saved["plain"], KINDS, strict=True)] == [True] * 3
    assert type(saved["torch_sync"]) is SyncBatchNorm
    assert isinstance(saved["lazy"], nn.LazyBatchNorm2d)
    assert isinstance(saved["lazy_met_its_input"], nn.BatchNorm1d)
    assert saved["lazy_met_its_input"].num_batches_tracked == 1
    assert saved["constructed"].activation == "relu"
    fused = saved["fused"].eval()
    x = torch.randn(2, 1, 3, 3)
    y = fused(x)
    back = {name: revert_sync_batchnorm(model) for name, model in saved.items()}
    assert [type(layer) for layer in back["plain"]] == KINDS
    assert type(back["torch_sync"]) is nn.SyncBatchNorm
    assert type(back["lazy"]) is nn.LazyBatchNorm2d
    assert type(back["lazy_met_its_input"]) is nn.BatchNorm1d
    assert type(back["constructed"]) is SyncBatchNorm
    assert [type(layer) for layer in back["fused"]] == [nn.Conv2d, nn.BatchNorm2d, nn.SiLU]
    torch.testing.assert_close(back["fused"](x), y)


def spawned(model):
    return [isinstance(layer, kind) for layer, kind in zip(model, KINDS, strict=False)]


def test_a_converted_model_is_sent_to_other_processes():
    assert run_ranks(spawned, 1, model_of_all_kinds()) == [[True] * 3]


# ---- helpers that look for BatchNorm by class, in our words


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), Named(2), nn.Flatten(), nn.BatchNorm1d(18)
    )


def frozen(model):
    """Freeze as trainings do: eval mode, and no gradient for weight and bias."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            layer.eval()
            layer.weight.requires_grad_(False)
            layer.bias.requires_grad_(False)
    return [name for name, p in model.named_parameters() if not p.requires_grad]


def without_decay(model):
    """Split off what weight decay is not for, by class."""
    return [
        f"{name}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        for key, _ in layer.named_parameters(recurse=False)
    ]


@pytest.mark.parametrize("helper", [frozen, without_decay])
def test_helpers_find_converted_layers(helper):
    expected = helper(network())
    assert len(expected) == 6
    assert helper(convert_sync_batchnorm(network())) == expected
    assert helper(nn.Sequential(SyncBatchNorm(2))) == []  # not one of these classes: it takes any number of axes


class FrozenBatchNorm(nn.Module):
    """A fixed affine map in the place of a BatchNorm, as detection models have it."""

    def __init__(self, scale, shift):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x):
        return x * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)

    @classmethod
    def convert(cls, module):
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            scale = module.weight.detach() * (module.running_var + module.eps).rsqrt()
            return cls(scale, module.bias.detach() - module.running_mean * scale)
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child))
        return module


def test_a_conversion_to_frozen_layers_finds_converted_ones():
    model = network()[:5]
    model(torch.randn(4, 1, 3, 3))
    model.eval()
    x = torch.randn(2, 1, 3, 3)
    expected = model(x)
    frozen_model = FrozenBatchNorm.convert(convert_sync_batchnorm(model))
    assert [type(layer) for layer in (frozen_model[1], frozen_model[4])] == [FrozenBatchNorm] * 2
    torch.testing.assert_close(frozen_model(x), expected)
    assert convert_sync_batchnorm(frozen_model) is frozen_model
    assert type(frozen_model[1]) is FrozenBatchNorm


def test_update_bn_of_stochastic_weight_averaging():
    batches = [torch.randn(4, 1, 3, 3) for _ in range(3)]
    plain, sync = network(), convert_sync_batchnorm(network())
    for model in (plain, sync):
        update_bn(batches, model)
    torch.testing.assert_close(sync.state_dict(), plain.state_dict())
    assert sync[1].running_mean.abs().max() > 0
    assert sync[1].momentum == 0.1


def mixed_precision(convert):
    """Return the dtypes of weight, input and output of a layer under FSDP."""
    policy = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    model = convert_sync_batchnorm(model) if convert else model
    seen = []
    for layer in model:
        layer.register_forward_pre_hook(lambda layer, args: seen.append((layer.weight.dtype, args[0].dtype)))
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({nn.Conv2d}), mixed_precision=policy, device_id=torch.device("cpu")
    )
    wrapped(torch.randn(2, 1, 3, 3))
    return seen


def mixed_precisions():
    return mixed_precision(convert=True), mixed_precision(convert=False)


def test_fsdp_keeps_converted_layers_in_full_precision():
    for converted, plain in run_ranks(mixed_precisions, 2):
        assert converted == plain
        assert [weight for weight, _ in converted] == [torch.bfloat16, torch.float32, torch.bfloat16]


def trained_under_ddp():
    model = nn.parallel.DistributedDataParallel(convert_sync_batchnorm(network()))
    rank = syncnorm.communicator().rank
    x = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(rank))
    model(x).square().sum().backward()
    return [type(layer).__mro__[1].__name__ for layer in model.module if isinstance(layer, SyncBatchNorm)], [
        buffer.tolist() for buffer in model.buffers()
    ]


def test_converted_layers_train_under_ddp_on_cpus():
    first, second = run_ranks(trained_under_ddp, 2)
    assert first[0] == ["BatchNorm2d", "Named", "BatchNorm1d"]
    assert first == second


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reverts_to_the_attributes_of_the_original(copied):
    model = nn.Sequential(nn.BatchNorm2d(2))
    converted = copied(syncnorm.convert_sync_batchnorm(copy.deepcopy(model)))
    assert vars(syncnorm.revert_sync_batchnorm(converted)[0]).keys() == vars(model[0]).keys()
