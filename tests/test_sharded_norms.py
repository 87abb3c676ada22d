"""LayerNorm, RMSNorm and GroupNorm: torch's own unsplit, and the same where their axes are split over ranks.

The oracle is one process on the unsplit tensor in float64, with a random upstream gradient.
"""

import inspect
from dataclasses import dataclass, field

import pytest
import torch
from fakes import Unreachable
from oracle import assert_close
from shares import Enter, Leave
from torch import nn
from torch.nn import functional as F  # noqa: N812

import syncnorm
from syncnorm.testing import CountingCommunicator


def rms_outside(x, weight, bias, eps):
    y = x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight
    return y if bias is None else y + bias


@dataclass(frozen=True)
class Case:
    """A norm, the whole shape of its input, the axis that is split and each rank's share of it."""

    norm: str
    shape: tuple
    sizes: tuple  # along the axis
    axis: int = -1
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    options: dict = field(default_factory=dict)
    scale: float = 1.0

    @property
    def world_size(self):
        """The number of ranks."""
        return len(self.sizes)

    def __str__(self):
        words = [self.norm, "x".join(map(str, self.shape)), f"axis{self.axis}", "+".join(map(str, self.sizes))]
        words += [str(self.dtype)[6:]] + [f"mean={self.mean:g}"] * bool(self.mean)
        words += [f"scale={self.scale:g}"] * (self.scale != 1)
        return "-".join(words + [f"{key}={value}" for key, value in self.options.items()])

    @property
    def per_channel(self):
        """Whether weight and bias lie along the split axis, and not across it."""
        return self.norm != "group" or self.axis == 1


NORMS = {"layer": syncnorm.LayerNorm, "rms": syncnorm.RMSNorm, "group": syncnorm.GroupNorm}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [(8,), (5, 3), (4, 0, 4), (1, 2, 3, 2)]
CASES = [
    *[Case(norm, shape, sizes) for norm in ("layer", "rms") for shape in [(8,), (3, 8), (2, 3, 8)] for sizes in SIZES],
    *[Case(norm, (2, 3, 8), (5, 3), dtype=dtype) for norm in ("layer", "rms") for dtype in DTYPES],
    *[Case(norm, (4, 64), (40, 24), mean=mean) for norm in ("layer", "rms") for mean in (1e3, 1e4)],
    Case("layer", (2, 0, 8), (5, 3)),
    Case("layer", (3, 8), (5, 3), options={"bias": False}),
    Case("layer", (3, 8), (5, 3), options={"elementwise_affine": False}),
    Case("layer", (3, 8), (5, 3), options={"eps": 1e-2}),
    Case("rms", (3, 8), (5, 3), options={"bias": True}),
    Case("rms", (3, 8), (5, 3), options={"elementwise_affine": False}),
    *[Case("rms", (3, 8), sizes, options={"eps_outside": True, "eps": 1e-2}) for sizes in SIZES],
    *[Case("rms", (3, 8), sizes, options={"eps": None}, scale=1e-4) for sizes in SIZES],
    *[Case("rms", (3, 8), (5, 3), options={"eps": None}, scale=1e-4, dtype=dtype) for dtype in (torch.bfloat16,)],
    Case("rms", (3, 8), (5, 3), options={"eps": None}, scale=1e-8, dtype=torch.float64),
    Case("group", (2, 4, 8), (5, 3), options={"bias": False}),
    Case("group", (2, 8, 5), (5, 3), axis=1, options={"bias": False}),
    *[Case("group", (2, 4, 8), sizes) for sizes in SIZES],
    *[Case("group", (2, 4, 3, 8), sizes) for sizes in SIZES],
    *[Case("group", (2, 4, 8, 3, 2), (5, 3), axis=2, dtype=dtype) for dtype in DTYPES],
    Case("group", (2, 4, 16, 16), (9, 7), axis=2, mean=1e4),
    Case("group", (2, 4, 8), (5, 3), options={"affine": False}),
    Case("group", (2, 8, 5), (5, 3), axis=1),  # one group whose channels span the ranks
    Case("group", (2, 8), (2, 0, 6), axis=1),
]
GROUPS = 2


