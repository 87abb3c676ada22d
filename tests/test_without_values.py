"""Tensors that have a shape and no values, on the meta device and in a FakeTensorMode: a step gives the shapes."""

import contextlib
import itertools
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import syncnorm
from syncnorm.testing import CountingCommunicator

EPILOGUES = [
    *itertools.product([None, "relu", "leaky_relu", "silu", "gelu_tanh"], [False, True], [False]),
    (None, False, True),
    ("leaky_relu", False, True),
]
SHAPES = [(4, 3, 5, 2), (4, 3), (0, 3, 5)]


def batch_norm(x, activation, with_residual, inplace, masked, training):
    """Return what a step with an input like x gives, made on its device: y and all gradients and buffers."""
    layer = syncnorm.SyncBatchNorm(3, activation=activation, inplace=inplace, device=x.device, momentum=None)
    leaf = torch.empty_like(x).requires_grad_()
    residual = torch.empty_like(x).requires_grad_() if with_residual else None
    mask = torch.ones_like(x[:, 0], dtype=torch.bool) if masked else None
    y = layer.train(training)(leaf * 1, residual=residual, mask=mask)
    y.backward(torch.empty_like(y))
    grads = [leaf.grad, *(p.grad for p in layer.parameters())] + ([residual.grad] if with_residual else [])
    return [y, *grads, *layer.buffers()]


def split_norm(kind, *arguments):
    def step(x):
        group = CountingCommunicator(syncnorm.communicator())
        layer = kind(*arguments, device=x.device, process_group=group)
        leaf = torch.empty_like(x).requires_grad_()
        y = layer(leaf)
        y.backward(torch.empty_like(y))
        assert group.calls == []
        return [y, leaf.grad, *(p.grad for p in layer.parameters())]

    return step


def geometry(tensors):
    return [(tuple(t.shape), t.dtype, t.stride() if t.numel() else None) for t in tensors]


def assert_same_shapes(step, shape, *arguments, dtype=torch.float32):
    """Hold a step without values against one with them."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    real = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    expected = geometry(step(real, *arguments)) if syncnorm.communicator().size == 1 else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_meta = step(real.to("meta"), *arguments)
        with FakeTensorMode() as mode:
            faked = step(mode.from_tensor(real), *arguments)
    assert all(t.is_meta for t in on_meta)
    assert all(isinstance(t, FakeTensor) for t in faked)
    assert geometry(on_meta) == geometry(faked)
    assert expected in (None, geometry(on_meta))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_gives_the_shapes(shape, masked, training):
    for epilogue in EPILOGUES:
        for dtype in (torch.float32, torch.bfloat16):
            assert_same_shapes(batch_norm, shape, *epilogue, masked, training, dtype=dtype)


@pytest.mark.parametrize("fake", [False, True])
def test_one_value_per_channel_is_an_error_as_far_as_the_shape_tells(fake):
    with FakeTensorMode() if fake else contextlib.nullcontext():
        device = "cpu" if fake else "meta"
        layer, x = syncnorm.SyncBatchNorm(3, device=device), torch.empty(1, 3, 1, device=device)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            layer(x)
        layer(x, mask=torch.ones(1, 1, device=device))  # nobody knows
        layer.eval()(x)


def shapes_on_a_rank():
    assert_same_shapes(batch_norm, SHAPES[0], "relu", True, False, True, True)
    assert_same_shapes(batch_norm, (2, 3), None, False, False, False, True)
    assert_same_shapes(split_norm(syncnorm.LayerNorm, 2), (4, 3, 2))
    assert_same_shapes(split_norm(syncnorm.RMSNorm, 2), (4, 3, 2))
    assert_same_shapes(split_norm(syncnorm.GroupNorm, 1, 3), (4, 3, 2))
    return syncnorm.communicator().size


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_have_nothing_to_say_of_what_has_no_values(run, world_size):
    assert run(shapes_on_a_rank, world_size) == [world_size] * world_size


def test_a_shape_alone_is_no_reason_to_warn_of_ranks_that_train_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncnorm.SyncBatchNorm(3, device="meta")(torch.empty(4, 3, device="meta"))
