"""A step of a layer is two kernels forward and two backward beside its all-reduces, on the CPU and in Triton."""

import os

import pytest
import torch
from interpreter import run_python
from launches import LAYERS, STEP, layer_and_step, of_cpu

import syncnorm
from syncnorm import testing

pytest.importorskip("syncnorm.kernels.cpu", reason="COMPILED KERNELS NOT TESTED: no compiler at installation")

HERE = os.path.dirname(__file__)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_one_rank_calls_the_library_twice_each_way(name, dtype, last):
    assert of_cpu(layer_and_step(name, dtype, last=last)) == STEP


def of_two_ranks():
    steps = {name: layer_and_step(name) for name in LAYERS}
    for step in [*steps.values()] * 2:  # the first two steps compare the layers of the ranks
        step()
    return {name: of_cpu(step) for name, step in steps.items()}


@pytest.mark.parametrize("in_memory", [True, False])
def test_two_ranks_call_the_library_twice_each_way(monkeypatch, in_memory):
    """The all-reduces of Gloo are operations of torch's too. Those in the memory of the host are not."""
    monkeypatch.setenv("SYNCNORM_SHARED_MEMORY", str(int(in_memory)))
    moments, normalize, reduce_grad, grad_input = STEP
    expected = [moments, "allreduce_", normalize, reduce_grad, "allreduce_", grad_input]
    expected = [name for name in expected if not (in_memory and name == "allreduce_")]
    assert testing.run_ranks(of_two_ranks, 2) == [dict.fromkeys(LAYERS, expected)] * 2


def test_more_calls_are_counted():
    """The negative control: a mask has to be converted for the library, and a layer of torch's calls none of it."""
    x = torch.randn(4, 3, 5, requires_grad=True)
    layer = syncnorm.SyncBatchNorm(3)
    assert of_cpu(lambda: layer(x, mask=torch.ones(4, 1, 5, dtype=torch.bool))) != STEP[:2]
    assert not set(of_cpu(lambda: torch.nn.BatchNorm1d(3)(x))) & set(STEP)


def test_triton_launches_two_kernels_each_way():
    """In the interpreter; on a GPU, tests/test_gpu_kernels.py counts what the device runs."""
    code = f"""
    import itertools, sys
    sys.path.insert(0, {HERE + "/helpers"!r})
    import torch
    from launches import LAYERS, STEP, layer_and_step, of_interpreter
    for name, last, dtype in itertools.product(LAYERS, (False, True), (torch.float32, torch.bfloat16)):
        step = layer_and_step(name, dtype, parameters=dtype, last=last)
        step()  # allocates the counters
        found = of_interpreter(step)
        assert found == STEP, (name, last, dtype, found)
    print("counted")
    """
    assert run_python(code, TRITON_INTERPRET="1", SYNCNORM_KERNELS="triton").strip() == "counted"
