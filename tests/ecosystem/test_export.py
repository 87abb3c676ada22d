"""Converted models leave PyTorch in eval mode as models with plain BatchNorm do: no operator of this package, no loss.

Each exported model is compared with the model that was exported, on data that the exporter has not seen.
"""

import copy
import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import fx, nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import syncnorm

ACTIVATIONS = {
    None: nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}


def data(samples=2):
    return torch.randn(samples, 3, 8, 8)


def plain(activation):
    """Return a model whose running statistics have moved."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ACTIVATIONS[activation](), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)
    )
    model(3 * data(8) + 1)
    return model.eval()


def converted(activation):
    model = syncnorm.convert_sync_batchnorm(plain(activation), fuse=True)
    assert model[1].activation == activation
    return model


def run_onnx(file, x):
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(np.asarray(output))


def to_onnx(model, dynamo):
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(model, (data(),), dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(model, (data(),), file, dynamo=False)
    return file


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx(dynamo, activation, ran):
    ran("onnxruntime", f"models exported to ONNX by {'dynamo' if dynamo else 'TorchScript'}, in eval")
    model = converted(activation)
    file = to_onnx(model, dynamo)
    graph = onnx.load_from_string(file.getvalue()).graph
    assert {node.domain for node in graph.node} <= {""}  # ONNX's own operators
    x = data()
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(file, x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("strict", [True, False])
def test_torch_export(strict, activation, ran):
    ran("torch", "models exported by `torch.export`, in eval")
    model = converted(activation)
    program = torch.export.export(model, (data(),), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "syncnorm" in target]
    x = data()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_jit_trace(activation, ran):
    ran("torch", "models traced by `torch.jit.trace`, in eval")
    model = converted(activation)
    traced = torch.jit.trace(model, data())
    assert "batch_norm" in str(traced.inlined_graph)
    assert "syncnorm::" not in str(traced.inlined_graph)
    x = data(5)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fx(activation, ran):
    ran("torch", "models traced by `torch.fx`, in eval")
    model = converted(activation)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    x = data(5)
    torch.testing.assert_close(traced(x), model(x))


def quantized(model, qat):
    """Quantize a model for x86 as torchao's tutorials do."""
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=qat))
    prepared = torch.export.export(model, (data(),)).module()
    prepared = (prepare_qat_pt2e if qat else prepare_pt2e)(prepared, quantizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        prepared(torch.randn(2, 3, 8, 8, generator=generator))
    return move_exported_model_to_eval(convert_pt2e(prepared))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_quantization_after_training_is_that_of_the_plain_model(activation, ran):
    """Bit by bit, since both graphs are the same."""
    ran("torchao", "models quantized after training, in eval")
    torch.manual_seed(1)
    original = plain(activation)
    model, x = syncnorm.convert_sync_batchnorm(copy.deepcopy(original)), data()
    expected, actual = quantized(copy.deepcopy(original), qat=False)(x), quantized(model, qat=False)(x)
    assert torch.equal(actual, expected)
    assert not torch.equal(expected, original(x))  # it is quantized


def test_quantization_aware_training_takes_a_reverted_model(ran):
    """Torchao's quantizers look for the exact class. They leave the output of a converted layer as it is."""
    ran("torchao", "models prepared for quantization-aware training, reverted")
    torch.manual_seed(1)
    original, x = plain("relu"), data()
    model = syncnorm.convert_sync_batchnorm(copy.deepcopy(original))
    expected = quantized(copy.deepcopy(original), qat=True)(x)
    assert not torch.equal(quantized(copy.deepcopy(model), qat=True)(x), expected)
    assert torch.equal(quantized(syncnorm.revert_sync_batchnorm(model), qat=True)(x), expected)
