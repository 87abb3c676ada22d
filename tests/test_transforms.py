"""torch.func, forward-mode AD and batched gradients, against numerical differentiation and the whole batch.

The oracle is torch's own norm in one process on the whole batch, in float64, under the same transform.
"""

import pytest
import torch
from shares import Enter, Leave
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F  # noqa: N812

import syncnorm
from syncnorm.functional import group_norm, layer_norm, rms_norm, sync_batch_norm
from syncnorm.testing import CountingCommunicator

# Forward-mode AD loads its decompositions by torch.jit.script.


def share(size):
    """Return where this rank's share begins and ends: the first ranks have one more, the last may have none."""
    group = syncnorm.communicator()
    sizes = [size - size // 2, size // 2][: group.size] if group.size > 1 else [size]
    return sum(sizes[: group.rank]), sum(sizes[: group.rank + 1])


def on_shares(function, axis=0, parameters_too=False):
    """Return a function of whole tensors, alike on all ranks, that works on this rank's share along an axis."""

    def whole(x, *parameters):
        start, stop = share(x.shape[axis])
        x, *parameters = (Enter.apply(t) for t in (x, *parameters))
        if parameters_too:
            parameters = [t[start:stop] for t in parameters]
        y = function(x.narrow(axis, start, stop - start), *parameters)
        before, after = (torch.zeros_like(x.narrow(axis, *at)) for at in ((0, start), (stop, x.shape[axis] - stop)))
        return Leave.apply(torch.cat([before, y, after], axis))

    return whole


def normalized(x, weight, bias, **others):
    return sync_batch_norm(x, None, None, weight, bias, training=True, eps=1e-2, **others)


def masked(x, weight, bias):
    mask = torch.linspace(0, 1.5, 9, dtype=x.dtype).view(3, 3)[: len(x)]  # the first does not count
    return normalized(x, weight, bias, mask=mask)


def evaluated(x, weight, bias):
    mean, var = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.5, 2.0]).double()
    return sync_batch_norm(x, mean, var, weight, bias, eps=1e-2, residual=x * 0.3, activation="silu")


def detached_statistics(x, weight, bias):
    """The negative control: mean and variance of all ranks, but no derivative through them."""
    return normalized(x.detach(), weight, bias) + (x - x.detach()) * weight.view(1, -1, 1)


def layer(x, weight, bias):
    return layer_norm(x, x.shape[-1:], weight, bias, 1e-2, process_group=syncnorm.communicator())


def rms(x, weight, bias):
    return rms_norm(x, x.shape[-1:], weight, 1e-2, bias=bias, process_group=syncnorm.communicator())


def rms_outside(x, weight, bias):
    group = syncnorm.communicator()
    return rms_norm(x, x.shape[-1:], weight, 1e-1, bias=bias, process_group=group, eps_outside=True)


def groups(x, weight, bias):
    return group_norm(x, 2, weight, bias, 1e-2, process_group=syncnorm.communicator())


def with_epilogue(activation, residual=True, inplace=False):
    def function(x, weight, bias):
        added = x.flip(2) * 0.5 if residual else None
        return normalized(x * 1.0, weight, bias, activation=activation, residual=added, inplace=inplace)

    return function


CHECKED = {
    "training": on_shares(normalized),
    "masked": on_shares(masked),
    "evaluation": on_shares(evaluated),
    "relu with residual": on_shares(with_epilogue("relu")),
    "silu with residual": on_shares(with_epilogue("silu")),
    "gelu": on_shares(with_epilogue("gelu_tanh", residual=False)),
    "leaky in place": on_shares(with_epilogue("leaky_relu", residual=False, inplace=True)),
    "layer norm": on_shares(layer, 2, parameters_too=True),
    "rms norm": on_shares(rms, 2, parameters_too=True),
    "rms norm, eps outside": on_shares(rms_outside, 2, parameters_too=True),
    "group norm": on_shares(groups, 2),
    "the negative control": on_shares(detached_statistics),
}


