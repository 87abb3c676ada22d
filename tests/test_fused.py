"""What follows the affine map in the same pass: activation and residual, and the output over the input.

The oracle is the composition in plain operations, in one process on the whole batch in float64.
"""

import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from fakes import Unreachable
from implementation import chosen
from oracle import ACTIVATE, CHANNELS, Case, Plain, assert_matches, on_shard, parameters, tolerance
from shares import SIZES, arguments, on_the_whole_batch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import syncnorm
from syncnorm import LazySyncBatchNorm, SyncBatchNorm
from syncnorm.functional import sync_batch_norm
from syncnorm.kernels import reference
from syncnorm.testing import CountingCommunicator


def case(activation, residual=False, shapes=((5, CHANNELS, 5, 4), (3, CHANNELS, 5, 4)), **arguments):
    layer = {"activation": activation, **arguments.pop("layer", {})}
    return Case(shapes, layer=layer, residual=residual, **arguments)


def inplace(activation, **arguments):
    return case(activation, layer={"inplace": True, **arguments.pop("layer", {})}, **arguments)


FORMS = [(activation, residual) for activation in ACTIVATE for residual in (False, True)][1:]
ALONE = ((6, CHANNELS, 3, 5),)
UNEVEN = ((4, CHANNELS), (0, CHANNELS), (3, CHANNELS))
VECTORS = ((7, CHANNELS), (5, CHANNELS))
CASES = [
    *[case(*form) for form in FORMS],
    *[case(*form, shapes=ALONE, memory_format=torch.channels_last) for form in FORMS],
    *[case(*form, memory_format=torch.channels_last) for form in (("relu", True), ("silu", True), ("leaky_relu",))],
    *[case(*form, shapes=UNEVEN) for form in (("relu", True), ("gelu_tanh", True), ("leaky_relu", False))],
    *[
        case(*form, shapes=VECTORS, dtype=dtype)
        for form in ((None, True), ("relu", True), ("leaky_relu", False), ("silu", True), ("gelu_tanh", False))
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    ],
    *[case(*form, valid=(0.4, 0.7)) for form in (("relu", False), ("relu", True), ("silu", True), ("gelu_tanh",))],
    *[case("silu", True, layer={name: False}) for name in ("affine", "bias")],
    case("relu", layer={"affine": False}),
    case("relu", mean=1e4, shapes=((40, CHANNELS, 4, 4), (24, CHANNELS, 4, 4))),
    *[inplace(activation, shapes=shapes) for activation in (None, "leaky_relu") for shapes in (ALONE, UNEVEN)],
    *[inplace("leaky_relu", dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)],
    inplace("leaky_relu", memory_format=torch.channels_last),
    inplace("leaky_relu", valid=(0.4, 0.7)),
    inplace("leaky_relu", layer={"affine": False}),
    inplace("leaky_relu", layer={"bias": False}),
    inplace(None, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_match_the_whole_batch(run, case):
    assert_matches(run(on_shard, case.world_size, case), case)


@pytest.mark.parametrize("case", CASES[: len(FORMS)], ids=str)
def test_plain_batch_norm_on_shards_does_not(run, case):
    """The negative control: the same assertion fails without synchronization."""
    results = run(on_shard, case.world_size, case, Plain)
    with pytest.raises(AssertionError):
        assert_matches(results, case)


@pytest.mark.parametrize("case", CASES[len(FORMS) : 2 * len(FORMS)], ids=str)
def test_plain_batch_norm_in_one_process_does_and_another_activation_does_not(case):
    """Two more controls: of the oracle, and of whether the assertion tells the activations apart."""
    result = on_shard(case, Plain)
    assert_matches([result], case)
    for activation in ACTIVATE:
        if activation != case.activation:
            with pytest.raises(AssertionError):
                assert_matches([result], replace(case, layer={"activation": activation}))


EVAL_FORMS = [(*form, False) for form in FORMS] + [(None, False, True), ("leaky_relu", False, True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "with_residual", "inplace"), EVAL_FORMS)
def test_eval(activation, with_residual, inplace, dtype):
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    layer = SyncBatchNorm(3, activation=activation, inplace=inplace, dtype=param_dtype, process_group=Unreachable())
    layer.running_mean.add_(0.3)
    layer.running_var.mul_(2)
    parameters(layer.eval())
    x, residual, grad_output = (torch.randn(4, 3, 5).to(dtype) for _ in range(3))
    inputs = [x.requires_grad_()] + ([residual.requires_grad_()] if with_residual else [])
    wanted = [*inputs, layer.weight, layer.bias]
    y = layer(x.clone() if inplace else x, residual=residual if with_residual else None)
    grads = torch.autograd.grad(y, wanted, grad_output)
    doubles = [t.detach().double().requires_grad_() for t in wanted]
    buffers = layer.running_mean.double(), layer.running_var.double()
    z = F.batch_norm(doubles[0], *buffers, *doubles[-2:])
    expected = ACTIVATE[activation](z + doubles[1] if with_residual else z)
    bound = tolerance(dtype) * (1 + 3 * inplace)
    for a, e in zip(
        [y, *grads], [expected, *torch.autograd.grad(expected, doubles, grad_output.double())], strict=True
    ):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=bound * max(1, e.abs().max().item()), check_dtype=False)


def fused(activation):
    return lambda x, weight, bias: sync_batch_norm(
        x, None, None, weight, bias, training=True, eps=1e-2, activation=activation
    )


def with_a_residual(activation):
    """Return a function of x and the residual, the first two columns of one tensor."""

    def function(both, weight, bias):
        x, residual = both[..., :1], both[..., 1:2]
        options = {"training": True, "eps": 1e-2, "activation": activation, "residual": residual}
        return F.pad(sync_batch_norm(x, None, None, weight, bias, **options), (0, 2))

    return function


def over_the_input(activation):
    return lambda x, weight, bias: sync_batch_norm(
        x.clone(), None, None, weight, bias, training=True, eps=1e-2, activation=activation, inplace=True
    )


def without_the_activations_derivative(activation):
    """The negative control."""

    def function(x, weight, bias):
        z = sync_batch_norm(x, None, None, weight, bias, training=True, eps=1e-2)
        return z + (ACTIVATE[activation](z) - z).detach()

    return function


def check(sizes, form, activation):
    """Return whether the first and the second derivatives are those that numerical differentiation gives."""
    function = on_the_whole_batch(sizes, form(activation))
    return all(how(function, arguments(sizes), raise_exception=False) for how in (gradcheck, gradgradcheck))


DIFFERENTIATED = [
    *[(fused, activation) for activation in ("relu", "leaky_relu", "silu", "gelu_tanh")],
    *[(with_a_residual, activation) for activation in ACTIVATE],
    *[(over_the_input, activation) for activation in (None, "leaky_relu")],
]


@pytest.mark.parametrize(("form", "activation"), DIFFERENTIATED)
@pytest.mark.parametrize("world_size", [2])
def test_numerical_derivatives(run, world_size, form, activation):
    """The values of these data are far enough from the kink of (leaky) relu."""
    assert all(run(check, world_size, SIZES[world_size], form, activation))


@pytest.mark.parametrize(("form", "activation"), DIFFERENTIATED)
def test_numerical_derivatives_alone(form, activation):
    assert check(SIZES[1], form, activation)


@pytest.mark.parametrize("world_size", [3])
def test_numerical_derivatives_with_an_empty_shard(run, world_size):
    for form, activation in ((with_a_residual, "silu"), (over_the_input, "leaky_relu")):
        assert all(run(check, world_size, SIZES[world_size], form, activation))


def test_numerical_derivatives_tell_when_one_is_missing():
    function = on_the_whole_batch(SIZES[1], without_the_activations_derivative("silu"))
    assert not gradcheck(function, arguments(SIZES[1]), raise_exception=False)


def kept(layer, x, residual=None):
    """Return what backward keeps, without repetitions, and the output."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x, residual=residual)
    return saved, y


PER_CHANNEL = 4 * (4 + 4) + 2 * 4 * 8 + 8  # bytes: weight and bias; mean and invstd; count


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("activation", "with_residual"), FORMS)
def test_what_backward_keeps(training, activation, with_residual):
    x = torch.randn(3, 4, 5, 7, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    saved, y = kept(SyncBatchNorm(4, activation=activation).train(training), x, residual)
    del saved[x.data_ptr()]
    assert y.data_ptr() not in saved
    if with_residual and activation in ("silu", "gelu_tanh"):
        del saved[residual.data_ptr()]
    elif with_residual:
        assert residual.data_ptr() not in saved
    size = sum(t.numel() * t.element_size() for t in saved.values())
    signs = -(-x.numel() // 8) if with_residual and activation in ("relu", "leaky_relu") else 0
    assert signs <= size <= PER_CHANNEL + signs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_in_place_backward_keeps_the_output_alone(training, activation):
    leaf = torch.randn(3, 4, 5, 7, requires_grad=True)
    x = leaf * 1
    saved, y = kept(SyncBatchNorm(4, activation=activation, inplace=True).train(training), x)
    assert y is x
    del saved[y.data_ptr()]
    assert sum(t.numel() * t.element_size() for t in saved.values()) <= PER_CHANNEL


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("weight", [1.3, -0.7, 1e-3])
def test_in_place_gives_the_gradients_of_the_other_form(activation, weight):
    results = []
    x, grad_output = torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    for inplace in (False, True):
        layer = SyncBatchNorm(3, activation=activation, inplace=inplace, dtype=torch.float64)
        nn.init.constant_(layer.weight, weight)
        nn.init.constant_(layer.bias, 0.2)
        leaf = x.clone().requires_grad_()
        y = layer(leaf * 1)
        results.append([y, *torch.autograd.grad(y, [leaf, layer.weight, layer.bias], grad_output)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_in_place_where_the_weight_is_0():
    layer = SyncBatchNorm(2, activation="leaky_relu", inplace=True)
    nn.init.zeros_(layer.weight)
    leaf = torch.randn(4, 2, 3, requires_grad=True)
    grads = torch.autograd.grad(layer(leaf * 1).sin().sum(), [leaf, layer.weight], create_graph=True)
    assert [grad.abs().max() for grad in grads] == [0, 0]
    (again,) = torch.autograd.grad(grads[0].sum(), leaf)
    assert again.isfinite().all()


WEIGHTS = [1e-1, -1e-2, 1e-3, 1e-4, 1e-5, -1e-6, 1e-8, 1e-12, -1e-20, 1e-30, 1e-37, 1e-38, 1e-40, -1e-44, 0.0]
BIASES = [-0.3, 0.3, 0.0]


def batch_of_small_weights(dtype):
    """Return x, grad_output and running statistics, of a channel for each weight and bias, and these."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (t.to(wide) for t in torch.tensor([(w, b) for w in WEIGHTS for b in BIASES], dtype=torch.float64).T)
    x, grad_output = torch.randn(2, 32, len(weight), 7, generator=generator, dtype=torch.float64)
    statistics = torch.full_like(weight, 1.1), torch.full_like(weight, 3.5)
    return (x * 2 + 1).to(dtype), grad_output.to(dtype), *statistics, weight, bias


def gradients_in_place(dtype, activation, training):
    """Return the gradients of this rank's part of the batch with respect to x, weight and bias."""
    x, grad_output, mean, var, weight, bias = batch_of_small_weights(dtype)
    group = syncnorm.communicator()
    x, grad_output = (t.tensor_split(group.size)[group.rank] for t in (x, grad_output))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = sync_batch_norm(leaves[0] * 1, mean, var, *leaves[1:], training, activation=activation, inplace=True)
    return torch.autograd.grad(y, leaves, grad_output)


def assert_bounded(ranks, dtype, activation, training):
    """Hold gradients against autograd in float64: off by no more than rounding y takes of them, nor than they are.

    The error of x̂ is bounded by its size + 1, times the share that rounding y has in it, σ / |weight|, which is at
    most 1. What follows are the sums of such errors.
    """
    x, grad_output, mean, var, weight, bias = (t.double() for t in batch_of_small_weights(dtype))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    z = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)
    y = ACTIVATE[activation](z)
    expected = torch.autograd.grad(y, [*leaves, z], grad_output)
    dz = expected[3].abs()
    if training:
        mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
    invstd = 1 / (var + 1e-5).sqrt()
    size = ((x - mean.view(-1, 1)) * invstd.view(-1, 1)).abs() + 1
    info = torch.finfo(dtype)
    stored = info.eps * (bias.abs() + info.tiny / (0.01 if activation else 1)) / 12**0.5
    noise = stored.clamp_min(2**-126 / invstd)  # float32 is computed in
    share = (4 * noise / weight.abs()).clamp_max(1) + max(4 * info.eps, 1e-12)
    share[weight == 0] = 1
    per_channel = dz.mean((0, 2), keepdim=True), (dz * size).mean((0, 2), keepdim=True)
    bounds = [
        (weight * invstd * share).abs().view(-1, 1) * (dz + per_channel[0] + size * per_channel[1]) + info.tiny,
        share * (dz * size).sum((0, 2)),
    ]
    actual = torch.cat([rank[0] for rank in ranks]), sum(rank[1].double() for rank in ranks)
    for a, e, bound in zip(actual, expected[:2], bounds, strict=True):
        assert a.isfinite().all()
        assert ((a - e).abs() <= bound).all()
    assert (actual[1][weight == 0] == 0).all()


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_in_place_gradients_are_bounded_whatever_the_weight(dtype, implementation):
    """Where the weight is below the rounding of y, the input cannot be had back from y; nor may it be anything."""
    if implementation == "cpu":
        pytest.importorskip("syncnorm.kernels.cpu", reason="COMPILED KERNELS NOT TESTED: no compiler at installation")
    with chosen(implementation):
        for activation in (None, "leaky_relu"):
            for training in (True, False):
                assert_bounded([gradients_in_place(dtype, activation, training)], dtype, activation, training)


