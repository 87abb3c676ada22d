"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter has to be chosen before Triton is imported, so what is checked runs in a process of its own.
"""

import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from implementation import chosen
from interpreter import run_python

import syncnorm
from syncnorm.kernels import ACTIVATIONS, Epilogue, RawMoments, Running, Saved, Stamp, flags, reference
from syncnorm.kernels.signs import from_bits

DEVICES = ["cuda" if torch.cuda.is_available() else "cpu"]  # the CPU: in Triton's interpreter
STAMP = Stamp(3, 1)
DEVICE = "cpu"  # of the process that checks
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = {  # divides small tensors among several programs and tiles
    "MAP_TILE_BYTES": 1024,
    "SUM_TILE_BYTES": 512,
    "UNROLL": 2,
    "MULTIPROCESSORS": 3,
    "SUM_PROGRAMS": 2,
    "MAP_PROGRAMS": 2,
    "TILES_IN_ONE_RUN": 1,
    "MAP_CHANNELS_BYTES": 64,
    "SUM_CHANNELS_BYTES": 32,
    "CONTIGUOUS_BYTES": 64,
    "WIDEST": 60,
    "MERGED_VALUES": 32,
    "RUNNING_CHANNELS": 8,
}
DIVISIONS = [(torch.float64, {}), (torch.float32, SMALL), (torch.float16, {}), (torch.bfloat16, SMALL)]
SHAPES = {  # and whether the channels are innermost
    "odd": ((5, 3, 7, 9), False),
    "odd-channels-last": ((5, 3, 7, 9), True),
    "whole-bytes": ((3, 17, 4, 6), False),
    "whole-bytes-channels-last": ((3, 24, 3, 5), True),
    "no-trailing-axes": ((37, 5), False),
    "three-trailing-axes": ((2, 20, 2, 3, 3), True),
    "one-channel": ((3, 1, 11), False),
    "long": ((1, 2, 1500), False),
    "no-samples": ((0, 4, 3), False),
}


def start(device):
    """Prepare the process that checks."""
    global DEVICE
    DEVICE = device
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"


@pytest.fixture(scope="module", params=DEVICES)
def on(request):
    """Return what calls `check(*args)` in a process where the kernels run on a device."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=start, initargs=(request.param,)) as pool:
        yield lambda check, *args: pool.submit(check, *args).result(timeout=100)


def kernels():
    from syncnorm.kernels import triton

    return triton


@contextmanager
def constants(values):
    """Give other values to constants of the kernels."""
    from syncnorm.kernels.triton import plan

    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(plan, name, value))
        for cached in (plan._divide, plan._multiprocessors):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield


def random(name, dtype, seed=0):
    """Return a tensor of a shape and memory format of SHAPES."""
    shape, last = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) + 0.5
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def parameters(channels):
    return torch.linspace(0.5, 1.5, channels, device=DEVICE), torch.linspace(-1, 1, channels, device=DEVICE)


def masks(x):
    """Return masks for (N, C, *): none, boolean, and of weights; the second broadcasts along an axis."""
    size = (x.shape[0], 1, *x.shape[2:-1], 1)[: x.dim()]
    generator = torch.Generator().manual_seed(3)
    boolean = torch.rand(size, generator=generator).to(DEVICE) > 0.4
    weights = torch.rand(x.shape[0], 1, *x.shape[2:], generator=generator).to(DEVICE)
    return [None, boolean, torch.where(weights > 0.3, weights, 0)]


def assert_same(actual, expected, tolerance):
    """Compare a result, or a tuple of them, with the reference's; tolerance is relative to the largest value."""
    if expected is None or isinstance(expected, tuple):
        assert type(actual) is type(expected)
        for pair in zip(actual or (), expected or (), strict=True):
            assert_same(*pair, tolerance)
        return
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride() or 1 in actual.shape or 0 in actual.shape
    largest = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * largest)


