"""Activations and residuals that a converted model computes in the norm before them."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import syncnorm
from syncnorm import LazySyncBatchNorm, SyncBatchNorm, convert, convert_sync_batchnorm, revert_sync_batchnorm
from syncnorm.testing import run_ranks


class Block(nn.Module):
    """A residual block as torchvision writes it: one nn.ReLU for all places."""

    def __init__(self, channels, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = activation

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    """A small one."""

    def __init__(self, activation=nn.ReLU, **options):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation(**options), nn.MaxPool2d(2))
        self.layer = nn.Sequential(Block(4, activation(**options)), Block(4, activation(**options)))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(self.stem(x)).mean((2, 3)))


def step(model, training=True):
    """Return output, gradients and buffers of a training step, and the bytes of all that backward kept."""
    x = torch.randn(3, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.train(training)(x)
    y.backward(torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return y.detach(), x.grad, grads, {name: b.clone() for name, b in model.named_buffers()}, sum(saved.values())


def assert_same_steps(model, other):
    model, other = copy.deepcopy(model), copy.deepcopy(other)
    for training in (True, False):
        for actual, expected in zip(step(model, training)[:4], step(other, training)[:4], strict=True):
            torch.testing.assert_close(actual, expected)
        with torch.no_grad():
            x = torch.randn(2, 1, 9, 9, dtype=torch.float64)
            torch.testing.assert_close(model.train(training)(x), other.train(training)(x))


def activations(model):
    return {name: m.activation for name, m in model.named_modules() if isinstance(m, SyncBatchNorm) and m.activation}


def assert_fused_is_equal(model, expected):
    """Fuse, compare a step with the model that is only synchronized, revert, compare with the original."""
    model = model.double()
    original, synchronized = copy.deepcopy(model), convert_sync_batchnorm(copy.deepcopy(model))
    assert convert_sync_batchnorm(model, fuse=True) is model
    assert activations(model) == expected
    assert_same_steps(model, synchronized)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_steps(twin, synchronized)
        assert [type(m) for m in revert_sync_batchnorm(twin).modules()] == [type(m) for m in original.modules()]
    assert convert_sync_batchnorm(model, fuse=True) is model
    assert activations(model) == expected
    revert_sync_batchnorm(model)
    assert repr(model) == repr(original)
    for reverted, module in zip(model.modules(), original.modules(), strict=True):
        assert vars(reverted).keys() == vars(module).keys()
    for twin in (model, original):
        twin.load_state_dict(synchronized.state_dict())
    assert_same_steps(model, original)


ALONE = {"stem.1": "relu", "layer.0.bn1": "relu", "layer.1.bn1": "relu"}


@pytest.mark.parametrize("options", [{}, {"inplace": True}])
def test_fused_residual_networks(options):
    assert_fused_is_equal(ResNet(**options), ALONE)


def test_a_relu_for_the_whole_network():
    shared = nn.ReLU(inplace=True)
    assert_fused_is_equal(ResNet(lambda: shared), ALONE)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (nn.SiLU, "silu"),
        (nn.LeakyReLU, "leaky_relu"),
        (partial(nn.GELU, approximate="tanh"), "gelu_tanh"),
        (nn.GELU, None),
        (partial(nn.LeakyReLU, 0.2), None),
    ],
)
def test_other_activations_are_fused_where_they_stand_alone(make, name):
    assert_fused_is_equal(ResNet(make), {"stem.1": name} if name else {})


def chain(activation):
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), activation())]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(("activation", "share"), [(nn.SiLU, 0.75), (nn.LeakyReLU, 0.75), (nn.ReLU, 1.0)])
def test_what_a_fused_model_keeps(activation, share):
    """The input and z and y become the input and y; ReLU never kept z."""
    plain = step(convert_sync_batchnorm(chain(activation)))[-1]
    fused = step(convert_sync_batchnorm(chain(activation), fuse=True))[-1]
    assert fused <= share * plain


def relus(model):
    """Return how many ReLU modules made a tensor of their own."""
    made = []

    def note(module, args, output):
        if isinstance(module, nn.ReLU):
            made.append(output is not args[0])

    handle = register_module_forward_hook(note)
    model(torch.randn(2, 1, 9, 9))
    handle.remove()
    return sum(made)


def test_a_shared_relu_passes_on_what_is_activated():
    model = ResNet()
    assert relus(model) == 5
    convert_sync_batchnorm(model, fuse=True)
    assert relus(model) == 2  # after the additions
    with torch.no_grad():
        assert relus(model) == 4  # not known without a graph


def test_a_shared_relu_computes_what_was_changed():
    sync, relu = convert_sync_batchnorm(Block(4, nn.ReLU()), fuse=True).bn1, convert.fusion.ReLUIfNeeded()
    y = sync(torch.randn(2, 4, 3, 3))
    assert relu(y) is y
    for changed in (y - 1, y.detach(), -y):
        assert relu(changed) is not changed
    with torch.no_grad():
        y -= 1
    assert torch.equal(relu(y), nn.functional.relu(y))


class Readings(nn.Module):
    """A convolution, a norm and an activation, and whatever else is done with them."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.norm, self.relu, self.read = nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.ReLU(), read

    def forward(self, x, both=None):
        z = self.norm(self.conv(x))
        return self.read(self, z, both)


