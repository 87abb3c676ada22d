"""The compiled kernels of the CPU, held against the reference: every pass, dtype, layout and instruction set."""

import contextlib
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from implementation import chosen
from interpreter import run_python
from torch.testing._internal.two_tensor import TwoTensor

import syncnorm
from syncnorm import kernels
from syncnorm.kernels import Epilogue, Running, Saved, Stamp, reference

cpu = pytest.importorskip("syncnorm.kernels.cpu", reason="COMPILED KERNELS NOT TESTED: no compiler at installation")
from syncnorm.kernels.cpu import binding  # noqa: E402

SHAPES = {
    "planes": (4, 3, 5, 7),
    "small-planes": (6, 40, 2),
    "odd-planes": (3, 5, 33, 33),
    "many-channels": (2, 1200, 3),
    "no-space": (257, 64),
    "few": (3, 5),
    "one-sample": (1, 130, 40),
    "large": (64, 8, 56, 56),
    "empty": (0, 4, 3),
}
STAMP = Stamp(654321, 1)
EPSILON = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
EPILOGUES = [(None, False), ("relu", False), ("relu", True), ("leaky_relu", True), ("silu", True), ("gelu_tanh", False)]


def random(shape, dtype, layout, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 3
    x = x.to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x


def assert_near(actual, expected, dtype):
    assert actual.shape == expected.shape
    largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=EPSILON[dtype] * largest)


def without_kinks(x, moments, weight, bias, residual):
    """Return x with the values moved whose z is near 0, where rounding decides on the derivative."""
    z = reference.normalize(x, moments, weight, bias, residual, 1e-5)[0]
    return torch.where(z.abs() < 0.05, x + 0.5, x)


def check(shape, dtype, layout, masked):
    """Hold every pass against the reference's, each on the reference's results of the one before."""
    x, dy, residual = (random(shape, dtype, layout, seed) for seed in range(3))
    dy = dy - 3
    positions = (shape[0], 1, *shape[2:])
    mask = torch.rand(positions, generator=torch.Generator().manual_seed(3)) > 0.3 if masked else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.linspace(0.5, 1.5, shape[1], dtype=wide), torch.linspace(-1, 1, shape[1], dtype=wide)
    for activation, adds in EPILOGUES:
        r = residual if adds else None
        if activation:
            x = without_kinks(x, reference.moments(x, mask), weight, bias, r)
        moments = reference.moments(x, mask)
        assert_near(cpu.moments(x, mask), moments, wide)
        epilogue = Epilogue(activation, adds_residual=adds)
        packed = reference.pack(moments, STAMP)
        stamped = cpu.moments(x, mask, stamp=STAMP)
        assert_near(stamped[:-2], packed[:-2], wide)  # the stamp is so large that it would hide the rest
        assert torch.equal(stamped[-2:], packed[-2:])
        options = {"stamp": STAMP if adds else None, "epilogue": epilogue}
        arguments = (x, packed if adds else moments, weight, bias, r, 1e-5)
        expected = reference.normalize(*arguments, **options)
        y, statistics, _ = cpu.normalize(*arguments, **options)
        wanted, wanted_statistics, wanted_signs = expected
        assert_near(y, wanted, dtype)
        assert y.dtype == dtype
        assert y.stride() == wanted.stride() or 1 in shape or 0 in shape
        assert_near(statistics, wanted_statistics, torch.float64)
        saved = Saved(x, wanted_signs, r if epilogue.saves_residual else None)
        arguments = (dy, saved, statistics, weight, bias)
        gradients = cpu.Backward(*arguments, mask=mask, epilogue=epilogue).reduce_grad(wide)
        wanted_gradients = reference.Backward(*arguments, mask=mask, epilogue=epilogue).reduce_grad(wide)
        for gradient, wanted_gradient, kind in zip(
            gradients, wanted_gradients, (wide, wide, torch.float64), strict=True
        ):
            assert_near(gradient, wanted_gradient, wide)
            assert gradient.dtype == kind
        for total in (wanted_gradients[2], None):
            options = {"mask": mask if total is not None else None, "epilogue": epilogue}
            dx, dz = cpu.Backward(*arguments, **options).grad_input(total)
            wanted_dx, wanted_dz = reference.Backward(*arguments, **options).grad_input(total)
            assert_near(dx, wanted_dx, dtype)
            assert (dz is None) == (wanted_dz is None)
            if dz is not None:
                assert_near(dz, wanted_dz, dtype)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", EPSILON, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", SHAPES)
