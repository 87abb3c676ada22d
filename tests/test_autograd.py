"""The hand-written backward, held against numerical differentiation across ranks, once and twice."""

import pytest
import torch
from shares import SIZES, arguments, on_the_whole_batch

import syncnorm
from syncnorm.functional import sync_batch_norm


def training(x, weight, bias):
    return sync_batch_norm(x, None, None, weight, bias, training=True, eps=1e-2)


def without_parameters(x, weight, bias):
    return sync_batch_norm(x, None, None, training=True, eps=1e-2) + weight.sum() * bias.sum()


def evaluation(x, weight, bias):
    running_mean, running_var = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.5, 2.0]).double()
    return sync_batch_norm(x, running_mean, running_var, weight, bias, eps=1e-2)


def detached_statistics(x, weight, bias):
    """The negative control: mean and variance of the whole batch, but no gradient through them."""
    group = syncnorm.communicator()
    sums = torch.cat([x.sum((0, 2)), x.square().sum((0, 2)), x.new_full((1,), x[:, 0].numel())]).detach()
    mean, square = group.all_reduce(sums)[:-1].div(sums[-1]).view(2, -1)
    return (x - mean.view(1, -1, 1)) / (square - mean**2 + 1e-2).sqrt().view(1, -1, 1) * weight.view(1, -1, 1)


def check_gradient(sizes, function):
    return torch.autograd.gradcheck(on_the_whole_batch(sizes, function), arguments(sizes), raise_exception=False)


def check_double_gradient(sizes, function):
    return torch.autograd.gradgradcheck(on_the_whole_batch(sizes, function), arguments(sizes), raise_exception=False)


@pytest.mark.parametrize("function", [training, without_parameters, evaluation])
@pytest.mark.parametrize("world_size", SIZES)
def test_gradcheck(run, world_size, function):
    assert all(run(check_gradient, world_size, SIZES[world_size], function))


@pytest.mark.parametrize("function", [training, evaluation])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradgradcheck(run, world_size, function):
    assert all(run(check_double_gradient, world_size, SIZES[world_size], function))


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradcheck_fails_without_the_gradient_of_the_statistics(run, world_size):
    assert not any(run(check_gradient, world_size, SIZES[world_size], detached_statistics))


def saved_bytes(training):
    saved = []
    x = torch.randn(16, 4, 8, 8, requires_grad=True)
    layer = syncnorm.SyncBatchNorm(4).train(training)

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    buffers = {buffer.data_ptr() for buffer in layer.buffers()}
    assert not any(tensor.data_ptr() in buffers for tensor in saved), "a buffer was saved for backward"
    return sum(t.numel() * t.element_size() for t in saved if t.data_ptr() != x.data_ptr())


@pytest.mark.parametrize("training", [True, False])
def test_backward_keeps_the_input_and_what_is_per_channel(training):
    assert saved_bytes(training) <= 4 * 4 + 2 * 4 * 8 + 8  # weight; mean and invstd; count


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_other_layouts(training):
    """The input gradient has the input's memory format, whatever the upstream gradient's."""
    layer = syncnorm.SyncBatchNorm(3, dtype=torch.float64).train(training)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    grad_output = torch.randn_like(x)
    grads = []
    for x_format in (torch.contiguous_format, torch.channels_last):
        for grad_format in (torch.contiguous_format, torch.channels_last):
            leaf = x.clone(memory_format=x_format).requires_grad_()
            y = layer(leaf)
            (grad,) = torch.autograd.grad(y, leaf, grad_output.contiguous(memory_format=grad_format))
            assert y.is_contiguous(memory_format=x_format)
            assert grad.is_contiguous(memory_format=x_format)
            grads.append(grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


def test_expanded_and_permuted_inputs():
    layer = syncnorm.SyncBatchNorm(3, dtype=torch.float64)
    for x in (
        torch.randn(1, 3, 1, 5, dtype=torch.float64).expand(4, 3, 2, 5),
        torch.randn(5, 4, 3, dtype=torch.float64).permute(1, 2, 0),
    ):
        torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_each_parameter_has_the_digits_of_its_own_gradient(dtypes):
    """Neither goes through the other's dtype, if that has fewer of them."""
    for of_weight, of_bias in (dtypes, dtypes[::-1]):
        x, dy = torch.randn(2, 16, 3, 8, dtype=torch.float64)
        weight = torch.ones(3, dtype=of_weight, requires_grad=True)
        bias = torch.zeros(3, dtype=of_bias, requires_grad=True)
        sync_batch_norm(x, None, None, weight, bias, True).backward(dy)
        normalized = (x - x.mean((0, 2), keepdim=True)) / (x.var((0, 2), correction=0, keepdim=True) + 1e-5).sqrt()
        for parameter, grad in ((weight, (dy * normalized).sum((0, 2))), (bias, dy.sum((0, 2)))):
            assert torch.equal(parameter.grad, grad.to(parameter.dtype)) or parameter.dtype != torch.bfloat16
            torch.testing.assert_close(parameter.grad, grad.to(parameter.dtype))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_compiled_training_step_is_one_graph(momentum):
    layers = [syncnorm.SyncBatchNorm(3, momentum=momentum, activation="relu") for _ in range(2)]
    x, dy = torch.randn(2, 4, 3, 5)
    gradients = []
    for call in (torch.compile(layers[0], fullgraph=True, backend="aot_eager"), layers[1]):
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            call(leaf).backward(dy)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    for compiled, plain in zip(layers[0].state_dict().values(), layers[1].state_dict().values(), strict=True):
        torch.testing.assert_close(compiled, plain)