def compare(name, *args, tolerance, **options):
    """Compare a function of the kernels with the reference's; return what that gives."""
    inplace = options.get("epilogue", Epilogue()).inplace
    copies = [arg.clone() if inplace and arg is args[0] else arg for arg in args]
    expected, actual = call(reference, name, *args, **options), call(kernels(), name, *copies, **options)
    if name == "normalize" and expected[2] is not None:  # the signs, whose rows are up to the implementation
        signs = tuple(from_bits(result[2], result[0]).to(torch.uint8) for result in (actual, expected))
        actual, expected = ((*result[:2], of) for result, of in zip((actual, expected), signs, strict=True))
    assert_same(actual, expected, tolerance)
    return call(reference, name, *args, **options) if name == "normalize" else expected


def call(implementation, name, *args, **options):
    """Return what a function of the kernels does, or a pass of the backward: of its 5 tensors, then of its own."""
    if name not in ("reduce_grad", "grad_input"):
        return getattr(implementation, name)(*args, **options)
    own = {key: options.pop(key) for key in ("centered", "eps_outside", "stamp") if key in options}
    if name == "reduce_grad" and args[3] is not None:
        own["dtype"] = args[3].dtype
    grad_output, saved, *others = args[:5]
    saved = saved if isinstance(saved, Saved) else Saved(saved)
    return getattr(implementation.Backward(grad_output, saved, *others, **options), name)(*args[5:], **own)


def check_moments(name, dtype, division):
    x = random(name, dtype)
    with constants(division):
        for mask in masks(x):
            for stamp in (None, STAMP):
                compare("moments", x, mask, stamp=stamp, tolerance=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(("dtype", "division"), DIVISIONS, ids=map(str, TOLERANCE))
@pytest.mark.parametrize("name", SHAPES)
def test_moments(on, name, dtype, division):
    on(check_moments, name, dtype, division)


def check_passes(name, dtype, division, epilogues):
    """Compare normalize, reduce_grad and grad_input; these get what the reference's normalize kept."""
    x, residual, dy = (random(name, dtype, seed) for seed in range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (parameter.to(wide) for parameter in parameters(x.shape[1]))
    moments = reference.moments(x)
    tolerance = TOLERANCE[dtype]
    options = {"tolerance": tolerance}
    with constants(division):
        for activation, adds in epilogues:
            epilogue = Epilogue(activation, adds_residual=adds)
            tensors = (x, reference.pack(moments, STAMP) if adds else moments, weight, bias, residual if adds else None)
            _, statistics, signs = compare(
                "normalize", *tensors, 1e-5, stamp=STAMP if adds else None, epilogue=epilogue, **options
            )
            saved = Saved(x, signs, residual if epilogue.saves_residual else None)
            arguments = (dy, saved, statistics, weight, bias if epilogue.needs_bias else None)
            for mask in masks(x)[::2] if epilogues == FEW else [None]:
                backward = {"mask": mask, "epilogue": epilogue, "tolerance": tolerance}
                for stamp in (None, STAMP):
                    backward["stamp"] = stamp
                    sums = compare("reduce_grad", *arguments, **(backward | {"tolerance": min(tolerance, 1e-5)}))[2]
                    compare("grad_input", *arguments, sums, **backward)
            compare("grad_input", *arguments, None, epilogue=epilogue, **options)


ALL = list(itertools.product(ACTIVATIONS, [False, True]))
FEW = [(None, False), ("relu", True)]


@pytest.mark.parametrize(("dtype", "division"), DIVISIONS, ids=map(str, TOLERANCE))
@pytest.mark.parametrize("name", SHAPES)
def test_passes(on, name, dtype, division):
    on(check_passes, name, dtype, division, FEW)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["odd", "whole-bytes-channels-last"])
def test_epilogues(on, name, dtype):
    on(check_passes, name, dtype, {}, ALL)


def check_options():
    x, dy = random("odd", torch.float32), random("odd-channels-last", torch.float32, 1)  # dy is brought to x's format
    weight, bias = parameters(3)
    moments = reference.moments(x)
    about_zero = torch.cat([torch.zeros_like(moments[:3]), reference.pack(moments, STAMP)[3:-2]])
    tolerance = 3e-6
    half = weight.to(torch.bfloat16), bias.to(torch.float16)
    strided = torch.stack([weight, bias], 1)
    for m, centered, outside, parameter in itertools.product(
        (moments, about_zero), (True, False), (True, False), ((None, None), half, (strided[:, 0], None))
    ):
        statistics = compare("normalize", x, m, *parameter, None, 0.1, eps_outside=outside, tolerance=tolerance)[1]
        rounding = 2**-7 if parameter is half and DEVICE == "cpu" else tolerance  # the interpreter cuts bits off
        sums = compare("reduce_grad", dy, x, statistics, *parameter, tolerance=rounding)[2]
        options = {"centered": centered, "eps_outside": 0.1 if outside else 0.0, "tolerance": tolerance}
        compare("grad_input", dy, x, statistics, *parameter, sums, **options)
    constant = torch.full_like(x, 2)
    arguments = (constant, reference.moments(constant), weight, bias, None, 1e-5)
    statistics = compare("normalize", *arguments, tolerance=tolerance)[1]
    compare("grad_input", dy, constant, statistics, weight, bias, sums, eps_outside=1e-5, tolerance=tolerance)


def test_options(on):
    on(check_options)


def check_inplace(name, dtype, activation, weights):
    epilogue = Epilogue(activation, inplace=True)
    x, dy = random(name, dtype), random(name, dtype, 1)
    _, bias = parameters(x.shape[1])
    weight = torch.tensor(weights, device=DEVICE)
    tolerance = max(1e-5, TOLERANCE[dtype])
    moments = reference.moments(x)
    mine = x.clone()
    y, statistics, _ = kernels().normalize(mine, moments, weight, bias, None, 1e-5, epilogue=epilogue)
    assert y is mine
    assert_same(
        y, reference.normalize(x.clone(), moments, weight, bias, None, 1e-5, epilogue=epilogue)[0], TOLERANCE[dtype]
    )
    for mask in masks(x):
        arguments = (dy, y, statistics, weight, bias)
        sums = compare("reduce_grad", *arguments, mask=mask, epilogue=epilogue, tolerance=1e-5)[2]
        compare("grad_input", *arguments, sums, mask=mask, epilogue=epilogue, tolerance=tolerance)


@pytest.mark.parametrize("weights", [(0, 1, 1.5), (1e-2, 1e-4, 1e-8), (1e-30, -1e-12, 1e-40)])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("odd", torch.float32), ("odd-channels-last", torch.bfloat16), ("odd", torch.float16)]
)
def test_inplace(on, name, dtype, activation, weights):
    on(check_inplace, name, dtype, activation, weights)