def whole(case):
    """Return the input, the upstream gradient, and the parameters of the unsplit norm."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.shape, generator=generator, dtype=torch.float64) + case.mean + 0.3
    x[..., :2] *= 2.5
    x *= case.scale
    grad_output = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    features = case.shape[1] if case.norm == "group" else case.shape[-1]
    weight, bias = torch.linspace(0.6, 1.4, features), torch.linspace(-0.5, 0.5, features)
    return x.to(case.dtype), grad_output.to(case.dtype), {"weight": weight.double(), "bias": bias.double()}


def in_one_process(case):
    """Return y, the input gradient and the parameters' gradients of the unsplit norm in float64."""
    x, grad_output, parameters = whole(case)
    x = x.double().requires_grad_()
    options = dict(case.options)
    affine = options.pop("elementwise_affine", options.pop("affine", True))
    has = {"weight": affine, "bias": affine and options.pop("bias", case.norm != "rms")}
    named = {name: t.requires_grad_() for name, t in parameters.items() if has[name]}
    weight, bias = named.get("weight"), named.get("bias")
    if case.norm == "layer":
        y = F.layer_norm(x, x.shape[-1:], weight, bias, options.get("eps", 1e-5))
    elif case.norm == "group":
        groups = 1 if case.axis == 1 else GROUPS
        y = F.group_norm(x, groups, weight, bias)
    elif options.get("eps_outside"):
        y = rms_outside(x, weight, bias, options["eps"])
    else:
        eps = options.get("eps", 1e-6)
        eps = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps if eps is None else eps
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    y.backward(grad_output.double())
    return y.detach(), x.grad, {name: t.grad for name, t in named.items()}


