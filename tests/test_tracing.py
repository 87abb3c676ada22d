"""torch.jit, torch.fx, make_fx and torch.export: the result is the model's, or an error says what to do.

The oracle is the model itself, on data that the tracer has not seen.
"""

import copy
import functools
import io

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import syncnorm
from syncnorm.functional import sync_batch_norm
from syncnorm.testing import CountingCommunicator

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # as the package does, but pytest undoes it

LAYERS = {
    "batch": lambda: syncnorm.SyncBatchNorm(3, activation="relu"),
    "cumulative": lambda: syncnorm.SyncBatchNorm(3, momentum=None),
    "layer": lambda: syncnorm.LayerNorm(4),
    "rms": lambda: syncnorm.RMSNorm(4, bias=True, eps_outside=True),
    "group": lambda: syncnorm.GroupNorm(1, 3),
}
fx.wrap("sync_batch_norm")


def model_with(layer, training=True):
    """Return a model whose running statistics have moved."""
    model = nn.Sequential(nn.Conv1d(3, 3, 1), layer)
    model(torch.randn(6, 3, 4) + 1)
    return model.train(training)


def assert_same(traced, model, size=6):
    """Compare outputs and buffers over calls on new data, also of another size."""
    for n in (6, size):
        x = torch.randn(n, 3, 4) * 3
        torch.testing.assert_close(traced(x), model(x))
    buffers = dict(traced.named_buffers())
    for name, buffer in model.named_buffers():
        if name in buffers:  # an export has only those that it uses
            torch.testing.assert_close(buffers[name], buffer)


def jit_traced(model):
    """Trace, save and load."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.randn(6, 3, 4), check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


def exported(model):
    return torch.export.export(model, (torch.randn(6, 3, 4),)).module()


def exported_strictly(model):
    return torch.export.export(model, (torch.randn(6, 3, 4),), strict=True).module()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tracer", [jit_traced, fx.symbolic_trace, exported])
def test_a_traced_model_does_what_the_model_does(tracer, kind, training):
    model = model_with(LAYERS[kind](), training)
    traced = tracer(copy.deepcopy(model))
    before = copy.deepcopy(model.state_dict())
    traced.load_state_dict(before)  # a tracer may have run the model
    assert_same(traced, model, size=6 if tracer is exported else 11)


@pytest.mark.parametrize("training", [True, False])
def test_an_export_by_the_compiler_does_too(training):
    model = model_with(LAYERS["batch"](), training)
    assert_same(exported_strictly(copy.deepcopy(model)), model)


def operators_of_jit(model, x):
    return {node.kind() for node in torch.jit.trace(model, x).inlined_graph.nodes()}


def operators_of_export(model, x, strict):
    graph = torch.export.export(model, (x,), strict=strict).graph
    return {str(node.target).removesuffix(".default").replace(".", "::") for node in graph.nodes}


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "operators",
    [
        operators_of_jit,
        functools.partial(operators_of_export, strict=False),
        functools.partial(operators_of_export, strict=True),
    ],
    ids=["jit", "export", "strict export"],
)
def test_in_eval_it_is_torchs_batch_norm(operators, param_dtype):
    """Where torch's takes the dtypes."""
    model = syncnorm.SyncBatchNorm(3, activation="relu", dtype=param_dtype).eval()
    found = operators(model, torch.randn(6, 3, 4))
    assert ("aten::batch_norm" in found) == (param_dtype == torch.float32)
    assert "aten::relu" in found
    assert ("aten::rsqrt" in found) != ("aten::batch_norm" in found)


@pytest.mark.parametrize("training", [True, False])
def test_make_fx_records_the_layer(training):
    """And not what the kernels wrote for the example."""
    model = model_with(syncnorm.SyncBatchNorm(3, activation="silu", track_running_stats=not training), training)
    traced = make_fx(model)(torch.randn(6, 3, 4))
    x = torch.randn(6, 3, 4) * 3
    torch.testing.assert_close(traced(x), model(x))