@pytest.mark.parametrize("world_size", [2])
def test_in_place_gradients_are_bounded_on_shards(run, world_size):
    arguments = torch.bfloat16, "leaky_relu", True
    assert_bounded(run(gradients_in_place, world_size, *arguments), *arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_place_gradients_are_not_where_rounding_is_taken_for_values(monkeypatch, dtype):
    """The negative control: the quotient (y - bias) / weight."""
    monkeypatch.setattr(reference, "rounding", lambda dtype, activation: (0.0, 0.0))
    with chosen("reference"), pytest.raises(AssertionError):
        assert_bounded([gradients_in_place(dtype, None, True)], dtype, None, True)


def test_in_place_without_a_graph():
    layer = SyncBatchNorm(2, activation="leaky_relu", inplace=True)
    x = torch.randn(8, 2)
    expected = F.leaky_relu(F.batch_norm(x, None, None, training=True))
    with torch.no_grad():
        for given in (x.clone().requires_grad_(), x.clone().view(8, 2)):
            y = layer(given)
            assert y.data_ptr() == given.data_ptr()
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: x, "a leaf Variable that requires grad has been used in an in-place operation"),
        (lambda x: (x * 1)[:3], "expected an input that is not a view with inplace=True"),
        (lambda x: x.detach()[:3], "an input that is not a view with inplace=True"),  # the weight has a gradient
        (lambda x: (x * 1)[:, :, :1].expand(4, 3, 5), "expected an input that is not expanded with inplace=True"),
    ],
)
def test_in_place_where_it_cannot_be(given, message):
    x = torch.randn(4, 3, 5, requires_grad=True)
    before = x.detach().clone()
    layer = SyncBatchNorm(3, inplace=True, process_group=Unreachable())
    with pytest.raises(RuntimeError, match=message):
        layer(given(x))
    assert torch.equal(x, before)
    assert_untouched(layer)