def on_shard(case, split=True):
    """Normalize this rank's part; return y, the input gradient and the parameters' gradients, and the calls."""
    group = CountingCommunicator(syncnorm.communicator())
    x, grad_output, parameters = whole(case)
    start = sum(case.sizes[: group.rank])
    part = slice(start, start + case.sizes[group.rank])
    x, grad_output = (t.movedim(case.axis, 0)[part].movedim(0, case.axis) for t in (x, grad_output))
    features = x.shape[1] if case.norm == "group" else x.shape[-1]
    groups = [1 if case.axis == 1 else GROUPS] if case.norm == "group" else []
    dtype = case.dtype if case.dtype == torch.float64 else torch.float32
    layer = NORMS[case.norm](*groups, features, dtype=dtype, process_group=group if split else None, **case.options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(parameters[name][part] if case.per_channel else parameters[name])
    x = x.detach().requires_grad_()
    y = layer(x)
    forward = len(group.calls)
    y.backward(grad_output)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert y.dtype == x.grad.dtype == case.dtype
    return y.detach(), x.grad, grads, (group.calls[:forward], group.calls[forward:])


def assert_matches(results, case):
    y, grad_input, grads = in_one_process(case)

    def check(parts, expected, axis=None):
        actual = sum(t.double() for t in parts) if axis is None else torch.cat([t.double() for t in parts], axis)
        assert_close(actual, expected, case)

    check([r[0] for r in results], y, case.axis)
    check([r[1] for r in results], grad_input, case.axis)
    assert results[0][2].keys() == grads.keys()
    for name, grad in grads.items():
        check([r[2][name] for r in results], grad, 0 if case.per_channel else None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_match_the_unsplit_norm(run, case):
    results = run(on_shard, case.world_size, case)
    assert_matches(results, case)
    rows = torch.Size(case.shape[:-1]).numel() if case.norm != "group" else 2 * (1 if case.axis == 1 else GROUPS)
    sent = rows if case.norm == "rms" else 2 * rows
    for *_, (forward, backward) in results:
        assert [call.nbytes for call in forward] == ([8 * (sent + 3)] if len(case.sizes) > 1 else [])
        assert [call.nbytes for call in backward] == ([8 * (sent + 2)] if len(case.sizes) > 1 else [])
        assert {call.name for call in forward + backward} <= {"all_reduce"}


CONTROLS = [case for case in CASES if len(case.sizes) == 2 and 0 not in case.shape]


@pytest.mark.parametrize("case", CONTROLS, ids=str)
def test_without_a_group_they_do_not(run, case):
    """The negative control."""
    results = run(on_shard, case.world_size, case, False)
    with pytest.raises(AssertionError):
        assert_matches(results, case)


FUNCTIONS = {
    "layer": lambda x, weight, bias, group: syncnorm.functional.layer_norm(
        x.movedim(0, -1), x.shape[:1], weight, bias, process_group=group
    ),
    "rms": lambda x, weight, bias, group: syncnorm.functional.rms_norm(
        x.movedim(0, -1), x.shape[:1], weight, 1e-2, bias=bias, process_group=group
    ),
    "rms, eps outside": lambda x, weight, bias, group: syncnorm.functional.rms_norm(
        x.movedim(0, -1), x.shape[:1], weight, 1e-2, bias=bias, eps_outside=True, process_group=group
    ),
    "group": lambda x, weight, bias, group: syncnorm.functional.group_norm(
        x.movedim(0, -1), 1, weight[:2], bias[:2], process_group=group
    ),
}


def check_gradients(norm, check):
    """Check the gradients of a norm over an axis of which each rank has a share, as functions of the whole tensors."""
    group = syncnorm.communicator()
    sizes = [3, 1, 2, 2][: group.size]
    start, stop = sum(sizes[: group.rank]), sum(sizes[: group.rank + 1])
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 2, 2, dtype=torch.float64) + 1
    weight, bias = torch.linspace(0.6, 1.4, len(x)).double(), torch.linspace(-0.5, 0.5, len(x)).double()

    def sharded(*whole):
        x, weight, bias = (Enter.apply(t) for t in whole)
        along = slice(start, stop) if norm != "group" else slice(None)
        y = FUNCTIONS[norm](x[start:stop], weight[along], bias[along], group).movedim(-1, 0)
        return Leave.apply(torch.cat([torch.zeros_like(x[:start]), y, torch.zeros_like(x[stop:])]))

    return check(sharded, [t.requires_grad_() for t in (x, weight, bias)], raise_exception=False)


@pytest.mark.parametrize("norm", FUNCTIONS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradcheck(run, world_size, norm):
    assert all(run(check_gradients, world_size, norm, torch.autograd.gradcheck))


@pytest.mark.parametrize("norm", FUNCTIONS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradgradcheck(run, world_size, norm):
    assert all(run(check_gradients, world_size, norm, torch.autograd.gradgradcheck))


PAIRS = [
    (syncnorm.LayerNorm(6), nn.LayerNorm(6), (4, 6)),
    (syncnorm.LayerNorm((2, 3), 1e-3, bias=False), nn.LayerNorm((2, 3), 1e-3, bias=False), (4, 2, 3)),
    (syncnorm.LayerNorm(6, elementwise_affine=False), nn.LayerNorm(6, elementwise_affine=False), (4, 6)),
    (syncnorm.RMSNorm(6), nn.RMSNorm(6, 1e-6), (4, 6)),
    (syncnorm.RMSNorm((2, 3), 1e-3), nn.RMSNorm((2, 3), 1e-3), (4, 2, 3)),
    (syncnorm.RMSNorm(6, None), nn.RMSNorm(6), (4, 6)),
    (syncnorm.GroupNorm(2, 6), nn.GroupNorm(2, 6), (4, 6, 5)),
    (syncnorm.GroupNorm(3, 6, 1e-3, affine=False), nn.GroupNorm(3, 6, 1e-3, affine=False), (4, 6)),
]


@pytest.mark.parametrize(
    ("ours", "torchs", "shape"), PAIRS, ids=lambda value: repr(value) if isinstance(value, nn.Module) else ""
)
def test_unsplit_they_are_torchs(ours, torchs, shape):
    assert isinstance(ours, type(torchs))
    for parameter in torchs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(shape) * 1e-3  # so that eps matters
    assert torch.equal(ours(x), torchs(x))


def no_epsilon(dtype):
    """Return the unsplit x and what this rank makes of its part of it, eps being None."""
    group = syncnorm.communicator()
    torch.manual_seed(0)
    x = (1e-4 * torch.randn(3, 8, dtype=torch.float64)).to(dtype)
    norm = syncnorm.RMSNorm(4, None, dtype=dtype, process_group=group)
    return x, norm(x.chunk(group.size, -1)[group.rank]).detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2])
def test_without_an_eps_the_shards_match_torchs_module(run, world_size, dtype):
    results = run(no_epsilon, world_size, dtype)
    x = results[0][0]
    expected = nn.RMSNorm(8, dtype=dtype)(x)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.cat([y for _, y in results], -1), expected, rtol=4 * eps, atol=eps * 1e-2)
    with pytest.raises(AssertionError):  # our own default is another
        torch.testing.assert_close(syncnorm.RMSNorm(8, dtype=dtype)(x), expected, rtol=4 * eps, atol=eps)