def test_passes(name, dtype, layout, masked):
    check(SHAPES[name], dtype, layout, masked)


def check_in_place(shape, dtype, layout, masked):
    """Hold the passes of the backward from y against the reference's, with weights from 1 down to 0."""
    x, dy = (random(shape, dtype, layout, seed) for seed in range(2))
    mask = torch.rand((shape[0], 1, *shape[2:]), generator=torch.Generator().manual_seed(3)) > 0.3 if masked else None
    weight = torch.tensor([1.0, -0.5, 1e-2, 1e-3, 1e-4, 1e-8, 1e-30, 1e-40, 0.0]).repeat(shape[1])[: shape[1]]
    bias = torch.linspace(-1, 1, shape[1])
    moments = reference.moments(x, mask)
    for activation in (None, "leaky_relu"):
        epilogue = Epilogue(activation, inplace=True)
        y, statistics, _ = reference.normalize(x.clone(), moments, weight, bias, None, 1e-5, epilogue=epilogue)
        mine = x.clone()
        assert cpu.normalize(mine, moments, weight, bias, None, 1e-5, epilogue=epilogue)[0] is mine
        assert_near(mine, y, dtype)
        passes = [
            k.Backward(dy, Saved(y), statistics, weight, bias, mask=mask, epilogue=epilogue) for k in (cpu, reference)
        ]
        gradients, expected = (backward.reduce_grad(torch.float32) for backward in passes)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert_near(gradient, wanted, torch.float32)
        for total in (expected[2], None):
            assert_near(*(backward.grad_input(total)[0] for backward in passes), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", EPSILON, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["planes", "small-planes", "odd-planes", "no-space", "empty"])
def test_passes_in_place(name, dtype, layout):
    check_in_place(SHAPES[name], dtype, layout, name == "planes")


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_instruction_sets(isa):
    """Each that this machine has, in a process of its own; where it has not, the library does not ask for it."""
    have = {"base": ["base"], "avx2": ["base", "avx2"], "avx512": ["base", "avx2", "avx512"]}
    best = binding._library.syncnorm_isa().decode()
    assert best in have
    if isa not in have[best]:
        pytest.skip(f"NOT TESTED: this CPU has no {isa}")
    assert run_python(CHECKS, SYNCNORM_ISA=isa).split() == [isa, "True"]


CHECKS = f"""
    import sys
    sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent / "helpers")]!r}
    from test_kernels import EPSILON, SHAPES, check, check_in_place, check_vectors, cpu
    import torch
    for name in ("planes", "small-planes", "odd-planes", "no-space"):
        for dtype in EPSILON:
            for layout in ("contiguous", "channels_last"):
                check(SHAPES[name], dtype, layout, name == "planes")
                check_in_place(SHAPES[name], dtype, layout, name == "planes")
    check_vectors()
    print(cpu.ISA, cpu.agree(torch.ones(2, 3)))
"""


def test_a_torch_without_the_exchange_api():
    """Then the kernels ask Python for each property of a tensor, and `agree` cannot tell."""
    assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    without = "\n    import torch; del torch.Tensor.__dlpack_c_exchange_api__"
    assert run_python(f"{without}\n{CHECKS}", SYNCNORM_ISA=cpu.ISA).split() == [cpu.ISA, "False"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT TESTED: memory is not poisoned where a CUDA device is")
def test_what_a_kernel_does_not_write_is_seen():
    """The fixture in conftest.py fills uninitialized memory."""
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()


def test_threads_share_the_work_and_sum_alike():
    """The number of threads changes no more than the rounding; the same number changes nothing."""
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            check(SHAPES["large"], torch.float32, "contiguous", False)
            check(SHAPES["large"], torch.float32, "channels_last", True)
            found = cpu.moments(random((64, 8, 56, 56), torch.float32, "contiguous", 0))
            assert torch.equal(found, results.setdefault(threads, found))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("first", [1e6, -3e4, 0.0])
def test_the_first_values_may_be_unlike_the_rest(first, layout):
    """The sums are about a first estimate of the mean, taken from the first values: a bad one is found out."""
    x = torch.randn(64, 4, 40, generator=torch.Generator().manual_seed(0)) + 1e4
    x[0, :, :8] = first
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x
    moments, exact = cpu.moments(x), x.double().movedim(1, 0).flatten(1)
    assert ((moments[:4] - exact.mean(1)).abs() < 1e-7 * exact.std(1)).all()
    torch.testing.assert_close(moments[4:8] / moments[8], exact.var(1, correction=0), rtol=2e-6, atol=0)


SHAPES_OF_LARGE_VALUES = {
    "planes": (16, 3, 8, 8),
    "rows": (64, 3),
    "small planes": (40, 5, 3),
    "long planes": (4, 3, 700),
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", SHAPES_OF_LARGE_VALUES)
@pytest.mark.parametrize("scale", [1e15, 1e18, 1e19, 1e20, 1e25, 1e30])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_values_whose_squares_have_no_float32(implementation, scale, name, layout, masked):
    """y, the gradients and the mean are as exact as for small values; F.batch_norm gives 0 for y."""
    shape = SHAPES_OF_LARGE_VALUES[name]
    x, dy = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    x = (x * scale + scale).float()
    x[0, :2] = 0  # the first values are unlike the rest
    x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else t for t in (x, dy))
    mask = torch.rand(len(x), 1, *shape[2:]) < 0.7 if masked else None
    layer = syncnorm.SyncBatchNorm(shape[1], activation="relu", momentum=1.0)
    with chosen(implementation):
        y = layer(x.requires_grad_(), mask=mask)
        y.backward(dy.float())
    exact = x.detach().double().requires_grad_()
    counts = torch.ones_like(exact) if mask is None else mask.expand_as(exact).double()
    n = counts.sum(axes := [0, *range(2, x.dim())], keepdim=True)
    mean = (exact * counts).sum(axes, keepdim=True) / n
    normalized = (exact - mean) / (((exact - mean).square() * counts).sum(axes, keepdim=True) / n).sqrt()
    normalized.relu().backward(dy.float().double())
    assert (y - normalized.relu()).abs().max() < 2e-6
    assert (x.grad - exact.grad).abs().max() < 2e-6 * exact.grad.abs().max()
    torch.testing.assert_close(layer.weight.grad, (dy * normalized.relu()).sum(axes).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_mean, mean.flatten().float(), rtol=1e-6, atol=0)
    if scale > 1e19 and x.is_contiguous():  # the negative control
        of_torch = torch.nn.functional.batch_norm(x.detach(), None, None, training=True)
        assert (of_torch - normalized).abs().max() > 1


def test_values_that_are_no_numbers_stay_in_their_channel():
    x = torch.randn(16, 4, 8, 8)
    x[1, 2, 3, 4] = float("nan")
    x[2, 1, 3, 4] = float("inf")
    y = syncnorm.SyncBatchNorm(4)(x)
    assert y[:, [0, 3]].isfinite().all()
    assert y[:, 1:3].isnan().all() or not y[:, 1:3].isfinite().all()


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4, 1e6])
def test_no_digits_are_lost_to_a_large_mean(mean):
    x = torch.randn(16, 8, 30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean
    x = x.float()
    y = syncnorm.SyncBatchNorm(8)(x)
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    assert (y - exact).abs().max() < (5e-4 if mean > 1e4 else 2e-6)


def test_more_values_than_an_int32_counts():
    x = torch.zeros(2**15 + 1, 2, 2**15, dtype=torch.bfloat16)  # 4 GB of zeros, of which the system makes no pages
    assert x.numel() > 2**31
    x[-1, 1, -1] = 3
    moments = cpu.moments(x)
    count = (2**15 + 1) * 2**15
    assert moments.tolist() == pytest.approx([0, 3 / count, 0, 9 - 9 / count, count])
    statistics = torch.tensor([0, 0, 1, 1, count], dtype=torch.float64)
    *_, sums = cpu.Backward(x, Saved(x), statistics, None, None).reduce_grad()
    assert sums.tolist() == [0, 3, 0, 9]


def test_an_infinite_gradient_stops_at_a_relu():
    """0 times infinity would be no number."""
    x = torch.tensor([[1.0], [-1.0]])
    statistics = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    positive = torch.tensor([[1]], dtype=torch.uint8)
    for epilogue, signs in ((Epilogue("relu"), None), (Epilogue("relu", adds_residual=True), positive)):
        dy = torch.full((2, 1), torch.inf)
        dx, _ = cpu.Backward(dy, Saved(x, signs), statistics, None, None, epilogue=epilogue).grad_input(None)
        assert dx.flatten().tolist() == [torch.inf, 0]


def check_vectors():
    """Parameters and buffers of any dtype and stride."""
    x, dy = (random((5, 3, 7), torch.float64, "contiguous", seed) for seed in (0, 1))
    for dtypes in itertools.product(EPSILON, repeat=2):
        for stride in (1, 2):
            one, other = (random((3, 2), dtype, "contiguous", 2)[:, 0].abs() for dtype in dtypes)
            if stride == 2:
                one, other = (torch.stack([t, t], 1)[:, 0] for t in (one, other))
            assert one.stride() == (stride,)
            found = []
            for implementation in (cpu, reference):
                mean, var = (torch.stack([t, t], 1)[:, 0] if stride == 2 else t.clone() for t in (one, other))
                running = Running(mean, var, torch.tensor(0), 0.1)
                y, statistics, _ = implementation.normalize(
                    x, implementation.moments(x), one, other, None, 1e-5, running=running
                )
                passes = implementation.Backward(dy, Saved(x), statistics, one, other, epilogue=Epilogue("relu"))
                found.append((y, mean, var, *passes.reduce_grad(dtypes[0])))
                assert running.batches == 1
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=4 * EPSILON[a.dtype], atol=4 * EPSILON[a.dtype])