class Subclass(torch.Tensor):
    """A tensor of another name, as users make them."""


def of_the_subclass():
    return torch.randn(4, 3, 5).as_subclass(Subclass)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize(
    "make",
    [
        lambda leaf: leaf * 1,
        lambda leaf: (leaf.as_subclass(torch.Tensor) * 1).as_subclass(Subclass),
        lambda leaf: torch.nn.functional.pad(leaf, (1, 1)),
        lambda leaf: leaf.detach().clone(),
        lambda leaf: torch.Tensor._make_subclass(Subclass, torch.clone(leaf.detach())),
    ],
)
def test_in_place_on_a_subclass(make, activation, training):
    """What torch's operations on it return is the alias of a plain tensor, and no view of the user's making."""
    leaf, results = of_the_subclass().requires_grad_(), []
    for inplace in (False, True):
        x = make(leaf)
        assert type(x) is Subclass
        layer = SyncBatchNorm(3, activation=activation, inplace=inplace).train(training)
        y = layer(x)
        assert (y is x) == inplace
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append([y.detach(), *(p.grad for p in layer.parameters()), *layer.buffers()])
        results[-1] += [] if leaf.grad is None else [leaf.grad]
        leaf.grad = None
    assert len(results[0]) == len(results[1])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


def in_no_grad(x):
    with torch.no_grad():
        return x * 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x, "a leaf Variable that requires grad has been used in an in-place operation"),
        (lambda x: (x * 1)[:3], "expected an input that is not a view with inplace=True"),
        (lambda x: (x * 1).view(4, 3, 5)[:, :, :3], "expected an input that is not a view with inplace=True"),
        (in_no_grad, "expected an input that is not a view with inplace=True"),  # with a gradient for the weight
    ],
)
def test_in_place_on_a_subclass_where_it_cannot_be(make, message):
    x = make(of_the_subclass().requires_grad_())
    before = x.detach().clone()
    layer = SyncBatchNorm(3, inplace=True, process_group=Unreachable())
    with pytest.raises(RuntimeError, match=message):
        layer(x)
    assert torch.equal(x, before)
    assert_untouched(layer)


