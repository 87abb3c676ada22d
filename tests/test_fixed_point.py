"""Sums in fixed point: exact, with the same bits from both implementations, and the arithmetic around them."""

import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from interpreter import run_python

from syncnorm.kernels import Saved, Statistics, fixed_point, reference
from syncnorm.reproducible.double_double import DoubleDouble
from syncnorm.reproducible.exponents import MOST_RANKS, exponents_of, levels_in, levels_of, slots_of

HERE = Path(__file__).parent
SHAPES = [
    (4, 3, 5, 7),
    (5, 13),
    (3, 20, 4, 4),
    (6, 8, 33, 31),
    (2, 5, 3),
    (700, 3),
    (1, 1, 40000),
    (3000, 6),
    (0, 4, 3),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MASKS = [None, "bool", "float"]


def drawn(shape, dtype, *, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = 3 * torch.rand((1, shape[1], *[1] * (len(shape) - 2)), generator=generator, dtype=torch.float64)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread + 1).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def drawn_mask(shape, kind):
    weights = torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(9))
    return {None: None, "bool": weights > 0.3, "float": weights * (weights > 0.3)}[kind]


def exponents(largest):
    return torch.frexp(largest.clamp_min(1e-300))[1].long()


def statistics_of(channels, mean=0.5):
    generator = torch.Generator().manual_seed(3)
    return Statistics(torch.rand(2 * channels + 1, generator=generator, dtype=torch.float64) + mean)


def passes(implementation, shape, dtype, *, channels_last=False, mask=None):
    """Return what the four passes of an implementation give."""
    x, dy = (drawn(shape, dtype, channels_last=channels_last, seed=seed) for seed in range(2))
    mask = drawn_mask(shape, mask)
    largest = implementation.largest_input(x, mask)
    sums = implementation.sums_of_input(x, mask, exponents(largest), torch.tensor(0))
    backward = backward_of(implementation, dy, x, statistics_of(shape[1]), mask)
    largest_gradient = implementation.largest_gradient(backward)
    return largest, sums, largest_gradient, implementation.sums_of_gradient(backward, exponents(largest_gradient))


def backward_of(implementation, dy, x, statistics, mask=None):
    kind = reference.Backward if implementation is fixed_point else implementation.Backward
    return kind(dy, Saved(x), statistics, None, None, mask=mask)


def check_bits():
    """Compare all bits of the compiled kernels with those of torch's operations."""
    from syncnorm.kernels.cpu import ISA
    from syncnorm.kernels.cpu import fixed_point as compiled

    for shape in SHAPES:
        for dtype in DTYPES:
            for mask in MASKS:
                for channels_last in (False, True) if len(shape) > 2 else (False,):
                    options = {"channels_last": channels_last, "mask": mask}
                    results = (passes(passes_of, shape, dtype, **options) for passes_of in (compiled, fixed_point))
                    assert all(map(torch.equal, *results)), (shape, dtype, options)
    print(ISA)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_each_instruction_set_has_the_bits_of_the_reference(isa, threads):
    pytest.importorskip("syncnorm.kernels.cpu", reason="COMPILED KERNELS NOT TESTED: no compiler at installation")
    from syncnorm.kernels.cpu import binding

    sets = ["base", "avx2", "avx512"]
    if isa not in sets[: sets.index(binding._library.syncnorm_isa().decode()) + 1]:
        pytest.skip(f"NOT TESTED: this CPU has no {isa}")
    code = f"""
    import sys
    sys.path[:0] = {[str(HERE), str(HERE / "helpers")]!r}
    import torch
    torch.set_num_threads({threads})
    from test_fixed_point import check_bits
    check_bits()
    """
    assert run_python(code, SYNCNORM_ISA=isa).split() == [isa]