def test_parameters_and_buffers_of_any_dtype_and_stride():
    check_vectors()


def test_a_vector_that_holds_the_negative_of_its_values_is_refused():
    x = torch.randn(4, 3)
    negative = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    assert negative.is_neg()
    with pytest.raises(RuntimeError, match=r"expected tensors without the negative bit, got one with it"):
        cpu.normalize(x, cpu.moments(x), negative, None, None, 1e-5)
    y, _, _ = cpu.normalize(x, cpu.moments(x), negative.resolve_neg(), None, None, 1e-5)
    torch.testing.assert_close(y, -cpu.normalize(x, cpu.moments(x), None, None, None, 1e-5)[0])


def test_tensors_that_hooks_of_autograd_have_changed():
    """They need not keep the dtype or the strides of what was saved, here of the statistics and of the signs, too."""
    x, residual, dy = (torch.randn(6, 64, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    for hooks in (
        (lambda t: t.half(), lambda t: t.float()),
        (lambda t: torch.stack([t, t], -1), lambda t: t[..., 0]),
    ):
        grads = []
        for pack, unpack in (hooks, (lambda t: t, lambda t: t)):
            layer, leaf = syncnorm.SyncBatchNorm(64, activation="relu"), x.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                y = layer(leaf, residual=residual)
            grads.append(torch.autograd.grad(y, [leaf, *layer.parameters()], dy))
        for changed, kept in zip(*grads, strict=True):
            torch.testing.assert_close(changed, kept, rtol=1e-2, atol=1e-2)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    x, eight = torch.randn(4, 8), torch.zeros(8, dtype=torch.float8_e4m3fn)
    buffers = torch.ones(8), torch.ones(8)
    moments = cpu.moments(x)
    for wrong in (
        {"weight": eight},
        {"weight": torch.ones(4)},
        {"running": Running(eight, buffers[0], None, 0.1)},
        {"running": Running(*buffers, torch.zeros(2, dtype=torch.int64), 0.1)},
        {"moments": moments.float()},
        {"moments": moments[:-1]},
        {"residual": x.double()},
    ):
        arguments = {"moments": moments, "weight": None, "bias": None, "residual": None, "eps": 1e-5}
        with pytest.raises(RuntimeError, match="expected tensors that fit together"):
            cpu.normalize(x, **(arguments | {"running": Running(*buffers, None, 0.1)} | wrong))
    assert all((buffer == 1).all() for buffer in buffers)
    with pytest.raises(RuntimeError, match="expected tensors that fit together"):
        syncnorm.functional.sync_batch_norm(x, eight, eight.clone(), training=True)


def test_tensors_without_memory():
    """A gradient of zeros is computed with. With other ones torch computes in a mode that the kernels cannot see."""
    layer, x = syncnorm.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    layer(x).backward(torch._efficientzerotensor((4, 3)))
    assert not x.grad.any()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match="expected tensors with memory, got one without, such as a FakeTensor"):
            layer(x)
        with pytest.raises(RuntimeError, match="expected tensors with memory, got one without, such as a FakeTensor"):
            cpu.moments(x)


def test_the_negative_bit_of_a_single_value():
    negative = torch.complex(torch.zeros(1), torch.ones(1)).conj().imag
    assert negative.is_neg()
    with pytest.raises(RuntimeError, match="expected tensors without the negative bit"):
        cpu.moments(negative.view(1, 1))
    with pytest.raises(RuntimeError, match="expected tensors without the negative bit"):
        cpu.normalize(torch.randn(4, 1), cpu.moments(torch.randn(4, 1)), negative, None, None, 1e-5)


MISFITS = {  # what is wrong, with other tensors
    "channels": {"weight": torch.ones(4)},
    "axes": {"bias": torch.ones(3, 1)},
    "a scalar": {"bias": torch.tensor(1.0)},
    "integers": {"running_mean": torch.ones(3, dtype=torch.int32)},
    "complex numbers": {"running_mean": torch.ones(3, dtype=torch.complex64)},
    "two counters": {"num_batches_tracked": torch.zeros(2)},
    "no channels": {"input": torch.ones(3)},
    "integers in": {"input": torch.ones(2, 3, dtype=torch.int32)},
    "sparse": {"input": torch.ones(2, 3).to_sparse()},
    "meta": {"weight": torch.ones(3, device="meta")},
    "no tensor": {"weight": [1.0, 1.0, 1.0]},
    "a subclass": {"weight": torch.ones(3).as_subclass(type("Other", (torch.Tensor,), {}))},
}


@pytest.mark.parametrize("wrong", [None, *MISFITS])
def test_the_quick_check_accepts_what_fits_alone(wrong):
    fitting = dict(zip(("running_mean", "running_var", "weight", "bias"), torch.rand(4, 3), strict=True))
    tensors = {"input": torch.ones(2, 3, 5), **fitting, "num_batches_tracked": torch.tensor(0)}
    assert cpu.agree(*(tensors | MISFITS.get(wrong, {})).values()) is (wrong is None)
    assert cpu.agree(*(tensors | dict.fromkeys(fitting)).values())
    assert not cpu.agree(*dict.fromkeys(tensors).values())


def test_the_quick_check_does_not_look_into_transforms():
    seen = []
    torch.func.grad(lambda x: (seen.append(cpu.agree(x)), x.sum())[1])(torch.ones(2, 3))
    torch.func.vmap(lambda x: (seen.append(cpu.agree(x)), x)[1])(torch.ones(4, 2, 3))
    assert seen == [False, False]


def test_buffers_and_parameters_of_any_dtype():
    mean, var, batches = torch.zeros(2), torch.ones(2, dtype=torch.float64), torch.tensor(0, dtype=torch.int32)
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    for _ in range(2):
        cpu.normalize(x, cpu.moments(x), None, None, None, 1e-5, running=Running(mean, var, batches, None))
    assert batches == 2
    torch.testing.assert_close(mean, torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(var, torch.tensor([2.0, 8.0]).double())
    weight, bias = torch.ones(2, dtype=torch.bfloat16), torch.full((2,), 1 / 3)
    y, statistics, _ = cpu.normalize(x, cpu.moments(x), weight, bias, None, 1e-5)
    torch.testing.assert_close(y, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) + 1 / 3, rtol=0, atol=1e-5)
    grads = cpu.Backward(x, Saved(x), statistics, weight, bias, epilogue=Epilogue("relu")).reduce_grad(torch.bfloat16)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.bfloat16, torch.float64]


