"""What the Triton kernels cost a GPU, read off without one: registers, spills, the width of loads, the bytes moved."""

import json
import os

import pytest
import torch
from interpreter import run_python

HERE = os.path.dirname(__file__)
REGISTERS = 128  # two programs of 256 threads on a multiprocessor of 65536 registers
CASES = {  # shape, memory, dtype, activation, residual, in place
    "fp32": ((32, 256, 56, 56), "NCHW", "float32", None, False, False),
    "fp32-channels-last": ((32, 256, 56, 56), "NHWC", "float32", None, False, False),
    "bf16": ((32, 256, 56, 56), "NCHW", "bfloat16", None, False, False),
    "bf16-channels-last": ((32, 64, 112, 112), "NHWC", "bfloat16", None, False, False),
    "fp64": ((32, 64, 56, 56), "NCHW", "float64", "silu", False, False),
    "two-axes": ((4096, 512), "NCHW", "float16", None, False, False),
    "add-relu": ((32, 256, 56, 56), "NCHW", "bfloat16", "relu", True, False),
    "add-relu-channels-last": ((32, 256, 56, 56), "NHWC", "bfloat16", "relu", True, False),
    "add-gelu-channels-last": ((32, 256, 56, 56), "NHWC", "float16", "gelu_tanh", True, False),
    "in-place-channels-last": ((32, 256, 56, 56), "NHWC", "bfloat16", "leaky_relu", False, True),
    "7x7": ((32, 2048, 7, 7), "NCHW", "float32", None, False, False),
    "7x7-add-relu": ((32, 2048, 7, 7), "NCHW", "bfloat16", "relu", True, False),
}
ALIGNED = [name for name in CASES if "7x7" not in name]
KERNELS = ["moments_kernel", "normalize_kernel", "reduce_grad_kernel", "grad_input_kernel"]


def passes(shape, memory, dtype, activation, adds, inplace, masked=False):
    """Call the four kernels of a training step."""
    from syncnorm.kernels import Epilogue, Running, Saved, Stamp, triton

    C = shape[1]  # noqa: N806
    in_memory = (shape[0], *shape[2:], C) if memory == "NHWC" else shape
    x, dy, residual = (torch.zeros(in_memory, dtype=getattr(torch, dtype)) for _ in range(3))
    if memory == "NHWC":
        x, dy, residual = (tensor.movedim(-1, 1) for tensor in (x, dy, residual))
    mask = torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool) if masked else None
    epilogue = Epilogue(activation, inplace, adds)
    weight, bias, mean, var = (torch.ones(C) for _ in range(4))
    running = Running(mean, var, torch.tensor(0), 0.1)
    moments = triton.moments(x, mask, stamp=Stamp(7, 2))
    tensors = (x, moments, weight, bias, residual if adds else None, 1e-5)
    _, statistics, signs = triton.normalize(*tensors, stamp=Stamp(7, 2), epilogue=epilogue, running=running)
    saved = Saved(x, signs, residual if epilogue.saves_residual else None)
    backward = triton.Backward(dy, saved, statistics, weight, bias, mask=mask, epilogue=epilogue)
    *_, sums = backward.reduce_grad(torch.float32, stamp=Stamp(7, 2))
    backward.grad_input(sums, stamp=Stamp(7, 2))