def check_other_layouts():
    """Neither contiguous nor channels-last: permuted, expanded, every other value; residual and mask too."""
    base = random("odd", torch.float32)
    for x in (base.permute(1, 0, 3, 2), base[:, :, :1].expand(5, 3, 7, 9), base[..., ::2]):
        weight, bias = parameters(x.shape[1])
        moments = compare("moments", x, masks(x)[1], tolerance=1e-6)
        epilogue = Epilogue("relu", adds_residual=True)
        y, statistics, signs = kernels().normalize(x, moments, weight, bias, x * 2, 1e-5, epilogue=epilogue)
        expected = reference.normalize(x, moments, weight, bias, x * 2, 1e-5, epilogue=epilogue)
        torch.testing.assert_close(y, expected[0])
        assert torch.equal(from_bits(signs, y), from_bits(expected[2], y))
        arguments = (torch.ones_like(x), Saved(x, signs), statistics, weight, None)
        sums = compare("reduce_grad", *arguments, epilogue=epilogue, tolerance=1e-5)[2]
        for actual, dx in zip(
            call(kernels(), "grad_input", *arguments, sums, epilogue=epilogue),
            call(reference, "grad_input", *arguments, sums, epilogue=epilogue),
            strict=True,
        ):
            torch.testing.assert_close(actual, dx, rtol=1e-5, atol=1e-5)
    x = base.permute(0, 1, 3, 2)
    expected = reference.normalize(x, moments := reference.moments(x), None, None, None, 1e-5)[0]
    kernels().normalize(x, moments, None, None, None, 1e-5, epilogue=Epilogue(inplace=True))
    torch.testing.assert_close(x, expected)


