"""The update rule of the running statistics."""

import torch

from syncnorm import running
from syncnorm.moments import Moments


def buffers(dtype=torch.float32):
    return torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype), torch.tensor(0)


def test_momentum_weighs_the_batch():
    mean, var, count = buffers()
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    running.update(mean, var, count, Moments.of(x), 0.25)
    torch.testing.assert_close(mean, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(var, torch.tensor([0.75 + 0.25 * 2, 0.75 + 0.25 * 8]))
    assert count == 1


def test_no_values_move_nothing():
    for momentum in (0.1, None):
        mean, var, count = buffers()
        running.update(mean, var, count, Moments.of(torch.empty(0, 2)), momentum)
        assert torch.equal(mean, torch.zeros(2))
        assert torch.equal(var, torch.ones(2))
        assert count == 0


def test_half_precision_buffers_do_not_overflow():
    mean, var, count = buffers(torch.float16)
    running.update(mean, var, count, Moments.of(torch.randn(200_000, 2)), 0.1)  # the count is beyond float16
    assert mean.isfinite().all()
    assert var.isfinite().all()


def test_without_a_counter():
    mean, var, _ = buffers()
    running.update(mean, var, None, Moments.of(torch.tensor([[1.0, 2.0], [3.0, 6.0]])), 0.25)
    torch.testing.assert_close(mean, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(var, torch.tensor([0.75 + 0.25 * 2, 0.75 + 0.25 * 8]))


def test_one_value_moves_the_mean():
    mean, var, count = buffers()
    running.update(mean, var, count, Moments.of(torch.tensor([[4.0, 8.0]])), 0.25)
    assert mean.tolist() == [1.0, 2.0]
    assert var.tolist() == [0.75, 0.75]
    assert count == 1


def test_no_values_leave_infinite_statistics_as_they_are():
    mean, var, count = torch.tensor([float("inf"), 1.0]), torch.ones(2), torch.tensor(0)
    running.update(mean, var, count, Moments.of(torch.empty(0, 2)), 0.1)
    assert mean.tolist() == [float("inf"), 1.0]


def test_the_rule_is_computed_in_float64():
    """2**24 + 5 is no float32: rounded first it would be 2**24 + 4, of which 0.7 lies nearer to 2 than to 4."""
    mean, var, count = torch.full((2,), 2.0**24), torch.ones(2), torch.tensor(0)
    running.update(mean, var, count, Moments.of(torch.full((4, 2), 2.0**24 + 5, dtype=torch.float64)), 0.7)
    assert mean.tolist() == [2.0**24 + 4] * 2  # 3.5 more, rounded to what float32 has
