"""What cannot be converted or reverted is refused by name, before anything is changed; what looks like it can be."""

import copy
import types
import warnings

import pytest
import torch
from torch import fx, nn
from torch.ao.nn import intrinsic
from torch.ao.quantization import get_default_qat_qconfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

from syncnorm import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from syncnorm.testing import run_ranks

DEPRECATED = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore:.*deprecated:FutureWarning")
WAYS = [convert_sync_batchnorm, revert_sync_batchnorm]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(2)))


def kinds(model):
    return [type(layer) for layer in model.modules()]


def assert_refused(way, model, match):
    """Check the error, and that no module of the model is another than before."""
    before = list(model.modules())
    with pytest.raises(TypeError, match=match):
        way(model)
    assert [a is b for a, b in zip(model.modules(), before, strict=True)] == [True] * len(before)


# ---- what is no module


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("given", "name"),
    [([nn.BatchNorm2d(2)], "list"), ({"a": nn.BatchNorm2d(2)}, "dict"), (None, "NoneType"), (nn.BatchNorm2d, "type")],
)
def test_what_is_no_module(way, given, name):
    with pytest.raises(TypeError, match=rf"^expected a torch\.nn\.Module, got {name}$"):
        way(given)


def test_containers_of_torch_are_modules():
    model = nn.ModuleDict(
        {"list": nn.ModuleList([nn.BatchNorm1d(2), None or nn.ReLU()]), "more": nn.ParameterList([torch.ones(2)])}
    )
    model.register_module("none", None)
    before = kinds(model)
    assert convert_sync_batchnorm(model) is model
    assert isinstance(model["list"][0], SyncBatchNorm)
    revert_sync_batchnorm(model)
    assert kinds(model) == before


# ---- what torch made a graph of


class Calls(nn.Module):
    """Computes batch normalization as a function."""

    def __init__(self, training):
        super().__init__()
        self.fixed = training

    def forward(self, x):
        mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        return nn.functional.batch_norm(x, mean, var, training=self.fixed)


def exported(model):
    return torch.export.export(model, (torch.randn(2, 1, 3, 3),))


GRAPHS = {
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, torch.randn(2, 1, 3, 3), check_trace=False),
    "exported": lambda model: exported(model).module(),
    "decomposed": lambda model: exported(model).run_decompositions({}).module(),
    "unflattened": lambda model: torch.export.unflatten(exported(model)),
}


@DEPRECATED
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_that_compute_batch_norm_are_refused(name):
    message = "got a scripted, traced or exported graph at '{}': .*; convert the model before torch.jit"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = GRAPHS[name](network())
    assert_refused(convert_sync_batchnorm, graph, message.format("1" if name == "unflattened" else "the root"))
    model = nn.Sequential(nn.BatchNorm2d(1), graph)
    assert_refused(convert_sync_batchnorm, model, message.format("1.1" if name == "unflattened" else "1"))
    assert type(model[0]) is nn.BatchNorm2d
    kept = kinds(graph)
    assert revert_sync_batchnorm(graph) is graph  # it has no converted layer
    assert kinds(graph) == kept


def test_an_exported_program_is_no_module():
    with pytest.raises(TypeError, match="got ExportedProgram"):
        convert_sync_batchnorm(exported(network()))


@DEPRECATED
@pytest.mark.parametrize("name", ["traced", "exported", "decomposed", "unflattened"])
def test_graphs_that_are_fixed_to_eval_have_nothing_to_synchronize(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = GRAPHS[name](network().eval())
    assert convert_sync_batchnorm(nn.Sequential(graph, nn.BatchNorm2d(2)))[0] is graph


@DEPRECATED
def test_graphs_without_batch_norm_stay():
    graph = torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.InstanceNorm2d(2)))
    model = convert_sync_batchnorm(nn.Sequential(graph, nn.BatchNorm2d(2)))
    assert model[0] is graph
    assert isinstance(model[1], SyncBatchNorm)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_graph_module_that_calls_modules_is_converted(fuse):
    model = network()
    graph = fx.symbolic_trace(copy.deepcopy(model))
    x = torch.randn(3, 1, 4, 4)
    assert convert_sync_batchnorm(graph, fuse=fuse) is graph
    assert [isinstance(graph.get_submodule(name), SyncBatchNorm) for name in ("1", "3.0")] == [True, True]
    assert graph.get_submodule("1").activation == ("relu" if fuse else None)
    torch.testing.assert_close(graph(x), model(x))
    revert_sync_batchnorm(graph)
    assert type(graph.get_submodule("1")) is nn.BatchNorm2d
    torch.testing.assert_close(graph(x), model(x))


def test_a_graph_module_that_calls_functions_is_refused():
    assert_refused(convert_sync_batchnorm, fx.symbolic_trace(Calls(True)), "traced or exported graph at 'the root'")
    assert convert_sync_batchnorm(fx.symbolic_trace(Calls(False))) is not None


# ---- what something else holds on to


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", nn.Softplus())


def weight_normalized(layer):
    layer.weight = nn.Parameter(layer.weight.detach())
    parametrizations.weight_norm(layer, "weight")