def number_of(digits):
    """Return the sum that digits stand for, (levels, 2), as a fraction, in units of 2^E."""
    parts = [
        (int(high) * 2**36 + int(low)) * Fraction(1, 2 ** (51 * (level + 1)))
        for level, (high, low) in enumerate(digits)
    ]
    return sum(parts, Fraction(0))


def implementations():
    names = [("torch", fixed_point)]
    cpu = pytest.importorskip("syncnorm.kernels.cpu", reason="COMPILED KERNELS NOT TESTED: no compiler")
    return [*names, ("compiled", cpu.fixed_point)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_exact_where_the_values_are_near_each_other(dtype):
    """All bits of Σ x and Σ x², whose difference is the variance; one more value changes them."""
    x = (torch.rand(37, 1, 11, dtype=torch.float64) + 1).to(dtype)
    exact = [sum(Fraction(v) ** power for v in x.double().flatten().tolist()) for power in (1, 2)]
    exponent = torch.tensor([1])
    for _, passes_of in implementations():
        digits = passes_of.sums_of_input(x, None, exponent, torch.tensor(0))[:, :, 0].tolist()
        levels = fixed_point.digits_of(dtype)[0]
        assert number_of(digits[:levels]) * 2 == exact[0]
        error = abs(number_of(digits[levels:]) * 4 - exact[1])
        assert error <= (exact[1] * Fraction(1, 2**105) if dtype == torch.float64 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_limits_of_the_dtype(dtype):
    """The largest and smallest numbers, and both together: nothing overflows, nothing wraps."""
    info = torch.finfo(dtype)
    for values in (
        [info.max, -info.max],
        [info.max, info.tiny],
        [info.tiny, info.tiny / 4],
        [1.0, info.tiny],
        [0.0, 0.0],
    ):
        x = torch.tensor(values * 40, dtype=dtype).view(-1, 1)
        exponent, is_finite = exponents_of(levels_of(fixed_point.largest_input(x), dtype), dtype)
        assert is_finite.all()
        results = [passes_of.sums_of_input(x, None, exponent, torch.tensor(0)) for _, passes_of in implementations()]
        assert torch.equal(*results)
        scaled = Fraction(2) ** int(exponent)
        total = number_of(results[0][: fixed_point.digits_of(dtype)[0], :, 0].tolist()) * scaled
        exact = 40 * sum(map(Fraction, values))
        assert abs(total - exact) <= len(x) * scaled * Fraction(1, 2**51)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_seen(dtype, bad):
    x, dy = drawn((3, 4, 50), dtype), drawn((3, 4, 50), dtype, seed=1)
    x[1, 2, 7] = bad
    for _, passes_of in implementations():
        assert passes_of.largest_input(x).isinf().tolist() == [False, False, True, False]
        for grad, given in ((dy, x), (x, dy)):
            largest = passes_of.largest_gradient(backward_of(passes_of, grad, given, statistics_of(4)))
            assert largest[1].isinf().tolist() == [False, False, True, False]
        masked = torch.ones(3, 1, 50)
        masked[1, 0, 7] = 0
        assert passes_of.largest_input(x, masked).isfinite().all()


@pytest.mark.parametrize(
    ("of_x", "of_dy"),
    [
        (1e-30, 1e-30),
        (1e-20, 1e-20),
        (1e15, 1e15),
        (1e30, 1e30),
        (1e-38, 1.0),
        (1e-38, 1e20),
        (1e-42, 1e30),
        (1.0, 1e-42),
    ],
)
def test_products_that_float32_cannot_hold(of_x, of_dy):
    """Their bound is computed in double. A bound that is too small would let digits wrap."""
    x, dy = (drawn((5, 3, 40), torch.float32, seed=seed) * scale for seed, scale in enumerate((of_x, of_dy)))
    statistics = Statistics(torch.tensor([0.3 * of_x] * 3 + [1.0] * 4, dtype=torch.float64))
    products = (dy.double() * (x.double() - 0.3 * of_x)).abs().amax((0, 2))
    for _, passes_of in implementations():
        largest = passes_of.largest_gradient(backward_of(passes_of, dy, x, statistics))
        assert (largest[1] >= products).all()
        assert (largest[1] <= products * 4.001).all()


def test_the_bound_holds_where_float32_cannot_hold_the_mean():
    """There x - mean may be less than what the mean loses in float32."""
    x = torch.tensor([1e6, 1e6, 1e6 + 0.0625]).view(3, 1)
    dy = torch.tensor([1e5, -1e5, 1e-5]).view(3, 1)
    mean = x.double().mean()
    statistics = Statistics(torch.stack([mean, torch.ones_like(mean), torch.full_like(mean, 3)]))
    for _, passes_of in implementations():
        largest = passes_of.largest_gradient(backward_of(passes_of, dy, x, statistics))[1]
        assert largest >= (dy.double() * (x.double() - mean)).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 16, MOST_RANKS])