WRONG_SUMS = {  # of h and h² over 4 ranks, of which this one has h = 10
    "another rank has another h": (10 + 10 + 10 + 11, 300 + 121),
    "the sum alone is right": (10 + 10 + 9 + 11, 200 + 81 + 121),
    "the sum of squares alone is right": (10 + 10 + 10 + 9, 400),
    "a message without a stamp": (30, 300),
    "no number": (float("nan"), 400),
}


@pytest.mark.parametrize("implementation", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("total", WRONG_SUMS.values(), ids=WRONG_SUMS)
def test_a_wrong_sum_raises_and_nothing_is_written(implementation, total):
    stamp = Stamp(10, 4)
    for shape in ((5, 3, 7), (0, 3, 7)):
        x = torch.randn(shape)
        running = Running(torch.randn(3), torch.rand(3), torch.tensor(5), 0.1)
        before = [t.clone() for t in (x, *running[:3])]
        packed = 4 * implementation.moments(x, stamp=stamp)
        packed[-2:] = torch.tensor(total)
        for epilogue in (Epilogue(), Epilogue(inplace=True)):
            with pytest.raises(kernels.StampError):
                implementation.normalize(
                    x, packed, None, None, None, 1e-5, stamp=stamp, epilogue=epilogue, running=running
                )
        assert all(map(torch.equal, (x, *running[:3]), before))
        statistics = torch.ones(7, dtype=torch.float64)
        passes = implementation.Backward(x, Saved(x), statistics, None, None)
        *_, sums = passes.reduce_grad(stamp=stamp)
        assert sums[-2:].tolist() == [10, 100]
        sums[-2:] = torch.tensor(total)
        with pytest.raises(kernels.StampError):
            passes.grad_input(sums, stamp=stamp)


@pytest.mark.parametrize("implementation", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 1024])
@pytest.mark.parametrize("number", [0, 1, 2**20 - 1])
def test_the_stamps_of_many_ranks_are_exact(implementation, ranks, number):
    """Also when they are added one by one. A larger sum by one is found."""
    x, stamp = torch.randn(5, 3), Stamp(number, ranks)
    message = implementation.moments(x, stamp=stamp)
    assert message[-2:].tolist() == [number, number**2]
    summed = sum((message for _ in range(ranks - 1)), message.clone())
    y, statistics, _ = implementation.normalize(x, summed, None, None, None, 1e-5, stamp=stamp)
    assert statistics.shape == (7,)
    assert statistics[-1] == 5 * ranks
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
    passes = implementation.Backward(x, Saved(x), statistics, None, None)
    *_, sums = passes.reduce_grad(stamp=stamp)
    whole = passes.grad_input(sum((sums for _ in range(ranks - 1)), sums.clone()), stamp=stamp)[0]
    torch.testing.assert_close(whole, passes.grad_input(sums[:6] * ranks)[0])
    if ranks > 1:
        for place in (-1, -2):
            wrong = summed.clone()
            wrong[place] += 1
            with pytest.raises(kernels.StampError):
                implementation.normalize(x, wrong, None, None, None, 1e-5, stamp=stamp)