def spectrally_normalized(layer):
    parametrizations.spectral_norm(layer, "bias")


def compiled(layer):
    layer.compile(backend="eager")


def replaced(layer):
    layer.forward = lambda x: x


def reclassed(layer):
    layer.__class__ = type("Another", (type(layer),), {})


TIES = [parametrized, weight_normalized, spectrally_normalized, compiled]
HOW = {
    parametrized: r"a parametrized one at '3.0': Parametrized.*; remove its parametrizations first and register",
    weight_normalized: "a parametrized one at '3.0': Parametrized.*; remove its parametrizations first",
    spectrally_normalized: "a parametrized one at '3.0': Parametrized.*; remove its parametrizations first",
    compiled: r"a compiled one at '3.0': .*; revert the model that was passed to torch\.compile",
    replaced: "one whose forward was replaced at '3.0': .*; delete the forward attribute of the layer first",
    reclassed: "one whose class was replaced at '3.0': Another; restore the class that the conversion gave",
}


@pytest.mark.parametrize("tie", HOW)
def test_layers_that_were_tied_since_are_not_reverted(tie):
    model = convert_sync_batchnorm(network())
    tie(model[3][0])
    assert_refused(revert_sync_batchnorm, model, HOW[tie])
    assert isinstance(model[1], SyncBatchNorm)
    with torch.no_grad():
        assert model(torch.randn(3, 1, 4, 4)).shape == (3, 2, 4, 4)
    constructed = SyncBatchNorm(2)
    tie(constructed)
    assert revert_sync_batchnorm(constructed) is constructed  # there is nothing to revert


@pytest.mark.parametrize("tie", TIES)
def test_tied_layers_are_not_converted(tie):
    model = network()
    tie(model[3][0])
    assert_refused(convert_sync_batchnorm, model, r"got a (parametrized|compiled) one \(convert before .*\) at '3.0'")


def test_a_parametrized_layer_reverts_once_its_parametrization_is_removed():
    model = convert_sync_batchnorm(network())
    parametrized(model[3][0])
    parametrize.remove_parametrizations(model[3][0], "weight")
    torch.testing.assert_close(model[3][0].weight, nn.functional.softplus(torch.ones(2)))
    assert type(revert_sync_batchnorm(model)[3][0]) is nn.BatchNorm2d


def test_the_compiled_layer_itself_is_refused_and_a_compiled_model_is_not():
    layer = torch.compile(nn.BatchNorm2d(2), backend="eager")
    assert_refused(convert_sync_batchnorm, layer, r"a compiled one \(convert before torch\.compile\) at '_orig_mod'")
    assert_refused(
        revert_sync_batchnorm, torch.compile(convert_sync_batchnorm(nn.BatchNorm2d(2)), backend="eager"), "compiled one"
    )
    assert_refused(convert_sync_batchnorm, nn.Sequential(layer), "at '0._orig_mod'")


@pytest.mark.parametrize("by", ["torch.compile", "Module.compile"])
def test_a_model_that_is_compiled_already_is_compiled_anew(by):
    model = nn.Sequential(nn.BatchNorm2d(2))
    if by == "torch.compile":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    x = torch.randn(3, 2, 4, 4)
    assert model(x).min() < 0
    assert convert_sync_batchnorm(model) is model
    next(layer for layer in model.modules() if isinstance(layer, SyncBatchNorm)).activation = "relu"
    assert model(x).min() == 0
    revert_sync_batchnorm(model)
    assert model(x).min() < 0


def sharded(kind):
    """Shard a converted model in the way that `kind` names, and revert it."""
    model = convert_sync_batchnorm(network())
    mesh = init_device_mesh("cpu", (2,))
    if kind == "FullyShardedDataParallel":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    else:
        fully_shard(model[1] if kind == "fully_shard on the layer" else model, mesh=mesh)
    before = kinds(model)
    with pytest.raises(TypeError, match=r"got a sharded one at '.*1'.*load the full state dict into a model that is"):
        revert_sync_batchnorm(model)
    assert kinds(model) == before
    model(torch.randn(3, 1, 4, 4)).sum().backward()
    return True


def sharded_in_all_ways():
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"got a sharded one \(convert before .*\) at '_fsdp_wrapped_module.1'"):
        convert_sync_batchnorm(model)
    return [sharded(kind) for kind in ("fully_shard", "fully_shard on the layer", "FullyShardedDataParallel")]


def test_sharded_layers_are_neither_converted_nor_reverted():
    assert run_ranks(sharded_in_all_ways, 2) == [[True] * 3] * 2


def reverted_under_ddp():
    torch.manual_seed(0)
    ddp = nn.parallel.DistributedDataParallel(convert_sync_batchnorm(network()))
    revert_sync_batchnorm(ddp)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    ddp(x).square().sum().backward()
    twin = network()
    twin(x).square().sum().backward()
    return (
        [type(ddp.module[1]) is nn.BatchNorm2d],
        [parameter.grad for parameter in ddp.parameters()],
        [parameter.grad for parameter in twin.parameters()],
    )