def test_in_place_on_what_was_made_in_inference_mode():
    layer = SyncBatchNorm(3, inplace=True, process_group=Unreachable()).requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(4, 3)
        torch.testing.assert_close(SyncBatchNorm(3, inplace=True)(x.clone()), nn.BatchNorm1d(3)(x))
    before = x.clone()
    with pytest.raises(RuntimeError, match="expected an input that was not created in inference mode"):
        layer(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 8, 4), (2, 8, 0, 1), (5, 0, 8)])
def test_in_place_on_an_empty_shard(shape):
    """Torch gives some of them strides of 0."""
    x = torch.randn(shape, requires_grad=True)
    if shape[-1] == 8:
        x = x.transpose(1, 2)
    y = x * 1
    assert SyncBatchNorm(8, inplace=True)(y) is y
    y.sum().backward()


def test_what_changes_the_output_in_place_is_found_out():
    layer = SyncBatchNorm(3, inplace=True)
    y = layer(torch.randn(4, 3, requires_grad=True) * 1)
    y.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def assert_untouched(layer):
    for name, buffer in SyncBatchNorm(3).named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer), f"{name} moved"


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.zeros(4, 3, 1), ValueError, "expected a residual of the input's shape (4, 3, 5), got (4, 3, 1)"),
        (torch.zeros(4, 3, 5).double(), TypeError, "expected a residual of the input's dtype torch.float32, got"),
        (torch.zeros(4, 3, 5, device="meta"), RuntimeError, "expected the residual on the input's device cpu, got"),
        (0.5, TypeError, "expected a tensor as residual, got float"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_residuals_that_do_not_fit(residual, error, message, training):
    layer = SyncBatchNorm(3, activation="relu", process_group=Unreachable()).train(training)
    with pytest.raises(error, match=re.escape(message)):
        layer(torch.randn(4, 3, 5), residual=residual)
    assert_untouched(layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activation": "tanh"},
            "expected an activation of None, 'relu', 'leaky_relu', 'silu', 'gelu_tanh', got 'tanh'",
        ),
        ({"activation": F.relu}, "expected an activation of None, 'relu',"),
        (
            {"activation": "relu", "inplace": True},
            "expected activation None or 'leaky_relu' with inplace=True, got 'relu'",
        ),
        ({"residual": torch.zeros(4, 3), "inplace": True}, "expected no residual with inplace=True, got one"),
    ],
)
def test_options_that_cannot_be(options, message):
    for kind in (SyncBatchNorm, LazySyncBatchNorm):
        if "residual" not in options:
            with pytest.raises(ValueError, match=re.escape(message)):
                kind(*[3] * (kind is SyncBatchNorm), **options)
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    before = x.clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        sync_batch_norm(x, layer.running_mean, layer.running_var, training=True, process_group=Unreachable(), **options)
    assert torch.equal(x, before)
    assert_untouched(layer)


