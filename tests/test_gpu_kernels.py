"""How the Triton kernels are launched on a GPU: two each way, found again without Triton, for any memory."""

import itertools

import pytest
import torch
from accelerator import CUDA, DEVICE, needs_device, size
from launches import LAYERS, STEP, layer_and_step, of_gpu, of_interpreter

import syncnorm
from syncnorm.kernels import Running, Stamp

pytestmark = needs_device
SHAPES = [(size(16, 3), 24, 14, 14), (size(7, 2), 24, 7, 9), (size(501, 9), 24), (1, 24, 3)]
LAST = {"contiguous": False, "channels-last": True}


@pytest.mark.parametrize("last", LAST.values(), ids=LAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_two_kernels_each_way(name, dtype, last):
    """Nothing else runs on the device, no copy and no fill, also where the parameters are of half precision."""
    step = layer_and_step(name, dtype, dtype, last, device=DEVICE)
    step()  # allocates the counters
    assert (of_gpu if CUDA else of_interpreter)(step) == STEP


def results(x, dy, residual, layer):
    """Return y, the gradients and the buffers of a step of a layer."""
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    y = layer(x, residual=residual)
    grads = torch.autograd.grad(y, (x, residual, *layer.parameters()), dy)
    return [y.detach(), *grads, *(buffer.clone() for buffer in layer.buffers())]


def fresh_layer(**options):
    torch.manual_seed(0)
    return syncnorm.SyncBatchNorm(24, device=DEVICE, activation="relu", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_memory_that_is_not_aligned_changes_nothing(dtype):
    """A kernel compiled for addresses that are multiples of 16 must not get others. Each is called before the other."""
    shape = SHAPES[0]
    aligned = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(3)]
    shifted = [torch.empty(t.numel() + 1, device=DEVICE, dtype=dtype)[1:].view(shape).copy_(t) for t in aligned]
    assert all(t.data_ptr() % 16 for t in shifted)
    expected = results(*aligned, fresh_layer())
    for tensors in (shifted, aligned, shifted):
        for actual, wanted in zip(results(*tensors, fresh_layer()), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


@pytest.mark.skipif(not CUDA, reason="NOT TESTED: the interpreter compiles nothing")
def test_a_compiled_kernel_is_found_by_what_triton_looks_at():
    """Other sizes, eps and momentum take the compiled kernels, other dtypes and constants do not."""
    import sys

    results(*(torch.randn(SHAPES[0], device=DEVICE) for _ in range(3)), fresh_layer())
    compiled = sys.modules["syncnorm.kernels.triton.launch"]._compiled
    before = len(compiled)
    assert before >= 4
    for batch, eps, momentum in itertools.product((3, 1000), (0.0, 1e-3), (0.0, 0.3)):
        tensors = [torch.randn(batch, *SHAPES[0][1:], device=DEVICE) for _ in range(3)]
        results(*tensors, fresh_layer(eps=eps, momentum=momentum))
    assert len(compiled) == before + 2  # the reductions have no partial results of so small a batch
    results(*(torch.randn(SHAPES[0], device=DEVICE, dtype=torch.float64) for _ in range(3)), fresh_layer())
    assert len(compiled) == before + 6


def test_ranks_with_inputs_of_different_sizes_hold_the_same_bits():
    """They run kernels that were compiled differently: for aligned or single loads, for either memory format."""
    from syncnorm.kernels import triton

    torch.manual_seed(0)
    n = 1234.0
    mean, var = torch.randn(24, dtype=torch.float64) * 100, torch.rand(24, dtype=torch.float64) * 1e-3
    packed = torch.cat([n * mean, n * (var + mean.square()), torch.tensor([n, 0, 0], dtype=torch.float64)]).to(DEVICE)
    found = []
    for shape, last, dtype in itertools.product(SHAPES, (False, True), (torch.float32, torch.bfloat16)):
        x = torch.randn(shape, device=DEVICE).to(dtype)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        for momentum in (0.1, 0.7, None):
            running = [torch.linspace(-1, 1, 24, device=DEVICE), torch.linspace(0.1, 1, 24, device=DEVICE)]
            count = torch.tensor(6, device=DEVICE)
            _, statistics, _ = triton.normalize(
                *(x, packed, None, None, None, 1e-5), stamp=Stamp(0, 1), running=Running(*running, count, momentum)
            )
            assert count == 7
            found.append((momentum, statistics, *running))
    for momentum, *vectors in found:
        first = next(others for other, *others in found if other == momentum)
        assert all(map(torch.equal, vectors, first))


def test_counters_are_left_at_zero():
    """A reduction finds its counters as 0 and leaves them so; else the next one would merge too early or never."""
    import sys

    tensors = [torch.randn(size(64, 12), 24, size(56, 7), size(56, 7), device=DEVICE) for _ in range(3)]
    for _ in range(3):
        results(*tensors, fresh_layer())
    workspace = sys.modules["syncnorm.kernels.triton.workspace"]
    assert workspace._of_streams
    assert not any(counters.any() for counters in workspace._of_streams.values())