def test_a_model_reverts_under_ddp():
    (kind, averaged, first), (_, other, second) = run_ranks(reverted_under_ddp, 2)
    assert kind == [True]
    torch.testing.assert_close(averaged, other)
    torch.testing.assert_close(averaged, [(a + b) / 2 for a, b in zip(first, second, strict=True)])


# ---- what goes along


def test_pruned_layers_stay_pruned():
    x = torch.randn(3, 2, 4, 4)
    mask = torch.tensor([1.0, 0.0])
    for way in ("before", "after"):
        layer = nn.BatchNorm2d(2) if way == "before" else convert_sync_batchnorm(nn.BatchNorm2d(2))
        prune.custom_from_mask(layer, "weight", mask)
        layer = convert_sync_batchnorm(layer)
        assert isinstance(layer, SyncBatchNorm)
        nn.init.constant_(layer.weight_orig, 3.0)
        assert layer(x)[:, 1].abs().max() == 0
        layer = revert_sync_batchnorm(layer)
        assert type(layer) is nn.BatchNorm2d
        nn.init.constant_(layer.weight_orig, 2.0)
        y = layer(x)
        assert y[:, 1].abs().max() == 0
        torch.testing.assert_close(y[:, 0].std(correction=0), torch.tensor(2.0), atol=1e-3, rtol=0)
        prune.remove(layer, "weight")
        assert layer.weight.tolist() == [2.0, 0.0]


def test_a_method_that_was_replaced_goes_along():
    layer = nn.BatchNorm2d(2).eval()

    def stay(self, mode=True):
        self.asked = mode
        return self

    layer.train = types.MethodType(stay, layer)
    sync = convert_sync_batchnorm(layer)
    assert sync.train(True) is sync
    assert (sync.training, sync.asked) == (False, True)
    back = revert_sync_batchnorm(sync)
    assert back.train(False) is back
    assert back.asked is False
    assert not hasattr(layer, "asked")


@pytest.mark.parametrize("name", ["activation", "inplace", "process_group"])
def test_attributes_that_have_the_names_of_ours_are_refused(name):
    layer = nn.BatchNorm2d(2)
    setattr(layer, name, nn.ReLU() if name == "activation" else "mine")
    model = nn.Sequential(nn.BatchNorm2d(2), layer)
    assert_refused(
        convert_sync_batchnorm, model, f"one with an attribute '{name}', which SyncBatchNorm also uses, at '1'"
    )
    by_class = type("Own", (nn.BatchNorm2d,), {name: None})
    assert_refused(convert_sync_batchnorm, by_class(2), f"one with an attribute '{name}'")


def test_a_class_of_which_no_subclass_can_be_made_is_refused_before_anything_changes():
    class Last(nn.BatchNorm2d):
        def __init_subclass__(cls):
            raise TypeError("no subclass of Last")

    model = nn.Sequential(nn.BatchNorm2d(2), Last(2))
    assert_refused(convert_sync_batchnorm, model, "no subclass of Last")


def test_data_parallel_and_shared_layers():
    shared = nn.BatchNorm2d(2)
    model = nn.DataParallel(nn.Sequential(nn.Conv2d(2, 2, 1), shared, shared))
    x = torch.randn(3, 2, 4, 4)
    expected = copy.deepcopy(model)(x)
    convert_sync_batchnorm(model)
    assert isinstance(model.module[1], SyncBatchNorm)
    assert model.module[1] is model.module[2]
    torch.testing.assert_close(model(x), expected)
    revert_sync_batchnorm(model)
    assert type(model.module[1]) is nn.BatchNorm2d
    assert model.module[1] is model.module[2]


@DEPRECATED
def test_layers_of_quantization_aware_training_normalize_as_before():
    """Its ConvBn2d has a BatchNorm inside, whose eps and statistics it reads."""
    float_layer = intrinsic.ConvBn2d(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).train()
    float_layer.qconfig = get_default_qat_qconfig("fbgemm")
    x = torch.randn(3, 2, 4, 4)
    quantized = intrinsic.qat.ConvBn2d.from_float(float_layer)
    for reference in (float_layer, quantized):
        model = nn.Sequential(reference, nn.ReLU())
        sync = convert_sync_batchnorm(copy.deepcopy(model))
        assert sum(isinstance(layer, SyncBatchNorm) for layer in sync.modules()) == 1
        plain = copy.deepcopy(model)
        torch.testing.assert_close(sync(x), plain(x))
        torch.testing.assert_close(sync.state_dict(), plain.state_dict())
        assert kinds(revert_sync_batchnorm(sync)) == kinds(model)
    with pytest.raises(TypeError, match=r"torch\.fx can trace with fuse=True"):
        convert_sync_batchnorm(nn.Sequential(quantized, nn.ReLU()), fuse=True)
    fused = convert_sync_batchnorm(nn.Sequential(float_layer, nn.ReLU()), fuse=True)
    assert fused[0][1].activation == "relu"
    fused[0][0].qconfig, fused[0].qconfig = None, get_default_qat_qconfig("fbgemm")
    with pytest.raises(TypeError, match="expected to read eps from a norm without an activation"):
        intrinsic.qat.ConvBn2d.from_float(fused[0])