def read_twice(model, z, both):
    return model.relu(z) + z


def called_twice(model, z, both):
    return model.relu(model.norm(model.relu(z)))


def read_in_eval(model, z, both):
    return model.relu(z) if model.training else model.relu(z) + z


def read_without_the_argument(model, z, both):
    return model.relu(z) if both is not None else model.relu(z) + z


def read_by_nobody(model, z, both):
    return z


def noted(model, z, both):
    model.note = z
    return model.relu(z)


FUNCTIONS = {  # the activation that a function is, or None if no norm computes it
    "relu": (
        F.relu,
        torch.relu,
        partial(F.relu, inplace=True),
        lambda z: F.relu(z, True),
        torch.relu_,
        lambda z: z.relu(),
        lambda z: z.relu_(),
    ),
    "silu": (F.silu, partial(F.silu, inplace=True)),
    "leaky_relu": (F.leaky_relu, lambda z: F.leaky_relu(z, 0.01)),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"),),
    None: (F.gelu, lambda z: F.leaky_relu(z, 0.2), partial(F.leaky_relu, negative_slope=0.1), F.elu, lambda z: z.abs()),
}


class Called(nn.Module):
    """A norm that is followed by a function, as in torchvision's Inception."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.norm, self.function = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), function

    def forward(self, x):
        return self.function(self.norm(self.conv(x))).square()


@pytest.mark.parametrize(
    ("name", "function"), [(name, function) for name, functions in FUNCTIONS.items() for function in functions]
)
def test_functions_are_absorbed(name, function, monkeypatch):
    monkeypatch.setattr(Called, "function", staticmethod(function), raising=False)
    model = Called(None)
    del model.function
    assert_fused_is_equal(model, {} if name is None else {"norm": name})


def test_a_function_after_a_fused_layer_computes_nothing():
    """The negative control: it would else be computed twice."""
    layer = convert_sync_batchnorm(Called(F.silu), fuse=True).norm
    z = layer(torch.randn(3, 2, 4, 4))
    assert torch.equal(F.silu(z), z)
    assert type(F.silu(z)) is torch.Tensor
    assert not torch.equal(F.silu(F.silu(z)), z)
    assert torch.equal(F.relu(z), F.relu(F.silu(z)))  # of what the layer has computed
    assert type(z + 1) is torch.Tensor


@pytest.mark.parametrize("function", [F.relu, F.silu])
def test_compiled_and_traced_models_with_a_function(function):
    model = convert_sync_batchnorm(Called(function).double(), fuse=True)
    x = torch.randn(3, 1, 9, 9, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


class Untraceable(nn.Module):
    """Has parts that torch.fx can trace, and a forward that it cannot."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.SiLU()) for _ in range(2)])
        self.tail = nn.Sequential(nn.BatchNorm2d(2), self.relu)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        for layer in self.layers:
            x = layer(x) if x.sum() != 0 else x
        return self.tail(x)


def test_auto_fuses_the_parts_that_can_be_traced_and_names_the_rest():
    model = Untraceable().double()
    original, synchronized = copy.deepcopy(model), convert_sync_batchnorm(copy.deepcopy(model))
    with pytest.raises(TypeError, match="can trace with fuse=True, got Untraceable"):
        convert_sync_batchnorm(copy.deepcopy(model), fuse=True)
    with pytest.warns(UserWarning, match=r"cannot trace the forward of the model, layers; .* an activation: norm$"):
        model = convert_sync_batchnorm(model, fuse="auto")
    assert activations(model) == {"layers.0.1": "silu", "layers.1.1": "silu", "tail.0": "relu"}
    assert isinstance(model.relu, convert.fusion.ReLUIfNeeded)  # the forward that is not traced may call it
    assert_same_steps(model, synchronized)
    assert [type(m) for m in revert_sync_batchnorm(model).modules()] == [type(m) for m in original.modules()]


def test_auto_without_what_cannot_be_traced_says_nothing():
    model = convert_sync_batchnorm(ResNet(), fuse="auto")
    assert activations(model) == ALONE


def test_fuse_is_one_of_three():
    with pytest.raises(ValueError, match=r"expected fuse to be one of \(False, True, 'auto'\), got 'yes'"):
        convert_sync_batchnorm(ResNet(), fuse="yes")


@pytest.mark.parametrize(
    "read",
    [read_twice, called_twice, read_in_eval, read_without_the_argument, read_by_nobody],
)
def test_norms_that_are_not_fused(read):
    assert_fused_is_equal(Readings(read), {})


def test_what_forward_notes_in_a_trace_is_forgotten():
    model = Readings(noted)
    convert_sync_batchnorm(model, fuse=True)
    assert not hasattr(model, "note")
    assert model.training