def test_signs_belong_to_the_memory_they_were_taken_from():
    """`save_on_cpu` gives a channels-last tensor back contiguous."""
    x, residual, dy = (random((4, 3, 5, 7), torch.float32, "channels_last", seed) for seed in range(3))
    gradients = []
    for context in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu()):
        leaf = x.clone().requires_grad_()
        with context:
            y = syncnorm.SyncBatchNorm(3, activation="relu")(leaf, residual=residual - 3)
        y.backward(dy)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_selected_for_plain_tensors_on_the_cpu():
    class Subclass(torch.Tensor):
        pass

    assert kernels.select(torch.zeros(2)) is cpu
    assert kernels.select(torch.nn.Parameter(torch.zeros(2))) is cpu
    assert kernels.select(torch.zeros(2).as_subclass(Subclass)) is reference


@pytest.fixture
def package(tmp_path):
    """A copy of the package, to be damaged."""
    shutil.copytree(Path(syncnorm.__file__).parent, tmp_path / "syncnorm")
    return tmp_path / "syncnorm" / "kernels"


SELECT = "import torch, syncnorm.kernels as k; print(k.select(torch.zeros(2)).__name__)"


def error_of(package, asked, code=SELECT):
    environment = {"PYTHONPATH": str(package.parent.parent), "PATH": "/usr/bin:/bin"} | asked
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, timeout=60)
    return (ran.stdout + ran.stderr).strip().splitlines()[-1]


