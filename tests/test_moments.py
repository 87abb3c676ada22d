"""Moments: exact whatever the mean, and the same from any split."""

import pytest
import torch

from syncnorm.kernels import Stamp, halves, reference
from syncnorm.moments import Moments

STAMP = Stamp(0, 1)  # of no message
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def merged(parts):
    moments = [Moments.of(part, stamp=STAMP) for part in parts]
    return moments[0].with_sums(torch.stack([m.summands for m in moments]).sum(0))


def mean(moments):
    return halves(moments.raw)[0]


def m2(moments):
    return halves(moments.raw)[1]


def variance(moments, correction=0):
    return m2(moments) / reference.or_one(moments.count - correction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 5), (4, 3, 5, 6), (2, 3, 4, 3, 2)])
def test_moments_of_a_tensor(dtype, offset, shape):
    x = (torch.randn(shape, dtype=torch.float64) + offset).to(dtype)
    moments = Moments.of(x)
    columns = x.double().movedim(1, 0).flatten(1)
    assert moments.values.dtype == torch.float64
    assert moments.count == columns.shape[1]
    scale = max(1.0, columns.std().item())
    torch.testing.assert_close(mean(moments), columns.mean(1), rtol=0, atol=1e-7 * scale)
    torch.testing.assert_close(variance(moments), columns.var(1, correction=0), rtol=5e-7, atol=0)
    torch.testing.assert_close(variance(moments, 1), columns.var(1), rtol=5e-7, atol=0)


@pytest.mark.parametrize(("offset", "rtol"), [(0.0, 1e-14), (1e3, 1e-8), (1e4, 1e-7), (1e6, 1e-3)])
def test_any_split_has_the_same_moments(offset, rtol):
    """The variance loses the digits of mean² on the wire: 4e-8 at mean/std = 1e4, 2.5e-4 at 1e6, and no more."""
    x = torch.randn(64, 3, 10, dtype=torch.float64) + offset
    whole = Moments.of(x)
    for sizes in ([64], [40, 24], [63, 0, 1], [1] * 64):
        moments = merged(x.split(sizes))
        assert moments.count == whole.count
        torch.testing.assert_close(mean(moments), mean(whole), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(m2(moments), m2(whole), rtol=rtol, atol=0)


def test_the_textbook_formula_fails_the_same_assertion():
    """The negative control: E[x²] - E[x]² in float32, as others do."""
    x = torch.randn(64, 3, 10) + 1e4
    textbook = x.square().mean((0, 2)) - x.mean((0, 2)).square()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(textbook.double(), variance(Moments.of(x)), rtol=1e-2, atol=0)


def test_no_values():
    moments = Moments.of(torch.empty(0, 3, 4))
    assert moments.count == 0
    for value in (mean(moments), m2(moments), variance(moments), variance(moments, 1)):
        assert torch.equal(value, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(Moments.of(torch.empty(0, 3, 4), stamp=STAMP).values, torch.zeros(9, dtype=torch.float64))


def test_equal_values_have_no_variance():
    split = merged([torch.full((5, 2), 0.1), torch.full((3, 2), 0.1)])
    torch.testing.assert_close(m2(split), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-16)
    assert torch.equal(m2(Moments.of(torch.full((5, 2), 1e6))), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_stays_one(bad):
    x = torch.ones(4, 2)
    x[1, 0] = bad
    moments = merged([x, torch.ones(3, 2)])
    assert variance(moments).isfinite().tolist() == [False, True]


def test_rounding_never_makes_a_variance_negative():
    """float64 data whose spread is lost in the digits of its mean."""
    for exponent in range(3, 9):
        for _ in range(50):
            shards = [10.0**exponent + 1e-3 * torch.randn(n, 4, dtype=torch.float64) for n in (5, 3, 7)]
            assert (m2(merged(shards)) >= 0).all()


def test_one_value_has_no_unbiased_variance():
    assert torch.equal(variance(Moments.of(torch.randn(1, 3)), 1), torch.zeros(3, dtype=torch.float64))