def test_the_sum_of_the_slots_gives_the_largest_exponent(dtype, ranks):
    generator = torch.Generator().manual_seed(ranks)
    spread = 250 if dtype == torch.float64 else 38
    values = 10 ** ((torch.rand(ranks, 60, generator=generator, dtype=torch.float64) * 2 - 1) * spread)
    values[torch.rand(ranks, 60, generator=generator) < 0.3] = 0  # of ranks without values
    values[:, :3] = values[:1, :3]  # the same on all ranks
    values[-1, 3] = torch.inf  # which stands for NaN, too
    levels = levels_of(values.flatten(), dtype).view_as(values)
    slots = torch.stack([slots_of(level) for level in levels])
    exponent, is_finite = exponents_of(levels_in(slots.sum(0)), dtype)
    assert torch.equal(levels_in(slots.sum(0)), levels_in(slots.flip(0).sum(0)))
    assert torch.equal(levels_in(slots.sum(0)), levels.amax(0))
    assert is_finite.tolist() == [True] * 3 + [False] + [True] * 56
    largest = values.amax(0)[is_finite]
    bound = exponent[is_finite].double().exp2()
    assert (largest < bound).all()
    least = 2.0**-400 if dtype == torch.float64 else 0
    precise = largest > least
    assert (largest[precise] * 2 ** (3 if dtype == torch.float64 else 1) >= bound[precise]).all()


def test_more_ranks_than_the_slots_have_room_for_would_be_wrong():
    """The negative control of the limit that `reproducible` checks."""
    slots = slots_of(torch.tensor([300]))
    assert levels_in(slots * MOST_RANKS) == 300
    assert levels_in(slots * (MOST_RANKS + 1)) != 300


def test_numbers_of_106_bits():
    draw = random.Random(0)
    for _ in range(200):
        a, b, c, d = (draw.uniform(-1, 1) * 2.0 ** draw.randint(-30, 30) for _ in range(4))
        one, other = (
            DoubleDouble.sum(*(torch.tensor([v], dtype=torch.float64) for v in pair)) for pair in ((a, b), (c, d))
        )
        exact = [Fraction(a) + Fraction(b), Fraction(c) + Fraction(d)]
        assert [fraction_of(one), fraction_of(other)] == exact
        near(one.plus(other), sum(exact), abs(exact[0]) + abs(exact[1]))
        near(one.minus(other), exact[0] - exact[1], abs(exact[0]) + abs(exact[1]))
        near(one.times(other), exact[0] * exact[1])
        near(one.over(other.high), exact[0] / Fraction(other.high.item()))
        assert fraction_of(DoubleDouble.product(one.high, other.high)) == Fraction(one.high.item()) * Fraction(
            other.high.item()
        )


def fraction_of(number):
    return Fraction(number.high.item()) + Fraction(number.low.item())


def near(number, exact, unit=None):
    assert abs(fraction_of(number) - exact) <= abs(exact if unit is None else unit) * Fraction(1, 2**100)