def test_a_missing_library_is_named_where_it_was_asked_for(package):
    (package / "cpu" / "libsyncnorm_cpu.so").unlink()
    assert error_of(package, {}) == "syncnorm.kernels.reference"
    message = error_of(package, {"SYNCNORM_KERNELS": "cpu"})
    assert "SYNCNORM_KERNELS=cpu, but the cpu kernels cannot be imported (expected compiled kernels" in message
    assert "pip install" in message


def test_what_is_asked_for_has_to_support_the_tensor(package):
    message = error_of(package, {"SYNCNORM_KERNELS": "triton"})
    assert message == "RuntimeError: SYNCNORM_KERNELS=triton, but the triton kernels do not support cpu tensors"
    for tensor, unsupported in (
        ("('cuda', torch.float32)", "cuda tensors"),
        ("('cpu', torch.float8_e5m2)", "torch.float8_e5m2"),
    ):
        code = f"import torch, syncnorm.kernels as k; k._implementation(*{tensor})"
        message = error_of(package, {"SYNCNORM_KERNELS": "cpu"}, code)
        assert message == f"RuntimeError: SYNCNORM_KERNELS=cpu, but the cpu kernels do not support {unsupported}"


def test_meta_and_fake_tensors_get_the_reference_whatever_is_asked_for():
    code = """
    import torch, syncnorm
    from torch._subclasses.fake_tensor import FakeTensorMode
    print(syncnorm.SyncBatchNorm(3, device="meta")(torch.empty(4, 3, device="meta")).shape)
    with FakeTensorMode():
        print(syncnorm.SyncBatchNorm(3)(torch.empty(4, 3)).shape)
    """
    assert run_python(code, SYNCNORM_KERNELS="cpu").split("\n")[:2] == ["torch.Size([4, 3])"] * 2


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("sys.modules['triton'] = None", "cannot be imported (import of triton halted; None in sys.modules)"),
        ("torch.version.hip = '6.0'", "do not support ROCm"),
    ],
    ids=["no-triton", "rocm"],
)
def test_cuda_without_triton_warns_once_and_raises_where_it_was_asked_for(damage, problem):
    """Whether there is a GPU or not: it is asked what would serve one."""
    code = f"""
    import sys, warnings, torch
    from syncnorm import kernels
    {damage}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in (torch.float32, torch.bfloat16):
            print(kernels._implementation("cuda", dtype).__name__)
    print(*[warning.message for warning in caught], sep="\\n")
    """
    install = ": pip install triton" if "import" in problem else ""
    said = f"the triton kernels {problem}{install}"
    lines = run_python(code, SYNCNORM_KERNELS="").splitlines()
    assert lines == ["syncnorm.kernels.reference"] * 2 + [f"CUDA tensors use the slow reference kernels: {said}"]
    code = f"""
    import sys, torch
    from syncnorm import kernels
    {damage}
    try:
        kernels._implementation("cuda", torch.float32)
    except RuntimeError as error:
        print(error)
    """
    assert run_python(code, SYNCNORM_KERNELS="triton").strip() == f"SYNCNORM_KERNELS=triton, but {said}"