def check(name):
    """Return whether first derivatives are right, forward, backward and batched, and whether second ones are."""
    torch.manual_seed(1)
    function = CHECKED[name]
    features = 3 if name in ("layer norm", "rms norm", "rms norm, eps outside") else 2
    x = torch.randn(3, 2, 3, dtype=torch.float64) + 0.5
    weight, bias = (torch.randn(features, dtype=torch.float64) for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    # The fast mode compares random projections of the Jacobians, which takes fewer collectives.
    options = {"fast_mode": True, "check_batched_grad": True, "raise_exception": name != "the negative control"}
    first = gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True, **options)
    return first and gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


def check_all():
    return {name: check(name) for name in CHECKED}


@pytest.mark.parametrize("world_size", [1, 2])
def test_derivatives_are_those_of_numerical_differentiation(run, world_size):
    for results in run(check_all, world_size):
        assert results.pop("the negative control") is False
        assert len(results) == len(CHECKED) - 1
        assert all(results.values()), results


def batch():
    """Return four batches of 8 samples and four vectors of the channels, alike on all ranks."""
    torch.manual_seed(2)
    return torch.randn(4, 8, 2, 3, dtype=torch.float64) + 0.5, torch.randn(4, 2, dtype=torch.float64)


def loss(y):
    return (y + y**3 / 3).sum()


def under_transforms(norm, cut):
    """Return what the transforms give for `norm(x, weight, bias)`, with x, (N, C, L), cut by `cut` along an axis.

    Entries are named by where their samples lie: x at axis 0, xs at axis 1, or sum, what the ranks have to add.
    """
    (x, tangent, *_), (weight, bias, along, _) = whole, parameters = batch()
    x, tangent, xs = cut(x, 0), cut(tangent, 0), cut(whole, 1)

    def of_x(x):
        return norm(x, weight, bias)

    def loss_of_x(x):
        return loss(of_x(x))

    def loss_of_weight(weight):
        return loss(norm(x, weight, bias))

    y, pull_back = vjp(norm, x, weight, bias)
    back = pull_back(tangent)
    leaf = x.clone().requires_grad_()
    batched = torch.autograd.grad(of_x(leaf), leaf, xs, is_grads_batched=True)[0]
    with forward_ad.dual_level():
        dual = of_x(forward_ad.make_dual(x, tangent))
        dual_tangent = forward_ad.unpack_dual(dual).tangent
        upstream = forward_ad.make_dual(tangent, x)
        through_backward = forward_ad.unpack_dual(torch.autograd.grad(of_x(leaf), leaf, upstream)[0]).tangent
    outside = of_x(leaf)  # by the ordinary kernels; its backward runs under the transforms
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(tangent, x)
        through_ordinary = torch.autograd.grad(outside, leaf, upstream, retain_graph=True)[0]
        through_ordinary = forward_ad.unpack_dual(through_ordinary).tangent
    mapped_backward = vmap(lambda v: torch.autograd.grad(outside, leaf, v, retain_graph=True)[0])(xs)
    return {
        "x: y": y,
        "x: grad": grad(loss_of_x)(x),
        "x: vjp": back[0],
        "sum: vjp to the weight": back[1],
        "sum: vjp to the bias": back[2],
        "x: jvp": jvp(of_x, (x,), (tangent,))[1],
        "x: jvp along everything": jvp(norm, (x, weight, bias), (tangent, along, bias))[1],
        "x: jvp along the weight": jvp(lambda w: norm(x, w, bias), (weight,), (along,))[1],
        "x: dual": dual_tangent,
        "x: dual through backward": through_backward,
        "x: dual through an ordinary backward": through_ordinary,
        "x: hessian-vector": jvp(grad(loss_of_x), (x,), (tangent,))[1],
        "x: vector-hessian": vjp(grad(loss_of_x), x)[1](tangent)[0],
        "xs: is_grads_batched": batched,
        "xs: vmap of an ordinary backward": mapped_backward,
        "xs: vmap": vmap(of_x)(xs),
        "xs: vmap over another axis": vmap(of_x, in_dims=-1, out_dims=1)(xs.movedim(0, -1)).movedim(1, 0),
        "xs: vmap of grad": vmap(grad(loss_of_x))(xs),
        "xs: vmap of jvp": vmap(lambda v: jvp(of_x, (x,), (v,))[1])(xs),
        "xs: vmap of vmap": vmap(vmap(of_x))(xs.view(2, 2, *xs.shape[1:])).flatten(0, 1),
        "xs: vmap over the weights": vmap(norm, in_dims=(None, 0, 0))(x, parameters, parameters.flip(0)),
        "sum: hessian in the weight": hessian(loss_of_weight)(weight),
        "x: jacobian by the weight": jacrev(lambda w: norm(x, w, bias))(weight),
        "x: jacobian by the weight, forward": jacfwd(lambda w: norm(x, w, bias))(weight),
    }


