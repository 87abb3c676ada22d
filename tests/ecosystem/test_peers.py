"""Synchronized BatchNorm of other packages, held against one process on the whole batch by `verify`."""

import pytest
from torch import nn

from syncnorm.testing import verify
from syncnorm.testing.whole_batch import random_batches

BATCHES = random_batches((3, 10, 10), 12, 3)


class Shifted(nn.Module):
    def forward(self, x):
        return x + 1000


def fairscale_norm(channels):
    from fairscale.experimental.nn import SyncBatchNorm

    return SyncBatchNorm(channels)


def of_fairscale():
    return nn.Sequential(nn.Conv2d(3, 8, 3), fairscale_norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def of_fairscale_with_a_large_mean():
    return nn.Sequential(Shifted(), fairscale_norm(3), nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("model", "split", "reason"),
    [
        (of_fairscale, "even", None),
        (of_fairscale, "empty", "Layer 1 (SyncBatchNorm) gives NaN on rank"),
        (of_fairscale_with_a_large_mean, "even", "Layer 1 (SyncBatchNorm) loses the digits of the variance"),
    ],
)
def test_fairscale(model, split, reason):
    report = verify(model, BATCHES, [2], splits=[split], convert=False)
    assert report.passed == (reason is None), report.summary()
    assert reason is None or reason in report.summary()