def test_an_unknown_instruction_set_is_refused(package):
    assert error_of(package, {"SYNCNORM_ISA": "foo"}).endswith("SYNCNORM_ISA to be one of avx512, avx2, base, got foo")


def test_an_outdated_library_is_refused(package):
    with (package / "cpu" / "walk.h").open("a") as source:
        source.write("// one line more\n")
    message = error_of(package, {})
    assert message.startswith("RuntimeError: expected")
    assert message.endswith("python -m syncnorm.kernels.cpu.build")


@pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: there is no g++ to compile another library with")
@pytest.mark.parametrize(
    ("name", "line", "more", "code", "said"),
    [
        (
            *(
                "calls.h",
                "    arguments.y = values.pointer<void>(shape.dtype, shape.values());\n",
                "    values.integer();\n",
            ),
            "import torch, syncnorm; syncnorm.SyncBatchNorm(3)(torch.randn(2, 3))",
            "expected the arguments that the compiled kernels read, got others: ",
        ),
        (
            *("shared_memory.h", "    int64_t patience;     // ns\n", "    int64_t more;\n"),
            "import syncnorm.communicators.shared_memory",
            "to have 248 bytes, as Python packs it, got 256 bytes: ",
        ),
        (*("exports.cpp", "EXPORT PyObject *NAME(", "another_"), SELECT, "expected functions for base in "),
    ],
    ids=["arguments", "structs", "functions"],
)
def test_a_library_of_another_version_is_refused(package, name, line, more, code, said):
    """It would read beyond what it is passed. Compiled without optimization, to take less time."""
    source = package / "cpu" / name
    text = source.read_text()
    assert line in text
    source.write_text(text.replace(line, line + more))
    build = """
    import build
    build.FLAGS = build.FLAGS.replace("-O3", "-O0")
    build.INSTRUCTION_SETS = {"base": build.INSTRUCTION_SETS["base"]}
    build.compile_library(build.LIBRARY)
    """
    run_python(build, PYTHONPATH=str(package / "cpu"))
    message = error_of(package, {"SYNCNORM_ISA": "base"}, code)
    assert message.startswith("RuntimeError: expected ")
    assert said in message
    assert message.endswith("Reinstall syncnorm, or in a checkout run python -m syncnorm.kernels.cpu.build")