@pytest.fixture(scope="module")
def codes():
    """Return the kernels of each case, compiled for sm_90."""
    code = f"""
    import json, sys
    sys.path[:0] = {HERE!r}, {HERE + "/helpers"!r}
    from machine_code import compiled
    from test_triton_code import CASES, passes
    found = {{name: compiled(lambda: passes(*case)) for name, case in CASES.items()}}
    found["masked"] = compiled(lambda: passes(*CASES["fp32"], masked=True))
    print(json.dumps({{name: [code._asdict() for code in codes] for name, codes in found.items()}}))
    """
    return json.loads(run_python(code, timeout=110, TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1"))


@pytest.mark.parametrize("name", [*CASES, "masked"])
def test_no_register_is_spilled(codes, name):
    assert [code["kernel"] for code in codes[name]] == KERNELS
    for code in codes[name]:
        print(name, code)
        assert code["spilled"] == code["local"] == 0
        assert code["registers"] <= REGISTERS


@pytest.mark.parametrize("name", ALIGNED)
def test_values_are_loaded_by_16_bytes(codes, name):
    """Four loads at a time of a pass that sums, of each tensor; two of one that maps. Parameters are loaded apart."""
    sums = 4, 8  # of moments; of reduce_grad, which reads dy too
    maps = 2, 4  # of normalize; of grad_input
    moments, normalize, reduce_grad, grad_input = codes[name]
    for code, loads in zip((moments, reduce_grad, normalize, grad_input), (*sums, *maps), strict=True):
        assert code["loads"].get("16", 0) >= loads
        assert code["loads"].get("2", 0) == 0
    assert normalize["stores"].get("16", 0) >= 2
    assert grad_input["stores"].get("16", 0) >= 2


def test_values_that_are_not_aligned_are_loaded_one_by_one(codes):
    """The negative control: planes of 49 values of 2 bytes begin anywhere."""
    for code in codes["7x7-add-relu"]:
        assert code["loads"]["2"] >= 8


@pytest.mark.parametrize("kernel", [0, 2], ids=["moments", "reduce_grad"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "7x7"])
def test_the_last_program_sees_what_the_others_have_stored(codes, name, kernel):
    """All threads store, then one of them counts, with release and acquire, then all load past the L1 cache."""
    memory = codes[name][kernel]["memory"]
    (count,) = (place for place, access in enumerate(memory) if access.startswith("atom."))
    assert ".gpu.acq_rel.add" in memory[count]
    stored = max(place for place in range(count) if memory[place].startswith("st.global"))
    assert "bar" in "".join(memory[stored:count])
    loaded = min(place for place in range(count, len(memory)) if memory[place].startswith("ld.global"))
    assert "bar" in "".join(memory[count:loaded])
    partial = [access for access in memory[loaded:] if access.startswith("ld.global")]
    assert sum(".cg" in access for access in partial) >= 2


def test_a_pass_that_maps_counts_nothing(codes):
    """The negative control; nor does a pass that sums, if a program has all tiles of its channels."""
    for code in codes["fp32"][1::2] + codes["7x7"]:
        assert not any(access.startswith("atom.") for access in code["memory"])


def count_bytes(*case):
    """Return how many bytes each kernel loads and stores for N, C, S values, and how many it must."""
    import triton.runtime.interpreter as interpreter

    counts, run, builder = [], interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted(at, method, place):
        def call(self, pointers, *arguments):
            mask = arguments[place]
            counts[-1][at] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return method(self, pointers, *arguments)

        return call

    def launched(self, *args, **kwargs):
        counts.append([0, 0])
        return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launched
    builder.create_masked_load, builder.create_masked_store = counted(0, load, 0), counted(1, store, 1)
    passes(*case)
    return counts


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter, where there is no GPU")
@pytest.mark.parametrize(
    ("case", "tensors"),
    [
        (((4, 8, 32, 32), "NCHW", "float32", None, False, False), ((1, 0), (1, 1), (2, 0), (2, 1))),
        (((4, 32, 16, 16), "NHWC", "bfloat16", None, False, False), ((1, 0), (1, 1), (2, 0), (2, 1))),
        (((4, 16, 7, 7), "NCHW", "bfloat16", "relu", True, False), ((1, 0), (2, 1), (2, 0), (2, 2))),
        (((4, 8, 32, 32), "NCHW", "float32", "silu", True, False), ((1, 0), (2, 1), (3, 0), (3, 2))),
    ],
    ids=["plain", "channels-last", "add-relu", "add-silu"],
)
def test_each_pass_reads_and_writes_each_value_once(case, tensors):
    """Beside what is per channel or a bit for each value: a few percent, of these small tensors a quarter."""
    code = f"""
    import sys
    sys.path[:0] = {HERE!r}, {HERE + "/helpers"!r}
    from test_triton_code import count_bytes
    print(count_bytes(*{case!r}))
    """
    counted = json.loads(run_python(code, TRITON_INTERPRET="1").splitlines()[-1])  # before it, NumPy may warn
    (N, C, H, W), _, dtype, *_ = case  # noqa: N806
    size = N * C * H * W * getattr(torch, dtype).itemsize
    for (loaded, stored), (loads, stores) in zip(counted, tensors, strict=True):
        print(f"{loaded} bytes loaded, {stored} stored, of tensors of {size} bytes")
        assert loads * size <= loaded <= (loads + 0.5) * size
        assert stores * size <= stored <= (stores + 0.25) * size