@pytest.mark.parametrize(
    ("where", "kind", "fused"),
    [
        ("1", "forward", False),
        ("1", "full_backward", False),
        ("1", "forward_pre", True),
        ("2", "forward", False),
        ("2", "forward_pre", False),
        ("0", "forward", True),
        ("", "forward", True),
    ],
)
def test_what_a_hook_sees_is_not_fused(where, kind, fused):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Identity()), nn.BatchNorm2d(1), nn.ReLU())
    getattr(model.get_submodule(where), f"register_{kind}_hook")(lambda *_: None)
    assert bool(activations(convert_sync_batchnorm(model, fuse=True))) == fused


def test_what_a_hook_of_a_container_sees_is_not_fused():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), nn.ReLU())
    handle = model[0].register_forward_hook(lambda *_: None)
    assert not activations(convert_sync_batchnorm(model, fuse=True))
    handle.remove()
    assert activations(convert_sync_batchnorm(model, fuse=True)) == {"0.1": "relu"}  # a second conversion may fuse


def test_layers_that_were_constructed_are_fused_and_given_back():
    norm, lazy = SyncBatchNorm(4), nn.LazyBatchNorm2d()
    model = nn.Sequential(norm, nn.ReLU(), lazy, nn.SiLU(), SyncBatchNorm(4, activation="silu"), nn.ReLU())
    convert_sync_batchnorm(model, fuse=True)
    kinds = [SyncBatchNorm, nn.Identity, LazySyncBatchNorm, nn.Identity]
    assert all(isinstance(m, kind) for m, kind in zip(model, kinds, strict=False))
    assert activations(model) == {"0": "relu", "2": "silu", "4": "silu"}
    model(torch.randn(2, 4, 3, 3))
    revert_sync_batchnorm(model)
    assert activations(model) == {"4": "silu"}
    assert [type(m) for m in model[:4]] == [SyncBatchNorm, nn.ReLU, nn.BatchNorm2d, nn.SiLU]


def test_a_layer_alone_has_nothing_to_fuse():
    assert SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4), fuse=True).activation is None


def test_what_is_left_to_a_converter_is_not_fused(monkeypatch):
    monkeypatch.setattr(convert, "_registered", {})
    syncnorm.register_conversion(Block, lambda block, group: block)
    model = nn.Sequential(Block(4, nn.ReLU()), nn.BatchNorm2d(4), nn.ReLU())
    convert_sync_batchnorm(model, fuse=True)
    assert type(model[0].bn1) is nn.BatchNorm2d
    assert activations(model) == {"1": "relu"}


class Branching(nn.Module):
    """What it does depends on values."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(x)) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_an_error_that_changes_nothing():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), Branching().eval())
    with pytest.raises(TypeError, match=r"torch.fx can trace with fuse=True, got Sequential: TraceError: symbolically"):
        convert_sync_batchnorm(model, fuse=True)
    assert type(model[0]) is nn.BatchNorm2d
    assert [m.training for m in model] == [True, True, False]


def test_forwards_that_were_replaced():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), SyncBatchNorm(4), nn.ReLU())
    model[1].forward = nn.functional.silu
    model[2].forward = lambda x: -x
    convert_sync_batchnorm(model, fuse=True)
    assert not activations(model)
    model.forward = lambda x: x
    with pytest.raises(TypeError, match="got Sequential: TypeError: its forward was replaced"):
        convert_sync_batchnorm(model, fuse=True)


class Stores(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.act = nn.BatchNorm1d(4), nn.ReLU()

    def forward(self, x):
        self.features = [self.bn(x)]
        return self.act(self.features[0])


def test_what_a_forward_stores_is_not_fused():
    model = convert_sync_batchnorm(Stores(), fuse=True)
    assert not activations(model)
    model(torch.randn(3, 4))
    assert model.features[0].min() < 0


class Holds(nn.Module):
    """An activation that a module of torch.nn calls too."""

    def __init__(self, activation):
        super().__init__()
        self.bn, self.act = nn.BatchNorm1d(4), activation
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation=activation, batch_first=True)

    def forward(self, x):
        return self.layer(self.act(self.bn(x)).transpose(1, 2))


@pytest.mark.parametrize(("activation", "taken"), [(nn.ReLU(), {"bn": "relu"}), (nn.SiLU(), {})], ids=["relu", "silu"])
def test_what_a_closed_module_holds_goes_on_there(activation, taken):
    model = Holds(activation)
    fused = convert_sync_batchnorm(copy.deepcopy(model), fuse=True)
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(fused(x), model(x))
    assert activations(fused) == taken


def fused_on_ranks():
    rank = syncnorm.communicator().rank
    torch.manual_seed(0)
    model = ResNet().double()
    results = []
    for fuse in (False, True):
        twin = convert_sync_batchnorm(copy.deepcopy(model), fuse=fuse)
        x = torch.randn(3, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        twin(x).square().sum().backward()
        results.append([p.grad for p in twin.parameters()])
    return results


def test_fused_across_ranks():
    for plain, fused in run_ranks(fused_on_ranks, 2):
        torch.testing.assert_close(fused, plain)