SIGNATURES = [
    (syncnorm.LayerNorm, nn.LayerNorm),
    (syncnorm.RMSNorm, nn.RMSNorm),
    (syncnorm.GroupNorm, nn.GroupNorm),
    (syncnorm.SyncBatchNorm, nn.SyncBatchNorm),
    (syncnorm.functional.layer_norm, F.layer_norm),
    (syncnorm.functional.rms_norm, F.rms_norm),
    (syncnorm.functional.group_norm, F.group_norm),
    (syncnorm.functional.sync_batch_norm, F.batch_norm),
    *[(getattr(syncnorm, name).forward, getattr(nn, name).forward) for name in ("LayerNorm", "RMSNorm", "GroupNorm")],
    (syncnorm.SyncBatchNorm.forward, nn.SyncBatchNorm.forward),
]


def positional(function):
    """Return the names of the arguments that may be given by position, and what each is unless given."""
    given = inspect.signature(function).parameters.values()
    return {item.name: item.default for item in given if item.kind is item.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize(("ours", "torchs"), SIGNATURES, ids=lambda function: function.__qualname__)
def test_positional_arguments_are_torchs(ours, torchs):
    expected = positional(torchs)
    assert list(positional(ours)) == list(expected)
    different = {name for name, default in positional(ours).items() if default != expected[name]}
    assert different == ({"eps"} if "rms" in ours.__name__.lower() else set())  # 1e-6, not None


def test_positional_arguments_of_the_lazy_norm_are_those_of_what_it_becomes():
    expected = positional(syncnorm.SyncBatchNorm)
    del expected["num_features"]
    assert positional(syncnorm.LazySyncBatchNorm) == expected


def test_torchs_positional_calls_give_torchs_results():
    x, weight, bias = torch.randn(4, 6), torch.randn(6), torch.randn(6)
    assert torch.equal(syncnorm.functional.rms_norm(x, (6,), weight, 0.1), F.rms_norm(x, (6,), weight, 0.1))
    y = syncnorm.functional.rms_norm(x, (6,), weight, 0.1, bias=bias)
    assert torch.equal(y, F.rms_norm(x, (6,), weight, 0.1) + bias)
    ours, torchs = (kind(6, 0.1, True, "meta", torch.float64) for kind in (syncnorm.RMSNorm, nn.RMSNorm))
    assert ours.bias is None
    assert ours.weight.is_meta
    assert ours.weight.dtype == torchs.weight.dtype == torch.float64


MISPLACED = [
    (
        lambda: syncnorm.RMSNorm(6, 1e-6, True, True),
        "device to be a torch.device, a string, .* got True",
    ),
    (lambda: syncnorm.RMSNorm(6, 1e-6, True, False, "cpu"), "device to be a torch.device, .* got False"),
    (lambda: syncnorm.RMSNorm(6, 1e-6, "cpu"), "elementwise_affine to be True or False, got 'cpu'"),
    (lambda: syncnorm.RMSNorm(6, 1e-6, True, None, "cpu"), "dtype to be a torch.dtype or None, got 'cpu'"),
    (lambda: syncnorm.RMSNorm(6, 1e-6, True, torch.float64), "device to be .* got torch.float64"),
    (lambda: syncnorm.RMSNorm(6, True), "eps to be a number or None, got True"),
    (lambda: syncnorm.RMSNorm(6, bias=torch.zeros(6)), r"bias to be True or False, got a tensor of shape \(6,\)"),
    (lambda: syncnorm.LayerNorm(6, 1e-5, True, "cpu"), "bias to be True or False, got 'cpu'"),
    (lambda: syncnorm.LayerNorm(6, 1e-5, True, torch.float64), "bias to be True or False, got torch.float64"),
    (lambda: syncnorm.LayerNorm(6, None), "eps to be a number, got None"),
    (lambda: syncnorm.LayerNorm(6, 1e-5, True, True, True), "device to be .* got True"),
    (lambda: syncnorm.GroupNorm(2, 6, True), "eps to be a number, got True"),
    (lambda: syncnorm.GroupNorm(2, 6, 1e-5, 0), "affine to be True or False, got 0"),
    (lambda: syncnorm.GroupNorm(2, 6, 1e-5, True, False), "device to be .* got False"),
    (lambda: syncnorm.SyncBatchNorm(6, 1e-5, True), "momentum to be a number or None, got True"),
    (lambda: syncnorm.SyncBatchNorm(6, 1e-5, 0.1, 0.1), "affine to be True or False, got 0.1"),
    (lambda: syncnorm.SyncBatchNorm(6, 1e-5, 0.1, True, "cpu"), "track_running_stats to be True or False, got 'cpu'"),
    (lambda: syncnorm.SyncBatchNorm(6, 1e-5, 0.1, True, True, "cpu"), "process_group to be .* got 'cpu'"),
    (lambda: syncnorm.LazySyncBatchNorm(1e-5, 0.1, True, True, "cpu"), "process_group to be .* got 'cpu'"),
    (
        lambda: syncnorm.LazySyncBatchNorm(1e-5, 0.1, True, True, None, torch.float64),
        "device to be .* got torch.float64",
    ),
    (lambda: on(syncnorm.functional.rms_norm, (6,), W, W), r"eps to be a number or None, got a tensor of shape \(6,\)"),
    (lambda: on(syncnorm.functional.rms_norm, (6,), W, W, 1e-6), "takes from 2 to 4 positional arguments"),
    (lambda: on(syncnorm.functional.rms_norm, (6,), 1e-6), "weight to be a tensor or None, got 1e-06"),
    (lambda: on(syncnorm.functional.rms_norm, (6,), W, bias=True), "bias to be a tensor or None, got True"),
    (lambda: on(syncnorm.functional.rms_norm, (6,), W, eps_outside=1e-6), "eps_outside to be True or False, got 1e-06"),
    (lambda: on(syncnorm.functional.layer_norm, (6,), W, 1e-5), "bias to be a tensor or None, got 1e-05"),
    (lambda: on(syncnorm.functional.layer_norm, (6,), W, None, W), "eps to be a number, got a tensor"),
    (lambda: on(syncnorm.functional.group_norm, 2.0), "num_groups to be an integer, got 2.0"),
    (lambda: on(syncnorm.functional.group_norm, 2, 1e-5), "weight to be a tensor or None, got 1e-05"),
    (lambda: on(syncnorm.functional.group_norm, 2, W, W, True), "eps to be a number, got True"),
    (lambda: on(syncnorm.functional.sync_batch_norm, None, None, 0.1), "weight to be a tensor or None, got 0.1"),
    (lambda: on(syncnorm.functional.sync_batch_norm, True, 0.1), "running_mean to be a tensor or None, got True"),
    (lambda: on(syncnorm.functional.sync_batch_norm, None, None, W, W, 0.1), "training to be True or False, got 0.1"),
    (lambda: on(syncnorm.functional.sync_batch_norm, None, None, W, W, True, True), "momentum to be a number or None"),
    (
        lambda: on(syncnorm.functional.sync_batch_norm, None, None, W, W, True, 0.1, W),
        "eps to be a number, got a tensor",
    ),
]
W = torch.ones(6)


def on(function, *arguments, **options):
    return function(torch.randn(4, 6), *arguments, **options)


@pytest.mark.parametrize(("call", "message"), MISPLACED)
def test_arguments_in_the_wrong_place_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_group_norm_without_a_bias():
    """In torch's own from 2.13 on."""
    layer = syncnorm.GroupNorm(2, 6, bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    nn.init.normal_(layer.weight)
    x = torch.randn(4, 6, 5)
    assert torch.equal(layer(x), F.group_norm(x, 2, layer.weight))
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(6))
    assert list(syncnorm.GroupNorm(2, 6, affine=False, bias=True).parameters()) == []


def test_functions_take_the_last_axis_as_a_number():
    x = torch.randn(3, 4)
    assert torch.equal(syncnorm.functional.layer_norm(x, 4), F.layer_norm(x, (4,)))
    assert torch.equal(syncnorm.functional.rms_norm(x, 4), F.rms_norm(x, (4,), None, 1e-6))
    with pytest.raises(ValueError, match=r"expected an input of shape \(\*, 5\), got \(3, 4\)"):
        syncnorm.functional.layer_norm(x, 5)


def representations():
    group = syncnorm.communicator()
    return [
        repr(syncnorm.LayerNorm(4, process_group=group)),
        repr(syncnorm.LayerNorm((2, 4), bias=False)),
        repr(syncnorm.RMSNorm(4, None, bias=True, eps_outside=True, process_group=group)),
        repr(syncnorm.GroupNorm(2, 4, bias=False, process_group=group)),
    ]


def text_of_the_group(ranks):
    return [
        f"LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True, process_group={ranks})",
        "LayerNorm((2, 4), eps=1e-05, elementwise_affine=True, bias=False)",
        f"RMSNorm((4,), eps=None, elementwise_affine=True, bias=True, eps_outside=True, process_group={ranks})",
        f"GroupNorm(2, 4, eps=1e-05, affine=True, bias=False, process_group={ranks})",
    ]


@pytest.mark.parametrize("world_size", [2])
def test_repr_tells_the_arguments_and_the_ranks(run, world_size):
    assert representations() == text_of_the_group("1 rank")
    assert run(representations, world_size) == world_size * [text_of_the_group("2 ranks")]


HALF = [torch.float16, torch.bfloat16]


def in_half_precision(norm, dtype):
    """Return the unsplit x, grad_output, weight and bias, and what the ranks make of their parts."""
    group = syncnorm.communicator()
    torch.manual_seed(0)
    x, grad_output = torch.randn(2, 64, 64).to(dtype)
    weight, bias = 2 + torch.rand(64), torch.randn(64)
    part = slice(32 * group.rank, 32 * group.rank + 32)
    layer = NORMS[norm](32, **{"bias": True} if norm == "rms" else {}, process_group=group)
    with torch.no_grad():
        layer.weight.copy_(weight[part])
        layer.bias.copy_(bias[part])
    mine = x[:, part].detach().requires_grad_()
    y = layer(mine)
    y.backward(grad_output[:, part])
    return (x, grad_output, weight, bias), y.detach(), mine.grad


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("world_size", [2])
def test_half_precision_is_rounded_once(run, world_size, norm, dtype):
    """Of what is rounded before the affine map too, a good part is another number."""
    results = run(in_half_precision, world_size, norm, dtype)
    x, grad_output, weight, bias = (t.double() for t in results[0][0])
    x.requires_grad_()
    y = F.layer_norm(x, (64,), weight, bias) if norm == "layer" else F.rms_norm(x, (64,), weight, 1e-6) + bias
    y.backward(grad_output)
    for i, expected in (1, y), (2, x.grad):
        actual = torch.cat([result[i] for result in results], -1)
        assert (actual == expected.to(dtype)).double().mean() > 0.99


def test_rms_norm_has_a_bias_and_both_epsilons():
    x = torch.randn(4, 6)
    layer = syncnorm.RMSNorm(6, 0.5, bias=True, eps_outside=True)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    torch.testing.assert_close(layer(x), rms_outside(x, layer.weight, layer.bias, 0.5))
    layer.eps_outside = False
    torch.testing.assert_close(layer(x), F.rms_norm(x, (6,), layer.weight, 0.5) + layer.bias)
    layer.reset_parameters()
    assert layer.bias.count_nonzero() == 0
    assert torch.equal(layer.weight, torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unsplit_norms_take_half_precision_with_float_parameters(dtype):
    x = torch.randn(2, 4, 6)
    for layer in (syncnorm.LayerNorm(6), syncnorm.RMSNorm(6, bias=True), syncnorm.GroupNorm(2, 4)):
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.float(), layer(x), rtol=4 * eps, atol=4 * eps)


def test_rms_norm_of_zeros_has_a_gradient():
    for eps_outside in (False, True):
        x = torch.zeros(2, 6, requires_grad=True)
        syncnorm.RMSNorm(6, eps_outside=eps_outside)(x).backward(torch.ones(2, 6))
        assert x.grad.isfinite().all()


def on_unequal_shards():
    group = syncnorm.communicator()
    texts = []
    for layer, shape in [
        (syncnorm.LayerNorm(4, process_group=group), (2 + group.rank, 4)),
        (syncnorm.RMSNorm(4, process_group=group), (2, 3 + group.rank, 4)),
        (syncnorm.GroupNorm(2, 4, process_group=group), (2 + group.rank, 4, 5)),
        (syncnorm.GroupNorm(1 + group.rank, 4, process_group=group), (2, 4, 5)),
    ]:
        with pytest.raises(ValueError, match="expected the same sizes") as raised:
            layer(torch.randn(shape))
        texts.append(str(raised.value))
    return texts


@pytest.mark.parametrize("world_size", [2])
def test_unequal_sizes_beside_the_split_axes_are_refused_on_every_rank(run, world_size):
    for rank, texts in enumerate(run(on_unequal_shards, world_size)):
        assert f"got {(2 + rank,)} of {(2 + rank, 4)} on rank {rank}" in texts[0]
        assert f"got {(2, 3 + rank)} of {(2, 3 + rank, 4)} on rank {rank}" in texts[1]
        assert f"got {(2 + rank, 2)} of" in texts[2]
        assert f"got {(2, 1 + rank)} of" in texts[3]


class Gathers:
    """A communicator that counts how often the ranks gather, which a CountingCommunicator is not told of here."""

    def __init__(self):
        self.below, self.count = syncnorm.communicator(), 0
        self.rank, self.size = self.below.rank, self.below.size
        self.all_reduce, self.broadcast = self.below.all_reduce, self.below.broadcast
        self.all_gather_object, self.barrier = self.below.all_gather_object, self.below.barrier

    def all_gather(self, tensor):
        self.count += 1
        return self.below.all_gather(tensor)


def comparisons():
    """Return how many comparisons there were after each of some inputs of several sizes."""
    counts = []
    for norm in (lambda g: syncnorm.LayerNorm(4, process_group=g), lambda g: syncnorm.RMSNorm(4, process_group=g)):
        group = Gathers()
        layer = norm(group)
        counts.append([layer(torch.randn(n, 4)) is not None and group.count for n in (2, 2, 3, 2, 3, 2)])
    group = Gathers()
    layer = syncnorm.GroupNorm(2, 4, process_group=group)
    shapes = [(2, 5), (2, 6), (3, 5), (2, 7), (3, 5), (2, 5)]  # N and space
    counts.append([layer(torch.randn(n, 4, space)) is not None and group.count for n, space in shapes])
    return counts


@pytest.mark.parametrize("world_size", [2])
def test_the_ranks_compare_once_per_size(run, world_size):
    assert run(comparisons, world_size) == world_size * [3 * [[1, 1, 2, 2, 2, 2]]]


SPLIT = [
    syncnorm.LayerNorm(4, process_group=Unreachable()),
    syncnorm.RMSNorm(4, process_group=Unreachable()),
    syncnorm.GroupNorm(2, 4, process_group=Unreachable()),
    syncnorm.GroupNorm(2, 4, affine=False, process_group=Unreachable()),
]


@pytest.mark.parametrize("layer", SPLIT, ids=str)
def test_bad_input_is_refused_before_the_ranks_compare(layer):
    with pytest.raises(TypeError, match="expected a tensor as input, got list"):
        layer([1, 2])
    with pytest.raises(TypeError, match=r"expected a floating-point input, got torch.int64"):
        layer(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected an input of .*4.* got \(3, 6\)"):
        layer(torch.randn(3, 6))
    with pytest.raises(ValueError, match="expected an input of"):
        layer(torch.tensor(1.0))
    with pytest.raises(AssertionError, match="a collective was entered"):
        layer(torch.randn(3, 4))


def test_not_a_tensor():
    for layer in syncnorm.LayerNorm(4), syncnorm.RMSNorm(4), syncnorm.GroupNorm(2, 4):
        with pytest.raises(TypeError, match="expected a tensor as input, got list"):
            layer([1, 2])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: syncnorm.LayerNorm(6)(torch.randn(4, 5)), r"expected an input of shape \(\*, 6\), got \(4, 5\)"),
        (lambda: syncnorm.RMSNorm((2, 3))(torch.randn(6)), r"expected an input of shape \(\*, 2, 3\), got \(6,\)"),
        (
            lambda: syncnorm.GroupNorm(2, 6)(torch.randn(4, 5)),
            r"expected an input of 6 channels, \(N, 6, \*\), to match weight, got \(4, 5\)",
        ),
        (
            lambda: syncnorm.GroupNorm(2, 6, affine=False)(torch.randn(4, 4)),
            r"expected an input of 6 channels, \(N, 6, \*\), got \(4, 4\)",
        ),
        (
            lambda: syncnorm.functional.group_norm(torch.randn(4, 4), 2, torch.ones(4, 1)),
            r"expected a weight of shape \(4,\), got \(4, 1\)",
        ),
        (lambda: syncnorm.functional.group_norm(torch.randn(4, 5), 2), "divides the 5 channels, got 2"),
        (lambda: syncnorm.functional.group_norm(torch.randn(4, 4), 0), "divides the 4 channels, got 0"),
        (lambda: syncnorm.functional.layer_norm(torch.randn(4), []), "expected an input of shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"expected a floating-point input, got torch.int64"):
        syncnorm.LayerNorm(6)(torch.ones(4, 6, dtype=torch.int64))