class Residual(nn.Module):
    """Gives its norm all that there is."""

    def __init__(self):
        super().__init__()
        self.norm = syncnorm.SyncBatchNorm(3, activation="relu")

    def forward(self, x, mask):
        return self.norm(x, residual=x * 2, mask=mask)


def test_an_fx_graph_holds_the_layer_and_follows_its_mode():
    model = Residual()
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["norm"]
    assert traced.norm is model.norm
    mask = torch.rand(4, 5) > 0.3
    for training in (True, False):
        traced.train(training)
        model.train(training)
        x = torch.randn(4, 3, 5)
        torch.testing.assert_close(traced(x, mask), model(x, mask))
    assert model.norm.num_batches_tracked == 2


def statistics_free(x):
    return sync_batch_norm(x, None, None, training=True)


def test_fx_wrap_keeps_the_function_whole():
    traced = fx.symbolic_trace(statistics_free)
    x = torch.randn(4, 3)
    assert torch.equal(traced(x), statistics_free(x))


class Doubled(syncnorm.SyncBatchNorm):
    """A subclass whose forward does more."""

    def forward(self, input, **others):
        return super().forward(input, **others) * 2


def hooked(kind):
    layer = syncnorm.SyncBatchNorm(3)
    if kind == "backward":
        layer.register_full_backward_hook(lambda *arguments: None)
    else:
        layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    "model",
    [
        syncnorm.SyncBatchNorm(3),
        nn.Sequential(Doubled(3)),
        hooked("forward"),
        hooked("backward"),
        lambda x: syncnorm.functional.layer_norm(x, (4,)),
    ],
    ids=["the layer alone", "a subclass", "a forward hook", "a backward hook", "a function"],
)
def test_what_fx_cannot_trace_says_how_it_can(model):
    """As one node these would do twice what they do beside the layer."""
    with pytest.raises(TypeError, match=r"got Proxy of torch.fx, .* call syncnorm.revert_sync_batchnorm"):
        fx.symbolic_trace(model)


@pytest.mark.parametrize("kind", LAYERS)
def test_script_says_what_to_do(kind):
    with pytest.raises(TypeError, match=r"call syncnorm.revert_sync_batchnorm\(model\) first"):
        torch.jit.script(model_with(LAYERS[kind]()))


def test_what_the_errors_say_helps():
    model = syncnorm.convert_sync_batchnorm(nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)))
    model(torch.randn(6, 3, 4))
    reverted = syncnorm.revert_sync_batchnorm(copy.deepcopy(model))
    assert_same(torch.jit.script(reverted), model)


def traced_between_ranks(training):
    """Return what each tracer says, the collectives that came of it, and whether what it made is right."""
    torch.manual_seed(3)
    group = CountingCommunicator(syncnorm.communicator())
    model = nn.Sequential(syncnorm.SyncBatchNorm(3, process_group=group)).train(training)
    x = torch.randn(6, 3, 4)
    tracers = {
        "jit": lambda: torch.jit.trace(model, x),
        "make_fx": lambda: make_fx(model)(x),
        "export": lambda: torch.export.export(model, (x,)).module(),
    }
    messages = {}
    for name, tracer in tracers.items():
        try:
            traced = tracer()
        except RuntimeError as error:
            messages[name] = str(error)
        else:
            other = torch.randn(6, 3, 4)
            torch.testing.assert_close(traced(other), model(other))
    return messages, group.calls, fx.symbolic_trace(model)(x)


def traced_in_both_modes():
    return traced_between_ranks(True), traced_between_ranks(False)


@pytest.mark.parametrize("world_size", [2])
def test_a_tracer_never_drops_a_collective(run, world_size):
    for (messages, calls, y), (messages_in_eval, calls_in_eval, _) in run(traced_in_both_modes, world_size):
        assert messages.keys() == {"jit", "make_fx", "export"}
        for message in messages.values():
            assert "syncnorm.revert_sync_batchnorm" in message
        assert [name for name, _ in calls] == ["all_reduce"]  # of the fx graph, which holds the layer
        assert y.mean().abs() < 1e-6
        assert messages_in_eval == {}
        assert calls_in_eval == []