def collectives(options, with_residual):
    group = CountingCommunicator(syncnorm.communicator())
    layer = SyncBatchNorm(5, process_group=group, **options)
    x = torch.randn(4, 5, 3, requires_grad=True)
    y = layer(x * 1, residual=torch.randn_like(x).requires_grad_() if with_residual else None)
    forward = list(group.calls)
    y.backward(torch.randn_like(y))
    return forward, group.calls[len(forward) :]


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("options", "with_residual"),
    [
        ({"activation": "relu"}, True),
        ({"activation": "silu"}, True),
        ({"activation": "leaky_relu", "inplace": True}, False),
    ],
)
def test_one_all_reduce_each_way(run, world_size, options, with_residual):
    for forward, backward in run(collectives, world_size, options, with_residual):
        assert forward == [("all_reduce", 8 * (2 * 5 + 3))]
        assert backward == [("all_reduce", 8 * (2 * 5 + 2))]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATE))
def test_what_does_not_count_may_be_anything(activation, with_residual, value):
    x, other = torch.randn(4, 3, 6), torch.randn(4, 3, 6)
    mask = torch.arange(6) < torch.tensor([[6], [2], [3], [1]])
    outcomes = []
    for filling in (0.0, value):
        layer = SyncBatchNorm(3, activation=activation)
        leaves = [torch.where(mask.unsqueeze(1), t, filling).requires_grad_() for t in (x, other)]
        y = layer(leaves[0], residual=leaves[1] if with_residual else None, mask=mask)
        y.masked_fill(~mask.unsqueeze(1), 0).sin().sum().backward()
        outcomes.append([leaf.grad for leaf in [*leaves[: 1 + with_residual], *layer.parameters()]])
    for expected, actual in zip(*outcomes, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_huge_values_have_gradients(activation):
    x = torch.zeros(2, 1, requires_grad=True)
    residual = torch.tensor([[1e30], [-1e30]], requires_grad=True)
    sync_batch_norm(x, None, None, training=True, residual=residual, activation=activation).sum().backward()
    assert torch.equal(residual.grad, torch.tensor([[1.0], [0.0]]))


def test_a_residual_alone_may_need_a_gradient():
    group = CountingCommunicator(Unreachable())  # none in backward
    group.communicator.all_reduce = lambda tensor: tensor.mul_(2)  # another rank with the same
    group.communicator.all_gather = lambda tensor: [tensor, tensor]  # by which the ranks compare their layers
    residual = torch.randn(4, 3, requires_grad=True)
    for activation in ACTIVATE:
        layer = SyncBatchNorm(3, affine=False, activation=activation, process_group=group)
        group.calls.clear()
        layer(torch.randn(4, 3), residual=residual).backward(torch.ones(4, 3))
        assert len(group.calls) == 1
        assert residual.grad.abs().sum() > 0


def test_the_input_may_be_its_own_residual():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for activation in ACTIVATE:
        y = sync_batch_norm(x, None, None, training=True, residual=x, activation=activation)
        expected = ACTIVATE[activation](F.batch_norm(x, None, None, training=True) + x)
        grad_output = torch.randn_like(x)
        torch.testing.assert_close(y, expected)
        (actual,), (wanted,) = (torch.autograd.grad(t, x, grad_output) for t in (y, expected))
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("residual_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_a_residual_of_another_layout(input_format, residual_format):
    x, residual, grad_output = (torch.randn(2, 3, 4, 5) for _ in range(3))
    results = []
    for formats in ((torch.contiguous_format,) * 2, (input_format, residual_format)):
        leaves = [t.clone(memory_format=f).requires_grad_() for t, f in zip((x, residual), formats, strict=True)]
        y = sync_batch_norm(leaves[0], None, None, training=True, residual=leaves[1], activation="relu")
        results.append([y, *torch.autograd.grad(y, leaves, grad_output)])
        for t in results[-1][:2]:
            assert t.is_contiguous(memory_format=formats[0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


OPTIONS = [{"activation": "relu"}, {"activation": "silu"}, {"activation": "leaky_relu", "inplace": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_lazy_layers(options):
    layer, x = LazySyncBatchNorm(**options), torch.randn(4, 3, 5)
    y = layer(x.clone())
    assert type(layer) is SyncBatchNorm
    expected = SyncBatchNorm(3, **options)
    assert torch.equal(y, expected(x.clone()))
    assert repr(layer) == repr(expected)


@pytest.mark.parametrize("argument", ["residual", "mask"])
def test_lazy_layers_take_what_their_forward_takes(argument):
    x = torch.randn(4, 3, 5)
    given = {argument: torch.randn_like(x) if argument == "residual" else torch.rand(4, 5) < 0.5}
    assert torch.equal(LazySyncBatchNorm()(x, **given), SyncBatchNorm(3)(x, **given))


@pytest.mark.parametrize("options", OPTIONS)
def test_copies_and_state(options):
    layer, x = SyncBatchNorm(3, **options), torch.randn(4, 3)
    assert list(layer.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
    y = copy.deepcopy(layer)(x.clone())
    for twin in (pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert repr(twin) == repr(layer)
        assert torch.equal(twin(x.clone()), y)


def test_a_layer_pickled_before_there_were_activations():
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    for name in ("activation", "inplace"):
        del vars(layer)[name]
    old = pickle.loads(pickle.dumps(layer))
    assert (old.activation, old.inplace) == (None, False)
    assert torch.equal(old(x), SyncBatchNorm(3)(x))


def test_repr_tells_the_form():
    assert repr(SyncBatchNorm(4, activation="leaky_relu", inplace=True)) == (
        "SyncBatchNorm(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
        "activation=leaky_relu, inplace=True)"
    )