def torch_norm(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-2)


def cut_to_this_rank(t, axis):
    rank, size = syncnorm.communicator().rank, t.shape[axis]
    start, stop = (0, size) if syncnorm.communicator().size == 1 else [(0, 5), (5, 8)][rank]
    return t.narrow(axis, start, stop - start)


def on_ranks(synchronized):
    return under_transforms(normalized if synchronized else torch_norm, cut_to_this_rank)


def assert_match(results):
    """Compare what the ranks got with the whole batch."""
    expected = under_transforms(torch_norm, lambda t, axis: t)
    for name, wanted in expected.items():
        parts = [result[name] for result in results]
        kind = name.split(":")[0]
        actual = sum(parts) if kind == "sum" else torch.cat(parts, {"x": 0, "xs": 1}[kind])
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_transforms_are_those_of_the_whole_batch(run, world_size):
    assert_match(run(on_ranks, world_size, True))


def test_transforms_of_an_unsynchronized_norm_are_not():
    """The negative control."""
    with pytest.raises(AssertionError):
        assert_match(syncnorm.testing.run_ranks(on_ranks, 2, False))


def counted():
    """Return the collectives of each transform: how many float64 each all-reduce has, the names of others."""
    group = CountingCommunicator(syncnorm.communicator())
    x = torch.randn(4, 3, 5, requires_grad=True)

    def norm(x):
        return sync_batch_norm(x, None, None, training=True, process_group=group)

    def calls(function):
        del group.calls[:]
        function()
        return [nbytes // 8 if name == "all_reduce" else name for name, nbytes in group.calls]

    y = norm(x)
    xs = torch.randn(7, 4, 3, 5)
    return {
        "jvp": calls(lambda: jvp(norm, (x,), (x,))),
        "vmap": calls(lambda: vmap(norm)(xs)),
        "vmap of jvp": calls(lambda: vmap(lambda v: jvp(norm, (x,), (v,)))(xs)),
        "vjp": calls(lambda: vjp(norm, x)[1](x)),
        "is_grads_batched": calls(lambda: torch.autograd.grad(y, x, xs, is_grads_batched=True)),
    }


@pytest.mark.parametrize("world_size", [2])
def test_a_tangent_takes_one_all_reduce_and_a_batch_takes_one_in_all(run, world_size):
    moments, sums = 2 * 3 + 3, 2 * 3 + 2
    for result in run(counted, world_size):
        assert result == {
            "jvp": [moments, moments],
            "vmap": [7 * moments],
            "vmap of jvp": [moments, 7 * moments],
            "vjp": [moments, moments],
            "is_grads_batched": [7 * sums],
        }


def moved_buffers():
    """Return the running statistics after a step: of the module, and where a transform is given them."""
    torch.manual_seed(syncnorm.communicator().rank)
    layer = syncnorm.SyncBatchNorm(3, momentum=None)
    x, weights = torch.randn(4, 3, 5), torch.rand(7, 3)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    several = {name: torch.stack([buffer] * 7) for name, buffer in buffers.items()}
    xs = torch.stack([x + i for i in range(7)])

    def step(weight, buffers, x):
        return functional_call(layer, ({"weight": weight}, buffers), (x,)).square().sum()

    grad(step)(layer.weight, buffers, x)
    vmap(step)(weights, several, xs)
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, x))
        assert forward_ad.unpack_dual(layer.running_mean).tangent is None
    return layer.state_dict(), buffers, several


def held_buffers():
    """Return what the transforms say of buffers that they are not given, and the state of the layer after that."""
    layer = syncnorm.SyncBatchNorm(2)
    x = torch.randn(3, 2, 2)
    messages = []
    for transformed in (vmap(layer), grad(lambda x: layer(x).sum()), lambda x: jvp(layer, (x,), (x,))):
        try:
            transformed(x)
        except RuntimeError as error:
            messages.append(str(error))
    return messages, layer.state_dict()