def test_other_layouts(on):
    on(check_other_layouts)


def check_running(dtype, counted, momentum):
    moments = reference.moments(random("three-trailing-axes", torch.float32))
    nothing = reference.pack(RawMoments(torch.zeros_like(moments)), STAMP)
    for m, stamp in ((moments, None), (reference.pack(moments, STAMP), STAMP), (nothing, STAMP)):
        with constants(SMALL):
            buffers = []
            for implementation in (kernels(), reference):
                both = torch.stack(parameters(20)).to(dtype).t().contiguous().t()  # whose rows have a stride
                tracked = torch.tensor(3, device=DEVICE) if counted else None
                running = Running(both[0], both[1], tracked, momentum)
                x = torch.zeros(1, 20, 1, device=DEVICE)
                implementation.normalize(x, m, None, None, None, 1e-5, stamp=stamp, running=running)
                buffers.append((both, tracked))
        (actual, tracked), (expected, count) = buffers
        rounding = {
            torch.float64: 1e-15,
            torch.bfloat16: 2**-7 if DEVICE == "cpu" else 0,
        }  # the interpreter cuts bits off
        torch.testing.assert_close(actual, expected, rtol=rounding.get(dtype, 0), atol=0)
        assert tracked == count


@pytest.mark.parametrize(("counted", "momentum"), [(True, 0.1), (True, 0.75), (False, 0.1), (True, None)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_update_running(on, dtype, counted, momentum):
    on(check_running, dtype, counted, momentum)


def take_flag():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return flags.take(torch.zeros(1, device=DEVICE).get_device())


def check_wrong_sums(name, dtype):
    """A stamp that does not match sets the flag, of which the host learns later, and moves no running statistics."""
    x, stamp = random(name, dtype), Stamp(2**20 - 1, 1024)
    channels = x.shape[1]
    before = [parameters(channels)[0], parameters(channels)[1], torch.tensor(3, device=DEVICE)]
    statistics = torch.ones(2 * channels + 1, dtype=torch.float64, device=DEVICE)
    passes = kernels().Backward(x, Saved(x), statistics, None, None)
    with constants(SMALL):
        message, (*_, sums) = kernels().moments(x, stamp=stamp), passes.reduce_grad(stamp=stamp)
        for sent in (message, sums):
            assert sent[-2:].tolist() == [stamp.number, stamp.number**2]
        for difference in ((0, 0), (1, 0), (0, 1), (-1, 1)):
            wrong = torch.tensor(difference, device=DEVICE, dtype=torch.float64)
            for momentum in (0.1, None):
                running = Running(*(t.clone() for t in before), momentum)
                summed = 1024 * message
                summed[-2:] += wrong
                kernels().normalize(x, summed, None, None, None, 1e-5, stamp=stamp, running=running)
                moved = not all(map(torch.equal, running[:3], before))
                assert moved == (difference == (0, 0) and x.numel() > 0)
                assert take_flag() == (None if difference == (0, 0) else stamp.number)
            summed = 1024 * sums
            summed[-2:] += wrong
            passes.grad_input(summed, stamp=stamp)
            assert take_flag() == (None if difference == (0, 0) else stamp.number)
            assert take_flag() is None, "the flag is not reset"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["odd", "odd-channels-last", "long", "no-samples"])
def test_a_wrong_sum_sets_the_flag(on, name, dtype):
    on(check_wrong_sums, name, dtype)


def check_masked_values_may_be_anything():
    x, mask = random("odd", torch.float32), masks(random("odd", torch.float32))[2]
    hidden = x.masked_fill(mask == 0, torch.nan)
    assert torch.equal(kernels().moments(hidden, mask), kernels().moments(x, mask))
    weight, bias = parameters(3)
    dy = random("odd", torch.float32, 1).masked_fill(mask == 0, 0)
    statistics = reference.normalize(x, moments := reference.moments(x, mask), weight, bias, None, 1e-5)[1]
    sums = call(kernels(), "reduce_grad", dy, hidden, statistics, weight, bias, mask=mask)[2]
    assert_same(sums, call(reference, "reduce_grad", dy, x, statistics, weight, bias, mask=mask)[2], 3e-6)
    arguments = (statistics, weight, bias, sums)
    dx = call(kernels(), "grad_input", dy, hidden, *arguments, mask=mask)[0]
    assert_same(dx, call(reference, "grad_input", dy, x, *arguments, mask=mask)[0], 3e-6)
    x[0, 1, 0, 0] = torch.nan
    moments = kernels().moments(x)
    assert moments.isnan().tolist() == [False, True, False] * 2 + [False]
    statistics = kernels().normalize(x, moments, weight, bias, None, 1e-5, epilogue=Epilogue("relu"))
    assert statistics[0].isnan().flatten(2).all(2).tolist() == [[False, True, False]] * 5


def test_masked_values_may_be_anything_and_others_not(on):
    on(check_masked_values_may_be_anything)


def check_masked_values_in_epilogues(activation, adds):
    """The input and the residual hold NaN where the mask and dy are 0, as far as backward reads them."""
    epilogue = Epilogue(activation, adds_residual=adds)
    x, residual, dy = (random("odd", torch.float32, seed) for seed in range(3))
    mask = masks(x)[2]
    dy = dy.masked_fill(mask == 0, 0)
    weight, bias = parameters(3)
    tensors = (x, reference.moments(x, mask), weight, bias, residual if adds else None, 1e-5)
    _, statistics, signs = reference.normalize(*tensors, epilogue=epilogue)
    hidden = [t.masked_fill(mask == 0, torch.nan) for t in (x, residual)]
    saved = Saved(hidden[0], signs, hidden[1] if epilogue.saves_residual else None)
    options = {"mask": mask, "epilogue": epilogue, "tolerance": 3e-6}
    sums = compare("reduce_grad", dy, saved, statistics, weight, bias, **options)[2]
    assert sums.isfinite().all()
    compare("grad_input", dy, saved, statistics, weight, bias, sums, **options)


@pytest.mark.parametrize("adds", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_masked_values_may_be_anything_in_each_epilogue(on, activation, adds):
    on(check_masked_values_in_epilogues, activation, adds)


def check_infinite_gradients(activation, adds):
    x, residual = random("odd", torch.float32), random("odd", torch.float32, 1)
    weight, bias = parameters(3)
    epilogue = Epilogue(activation, adds_residual=adds)
    tensors = (x, reference.moments(x), weight, bias, residual if adds else None, 1e-5)
    y, statistics, signs = reference.normalize(*tensors, epilogue=epilogue)
    dy = torch.where(y > 0, 1, torch.inf)
    arguments = (dy, Saved(x, signs), statistics, weight, bias)
    sums = compare("reduce_grad", *arguments, epilogue=epilogue, tolerance=1e-5)[2]
    assert sums.isfinite().all()
    compare("grad_input", *arguments, sums, epilogue=epilogue, tolerance=1e-5)


@pytest.mark.parametrize("adds", [False, True], ids=["alone", "residual"])
def test_an_infinite_gradient_stops_at_a_relu(on, adds):
    """0 times infinity would be no number."""
    on(check_infinite_gradients, "relu", adds)


def check_small_weights_first():
    """Each thread begins with values far from the others that hardly count, of ever larger weights."""
    x = torch.randn(8, 2, 512, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[:4] += 1e5
    mask = torch.ones(8, 1, 512, device=DEVICE)
    mask[:4] = 1e-9 * 2.0 ** torch.arange(4, device=DEVICE).view(4, 1, 1)
    with constants({"TILES_IN_ONE_RUN": 100}):
        expected = compare("moments", x, mask, tolerance=1e-5)
    shifted = x - x[:1, :, :1]  # the negative control: sums about the first value
    total = (mask * shifted).sum((0, 2))
    m2 = (mask * shifted.square()).sum((0, 2)) - total.square() / mask.sum()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(m2.double(), expected[2:4], rtol=1e-5, atol=0)


def test_weights_do_not_cost_digits(on):
    on(check_small_weights_first)


def check_axes_of_size_one():
    """(N, C, 1, 1) is contiguous and channels-last at once, whatever its strides. Nothing is copied."""
    x = torch.randn(6, 5, 1, 1, device=DEVICE)
    dy = torch.empty_strided((6, 5, 1, 1), (5, 1, 5, 5), device=DEVICE).normal_()
    assert dy.stride() != x.stride()
    statistics = reference.normalize(x, reference.moments(x), None, None, None, 1e-5)[1]
    assert kernels().Backward(dy, Saved(x), statistics, None, None).read[0] is dy
    compare("reduce_grad", dy, x, statistics, None, None, tolerance=1e-5)


def test_axes_of_size_one_are_not_copied(on):
    on(check_axes_of_size_one)


LARGEST = [(32, 256, 56, 56), (32, 64, 112, 112), (256, 64, 56, 56), (32, 2048, 7, 7), (2**22, 64), (64, 3, 224, 224)]


def check_divisions():
    from syncnorm.kernels.triton import plan

    for shape, last, dtype in itertools.product(LARGEST, (False, True), TOLERANCE):
        sums, maps = (plan._divide(torch.Size(shape), last, dtype, reduces, 132) for reduces in (True, False))
        assert sums.programs <= 264 or sums.blocks > 264
        assert sums.programs >= 100
        assert maps.programs <= 1056 or maps.blocks > 1056
    for shape, wide in (((1, 1, 2**31), True), ((1, 2, 2**31 + 16), True), ((2**31 - 1, 4), True), ((8, 2**28), False)):
        for reduces in (False, True):
            _, _, found, *_ = plan._divide(torch.Size(shape), False, torch.bfloat16, reduces, 132).constants
            assert found is wide


def test_all_programs_of_a_sum_run_at_once(on):
    """One more than fit would take as long as all the others together. And int64 is for large inputs alone."""
    on(check_divisions)


def check_counters_of_graphs():
    from syncnorm.kernels.triton import workspace

    workspace.prepare_for_graphs(-1)
    taken = [workspace.of_graph(-1, number) for number in (1, 3, 2, 7, 4, 5)]
    addresses = [t.data_ptr() for t in taken]
    base = min(addresses) % 16  # of the CPU's memory
    assert all(address % 16 == base for address in addresses)
    assert [after - before for before, after in itertools.pairwise(addresses)] == [16, 16, 16, 32, 16]
    last = workspace.of_graph(-1, workspace.OF_GRAPHS)  # more than are left
    assert last.data_ptr() not in addresses
    assert len(last) == workspace.OF_GRAPHS


def test_kernels_of_graphs_have_aligned_counters_of_their_own(on):
    """Triton would compile a kernel for other addresses, which it cannot during a capture."""
    on(check_counters_of_graphs)


def errors(ratio, begins_with_zeros):
    """Return the largest error of y, of torch's and of the kernels', for data of a mean/std against float64."""
    x = torch.randn(4, 2, 600, generator=torch.Generator().manual_seed(0)) + ratio
    if begins_with_zeros:  # what a shift taken from the first values would not survive
        x[:1] = 0
    x = x.to(DEVICE)
    mask = None if not begins_with_zeros else (torch.arange(4) > 0).view(4, 1, 1).to(DEVICE)
    valid = x if mask is None else x[1:]
    expected = F.batch_norm(valid.double().cpu(), None, None, training=True)
    with constants(SMALL):
        moments = kernels().moments(x, mask, stamp=STAMP)
        y = kernels().normalize(valid, moments, None, None, None, 1e-5, stamp=STAMP)[0]
    return [(result.cpu().double() - expected).abs().max().item() for result in (F.batch_norm(valid, *NONE), y)]


NONE = (None, None, None, None, True)


@pytest.mark.parametrize("begins_with_zeros", [False, True])
@pytest.mark.parametrize(("ratio", "bound"), [(0, 2e-6), (1e4, 2e-6), (1e6, 5e-4)])
def test_error_at_a_large_mean(on, ratio, bound, begins_with_zeros):
    of_torch, mine = on(errors, ratio, begins_with_zeros)
    assert mine < bound
    assert ratio == 0 or of_torch > bound


def errors_at(scale, name):
    """Return the errors of y and dx of values whose squares have no float32, with a mask and without it."""
    found = []
    for mask in masks(random(name, torch.float32))[:2]:
        x, dy = random(name, torch.float32) * scale, random(name, torch.float32, 1)
        exact = [t.detach().cpu().double().requires_grad_() for t in (x, dy)]
        with chosen("triton"):
            layer = syncnorm.SyncBatchNorm(x.shape[1], affine=False, device=DEVICE)
            y = layer(x.requires_grad_(), mask=mask)
            y.backward(dy)
        counted = torch.ones_like(exact[0]) if mask is None else mask.cpu().double().expand_as(exact[0])
        axes = [0, *range(2, x.dim())]
        mean = (exact[0] * counted).sum(axes, keepdim=True) / counted.sum(axes, keepdim=True)
        var = ((exact[0] - mean).square() * counted).sum(axes, keepdim=True) / counted.sum(axes, keepdim=True)
        expected = (exact[0] - mean) / var.sqrt()
        expected.backward(exact[1].detach())
        of_dx = (x.grad.cpu().double() - exact[0].grad).abs().max() / exact[0].grad.abs().max()
        found += [(y.detach().cpu().double() - expected).abs().max().item(), of_dx.item()]
    return found


@pytest.mark.parametrize("name", ["odd", "odd-channels-last"])
@pytest.mark.parametrize("scale", [1e19, 1e25])
def test_values_whose_squares_have_no_float32(on, scale, name):
    """The sums of F.batch_norm overflow: it gives zeros, which are wrong by more than 1."""
    assert max(on(errors_at, scale, name)) < 5e-6


def training_step(implementation):
    """Return y, gradients and buffers of two steps of a layer with all that it can do."""
    torch.manual_seed(0)
    layer = syncnorm.SyncBatchNorm(3, activation="relu", device=DEVICE)
    x = random("odd-channels-last", torch.float32).requires_grad_()
    residual = random("odd-channels-last", torch.float32, 1).requires_grad_()
    with chosen(implementation):
        for mask in masks(x)[:2]:
            y = layer(x, residual=residual, mask=None if mask is None else mask[:, 0].expand(5, 7, 9))
            y.backward(random("odd", torch.float32, 2))
    return [t.detach().cpu() for t in (y, x.grad, residual.grad, layer.weight.grad, layer.bias.grad, *layer.buffers())]


def test_training_step(on):
    for actual, expected in zip(on(training_step, "triton"), on(training_step, "reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_kernels_compile_for_a_gpu_that_is_not_here():
    """What the interpreter runs need not compile. Every kernel does, for each way through it, down to machine code."""
    code = f"""
    import sys
    sys.path[:0] = {[os.path.dirname(__file__), os.path.join(os.path.dirname(__file__), "helpers")]!r}
    from test_triton_kernels import compile_all
    print(*sorted(compile_all()))
    """
    compiled = run_python(code, TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1").split()
    assert compiled == ["grad_input_kernel", "moments_kernel", "normalize_kernel", "reduce_grad_kernel"]


def compile_all():
    """Call the kernels with a driver that compiles and does not launch; return their names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", 90, 32)
    answers = {"get_current_target": lambda: target, "get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
    triton.runtime.driver.set_active(mock.Mock(**answers))
    names = set()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        assert run(self, *args, grid=grid, warmup=True, **options).asm["cubin"]
        names.add(self.__name__)

    with mock.patch.object(JITFunction, "run", compile_only):
        for name, dtype, activation, adds, inplace in (
            ("odd", torch.float32, None, False, True),
            ("odd-channels-last", torch.float16, "relu", True, False),
            ("whole-bytes", torch.bfloat16, "relu", True, False),
            ("whole-bytes-channels-last", torch.bfloat16, "leaky_relu", True, False),
            ("long", torch.float64, "gelu_tanh", True, False),
        ):
            x = random(name, dtype)
            weight, bias = parameters(x.shape[1])
            epilogue = Epilogue(activation, inplace, adds)
            residual = x.clone() if adds else None
            momentum = None if inplace else 0.1
            stamp = STAMP if adds else None
            running = Running(weight.clone(), bias.clone(), torch.zeros((), dtype=torch.int64), momentum)
            with constants(SMALL if adds else {}):
                for mask in masks(x):
                    moments = kernels().moments(x, mask, stamp=stamp)
                    tensors = (x, moments, weight, bias, residual)
                    options = {"stamp": stamp, "epilogue": epilogue, "running": running}
                    _, statistics, signs = kernels().normalize(*tensors, 1e-5, **options)
                    saved = Saved(x, signs, residual if epilogue.saves_residual else None)
                    options = {"mask": mask, "epilogue": epilogue}
                    backward = kernels().Backward(x, saved, statistics, weight, bias, **options)
                    *_, sums = backward.reduce_grad(stamp=stamp)
                    backward.grad_input(sums, stamp=stamp)
    return names


def test_the_environment_chooses():
    code = """
    import os, sys
    import torch
    from syncnorm import kernels
    sys.modules["triton"] = None  # importing it raises ImportError
    os.environ["TRITON_INTERPRET"] = "1"  # else it has nothing for tensors on the CPU
    for os.environ["SYNCNORM_KERNELS"] in ("reference", "triton", "cuda"):
        kernels._implementation.cache_clear()
        try:
            print(kernels.select(torch.zeros(2)).__name__)
        except RuntimeError as error:
            print(error)
    del sys.modules["triton"]
    kernels._implementation.cache_clear()
    os.environ["SYNCNORM_KERNELS"] = "triton"
    print(kernels.select(torch.zeros(2)).__name__)
    """
    reference, missing, unknown, triton = run_python(code).splitlines()
    assert reference == "syncnorm.kernels.reference"
    assert "SYNCNORM_KERNELS=triton, but the triton kernels cannot be imported" in missing
    assert missing.endswith(": pip install triton")
    assert unknown == "expected SYNCNORM_KERNELS to be one of reference, cpu, triton, got cuda"
    assert triton == "syncnorm.kernels.triton"


def test_subclasses_and_compiled_code_get_the_reference():
    class Subclass(torch.Tensor):
        pass

    with chosen("triton"):
        assert syncnorm.kernels.select(torch.zeros(2).as_subclass(Subclass)) is reference
        with mock.patch("torch.compiler.is_dynamo_compiling", return_value=True):
            assert syncnorm.kernels.select(torch.zeros(2)) is reference


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: there is no CUDA device")


@needs_gpu
def test_cuda_tensors_get_triton():
    assert syncnorm.kernels.select(torch.zeros(2, device="cuda")).__name__ == "syncnorm.kernels.triton"


GIGABYTES = torch.cuda.get_device_properties(0).total_memory >> 30 if torch.cuda.is_available() else 0


@pytest.mark.skipif(GIGABYTES < 40, reason="NOT TESTED: there is no CUDA device with 40 GB of memory")
@pytest.mark.parametrize("shape", [(3, 2, 2**29 + 1), (2**29 + 3, 5)], ids=str)
def test_more_values_than_31_bits_count(shape):
    """Zeros but for the last of all values, in both orders of memory."""
    from syncnorm.kernels import triton

    x = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    last = (-1,) * len(shape)
    x[last] = 1
    channels = shape[1]
    n = x.numel() // channels
    moments = triton.moments(x)
    expected = torch.zeros(2 * channels + 1, dtype=torch.float64)
    expected[channels - 1], expected[2 * channels - 1], expected[2 * channels] = 1 / n, 1 - 1 / n, n
    torch.testing.assert_close(moments.cpu(), expected, rtol=1e-6, atol=0)
    y, statistics, _ = triton.normalize(x, moments, None, None, None, 1e-5)
    assert y[last].item() == pytest.approx(statistics[-2].item(), rel=1e-2)
    del y
    sums = triton.Backward(x, Saved(x), statistics, None, None).reduce_grad()[2]
    assert sums[:channels].tolist() == [0] * (channels - 1) + [1]
    dx = triton.Backward(x, Saved(x), statistics, None, None).grad_input(None)[0]
    assert dx[last].item() == pytest.approx(statistics[-2].item(), rel=1e-2)