def layer_step(x, weight, bias, inplace, training):
    """Return y, gradients and running statistics; the tensors may be of any class."""
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    arguments = (leaves[0] * 1 if inplace else leaves[0], running_mean, running_var, *leaves[1:], training)
    y = syncnorm.functional.sync_batch_norm(*arguments, inplace=inplace)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), *(leaf.grad for leaf in leaves), running_mean, running_var]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wrapped", ["input", "weight", "bias"])
def test_what_has_no_memory_of_its_own_is_read_by_its_own_operations(wrapped, inplace, training):
    """A tensor that wraps two others: neither a crash nor a weight that is taken for none."""
    x = random((4, 3, 5), torch.float32, "contiguous", 0)
    tensors = {"input": x, "weight": torch.tensor([0.5, 1.5, -2.0]), "bias": torch.tensor([1.0, -1.0, 0.5])}
    expected = layer_step(*tensors.values(), inplace, training)
    tensors[wrapped] = TwoTensor(tensors[wrapped], tensors[wrapped].clone())
    if wrapped != "input" and inplace:
        tensors["input"] = TwoTensor(x, x.clone())  # which can take the result
    actual = layer_step(*tensors.values(), inplace, training)
    assert isinstance(actual[0], TwoTensor)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.a if isinstance(a, TwoTensor) else a, e, rtol=1e-5, atol=1e-5)