def buffers_under_transforms():
    return moved_buffers(), held_buffers()


@pytest.mark.parametrize("world_size", [2])
def test_transforms_move_the_buffers_that_they_are_given_and_no_others(run, world_size):
    for (state, buffers, several), (messages, held) in run(buffers_under_transforms, world_size):
        assert state["num_batches_tracked"] == buffers["num_batches_tracked"] == 1
        for name in buffers:
            torch.testing.assert_close(buffers[name], state[name])
            torch.testing.assert_close(several[name][0], state[name])
        torch.testing.assert_close(several["running_mean"][6], state["running_mean"] + 6)
        assert len(messages) == 3
        for message in messages:
            assert message.startswith("expected running statistics that the transform can update, got")
            assert "torch.func.functional_call" in message
            assert "track_running_stats=False" in message
        for name, buffer in syncnorm.SyncBatchNorm(2).named_buffers():
            assert torch.equal(held[name], buffer), name


def one_value():
    """Return what a batch of batches says of which each has one value in all, and of which one has, by its mask."""
    rank = syncnorm.communicator().rank
    single = torch.randn(5, 1 if rank == 0 else 0, 2)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = torch.arange(4) == (0 if rank == 0 else 4)
    messages = []
    for function, arguments in (
        (lambda x: normalized(x, None, None), (single,)),
        (lambda m: normalized(torch.ones(4, 2), None, None, mask=m), (mask,)),
    ):
        try:
            vmap(function)(*arguments)
        except ValueError as error:
            messages.append(str(error))
    assert vmap(lambda m: normalized(torch.ones(4, 2), None, None, mask=m))(mask[::2]).shape == (2, 4, 2)
    return messages


@pytest.mark.parametrize("world_size", [2])
def test_one_value_in_all_is_an_error_under_vmap(run, world_size):
    for messages in run(one_value, world_size):
        assert [message[:49] for message in messages] == ["Expected more than 1 value per channel when train"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_outputs_under_a_transform_are_those_without(dtype, activation):
    """In every format, to the rounding of the dtype, also where the mean is large."""
    layer = syncnorm.SyncBatchNorm(3, activation=activation, track_running_stats=False)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = (torch.randn(4, 3, 5, 6) + 100).to(dtype).contiguous(memory_format=memory_format)
        y, tangent = jvp(layer, (x,), (x,))
        assert y.dtype == tangent.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, layer(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_the_root_of_no_variance_has_a_derivative():
    """A row of zeros, with epsilon outside of the root."""
    x, dy = torch.zeros(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)

    def norm(x):
        return rms_norm(x, (4,), eps=0.5, eps_outside=True)

    assert torch.equal(vjp(norm, x)[1](dy)[0], dy / 0.5)
    assert torch.equal(jvp(norm, (x,), (dy,))[1], dy / 0.5)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("position", ["input", "weight", "residual"])
def test_a_tensor_that_outlives_its_transform(transform, position):
    """It is a wrapper without memory, which torch's operations take off."""
    kept = []
    x, residual = torch.randn(2, 4, 3, 5)
    arguments = {"input": x, "weight": torch.rand(3), "residual": residual}

    def keep(tensor):
        kept.append(tensor * 1)
        return tensor.sum()

    given = arguments[position]
    if transform == "grad":
        torch.func.grad(keep)(given)
    else:
        torch.func.jvp(keep, (given,), (given,))
    wrapped = arguments | {position: kept[0]}
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        kept[0].data_ptr()
    y, expected = (
        syncnorm.functional.sync_batch_norm(a["input"], None, None, a["weight"], None, True, residual=a["residual"])
        for a in (wrapped, arguments)
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_a_layer_that_was_made_inside_a_transform():
    """Its buffers are wrappers, too."""
    kept = []

    def build(scale):
        layer = syncnorm.SyncBatchNorm(3, affine=False)
        layer.running_mean = torch.zeros(3) * scale
        kept.append(layer)
        return scale

    grad(build)(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        kept[0].running_mean.data_ptr()
    x = torch.randn(4, 3, 5) + 1
    kept[0](x)
    torch.testing.assert_close(kept[0].running_mean * 1, 0.1 * x.mean((0, 2)))
