"""Another default device than the tensors': it decides on nothing here.

The device is "meta", whose tensors have no memory, so that a buffer which lands on it gives no result.
"""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from implementation import chosen
from torch.utils._device import _device_constructors

import syncnorm

FORMS = [  # of SyncBatchNorm: its options, and whether there are a residual and a mask
    ({}, False, False),
    ({"momentum": None}, False, True),
    ({"activation": "relu"}, True, False),
    ({"activation": "silu"}, True, True),
    ({"activation": "leaky_relu", "inplace": True}, False, False),
]


@contextlib.contextmanager
def default_device(how):
    """Make "meta" the default device, "with" a context or "set" for good; None: leave it as it is."""
    with torch.device("meta") if how == "with" else contextlib.nullcontext():
        if how == "set":
            torch.set_default_device("meta")
        try:
            assert torch.empty(0).is_meta == (how is not None)
            yield
        finally:
            if how == "set":
                torch.set_default_device(None)


def random(*shape, dtype=torch.float32, seed=0):
    rank = syncnorm.communicator().rank
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed + 10 * rank), device="cpu").to(dtype)


def batch_norm(options, with_residual, masked, dtype):
    """Return y, gradients and buffers of two training steps and one in eval."""
    layer = syncnorm.SyncBatchNorm(3, device="cpu", **options)
    results = []
    for training in (True, True, False):
        leaf = random(4, 3, 5, 2, dtype=dtype).requires_grad_()
        residual = random(4, 3, 5, 2, dtype=dtype, seed=1).requires_grad_() if with_residual else None
        mask = random(4, 5, 2, seed=2) > 0 if masked else None
        y = layer.train(training)(leaf * 1, residual=residual, mask=mask)
        y.backward(random(4, 3, 5, 2, dtype=dtype, seed=3))
        results += [y.detach(), leaf.grad] + ([residual.grad] if with_residual else [])
    return [*results, *(parameter.grad for parameter in layer.parameters()), *layer.buffers()]


def split_norm(kind, *arguments):
    """Return y and gradients of a norm whose axes are split over the ranks."""
    layer = kind(*arguments, device="cpu", process_group=syncnorm.communicator())
    x = random(4, 6, 5).requires_grad_()
    y = layer(x)
    y.backward(random(4, 6, 5, seed=3))
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def lazy_and_converted():
    """Return what layers give that were made otherwise."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3, device="cpu"), torch.nn.ReLU())
    model = syncnorm.convert_sync_batchnorm(model, fuse=True)
    x = random(4, 3, 5, 2)
    return [model(x).detach(), syncnorm.LazySyncBatchNorm(device="cpu")(x).detach(), *model.buffers()]


def everything(dtype=torch.float32):
    results = [batch_norm(*form, dtype) for form in FORMS]
    results += [split_norm(syncnorm.LayerNorm, 5), split_norm(syncnorm.RMSNorm, 5)]
    results += [split_norm(syncnorm.GroupNorm, 3, 6)]
    group = syncnorm.communicator()
    gathered = group.all_gather_object({"rank": group.rank, "tensor": random(2)})
    assert [g["rank"] for g in gathered] == list(range(group.size))
    results += [lazy_and_converted(), [g["tensor"] for g in gathered], group.all_gather(random(2))]
    return [tensor for result in results for tensor in result]


def with_each_default_device(dtype):
    results = {}
    for how in (None, "with", "set"):
        with default_device(how):
            results[how] = everything(dtype)
    return results


def assert_all_alike(results):
    expected = results[None]
    for how in ("with", "set"):
        assert len(results[how]) == len(expected)
        for number, (a, e) in enumerate(zip(results[how], expected, strict=True)):
            assert a.device.type == "cpu", (how, number)
            assert torch.equal(a, e), (how, number)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_device_changes_no_result(implementation, dtype):
    if implementation == "cpu":
        pytest.importorskip("syncnorm.kernels.cpu", reason="COMPILED KERNELS NOT TESTED: no compiler at installation")
    with chosen(implementation):
        assert_all_alike(with_each_default_device(dtype))


@pytest.mark.parametrize("world_size", [2])
def test_the_default_device_changes_no_result_of_a_group(run, world_size):
    for results in run(with_each_default_device, world_size, torch.float32):
        assert_all_alike(results)


def without_a_device(source):
    """Return the calls in a source that leave the device of a new tensor to torch's default."""
    names = {"torch." + function.__name__ for function in _device_constructors()}
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    makers = [call for call in calls if ast.unparse(call.func) in names]
    return [ast.unparse(call) for call in makers if all(keyword.arg != "device" for keyword in call.keywords)]


def test_every_new_tensor_names_its_device():
    sources = sorted(Path(syncnorm.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    found = {str(source): without_a_device(source.read_text()) for source in sources}
    assert not {source: calls for source, calls in found.items() if calls}


def test_a_new_tensor_without_a_device_is_found():
    """The negative control."""
    source = "x = f(torch.zeros(2), torch.ones(2, device='cpu'), torch.zeros_like(y))"
    assert without_a_device(source) == ["torch.zeros(2)"]
