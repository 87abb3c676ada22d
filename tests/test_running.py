"""The update rule of the running statistics."""

import pytest
import torch

from syncnorm import running
from syncnorm.kernels import cpu, reference
from syncnorm.moments import Moments


@pytest.fixture(params=[reference, cpu], ids=["reference", "cpu"])
def update(request):
    """Return what updates the buffers with a batch x, (N, C)."""

    def update(mean, var, count, x, momentum):
        moved, moments = running.to_move(mean, var, count, momentum), Moments.of(x)
        request.param.normalize(x, moments.values, None, None, None, 1e-5, running=moved)

    return update


def buffers(dtype=torch.float32):
    return torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype), torch.tensor(0)


def test_momentum_weighs_the_batch(update):
    mean, var, count = buffers()
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    update(mean, var, count, x, 0.25)
    torch.testing.assert_close(mean, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(var, torch.tensor([0.75 + 0.25 * 2, 0.75 + 0.25 * 8]))
    assert count == 1


def test_no_values_move_nothing(update):
    for momentum in (0.1, None):
        mean, var, count = buffers()
        update(mean, var, count, torch.empty(0, 2), momentum)
        assert torch.equal(mean, torch.zeros(2))
        assert torch.equal(var, torch.ones(2))
        assert count == 0


def test_half_precision_buffers_do_not_overflow(update):
    mean, var, count = buffers(torch.float16)
    update(mean, var, count, torch.randn(200_000, 2), 0.1)  # the count is beyond float16
    assert mean.isfinite().all()
    assert var.isfinite().all()


def test_without_a_counter(update):
    mean, var, _ = buffers()
    update(mean, var, None, torch.tensor([[1.0, 2.0], [3.0, 6.0]]), 0.25)
    torch.testing.assert_close(mean, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(var, torch.tensor([0.75 + 0.25 * 2, 0.75 + 0.25 * 8]))


def test_one_value_moves_the_mean(update):
    mean, var, count = buffers()
    update(mean, var, count, torch.tensor([[4.0, 8.0]]), 0.25)
    assert mean.tolist() == [1.0, 2.0]
    assert var.tolist() == [0.75, 0.75]
    assert count == 1


def test_no_values_leave_infinite_statistics_as_they_are(update):
    mean, var, count = torch.tensor([float("inf"), 1.0]), torch.ones(2), torch.tensor(0)
    update(mean, var, count, torch.empty(0, 2), 0.1)
    assert mean.tolist() == [float("inf"), 1.0]


def test_the_rule_is_computed_in_float64(update):
    """2**24 + 5 is no float32: rounded first it would be 2**24 + 4, of which 0.7 lies nearer to 2 than to 4."""
    mean, var, count = torch.full((2,), 2.0**24), torch.ones(2), torch.tensor(0)
    update(mean, var, count, torch.full((4, 2), 2.0**24 + 5, dtype=torch.float64), 0.7)
    assert mean.tolist() == [2.0**24 + 4] * 2  # 3.5 more, rounded to what float32 has
