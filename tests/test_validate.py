"""Bad input: an exception that says what was expected and what came, no collective, nothing changed."""

import re

import pytest
import torch

from syncnorm import SyncBatchNorm
from syncnorm.functional import sync_batch_norm
from syncnorm.testing import CountingCommunicator, run_ranks


class Unreachable:
    """A group of two whose collectives fail the test."""

    rank, size = 0, 2

    def all_reduce(self, tensor):
        raise AssertionError("a collective was entered")

    broadcast = all_gather = all_gather_object = barrier = all_reduce


INPUTS = [
    (torch.zeros(4, 5), ValueError, "expected an input of 3 channels, (N, 3, *) as running_mean has it, got (4, 5)"),
    (torch.zeros(4, 2, 3, 3), ValueError, "expected an input of 3 channels, (N, 3, *)"),
    (torch.zeros(3), ValueError, "expected an input of at least 2 axes (N, C, *), got shape (3,)"),
    (torch.zeros(()), ValueError, "expected an input of at least 2 axes (N, C, *), got shape ()"),
    (torch.zeros(4, 3, dtype=torch.int64), TypeError, "expected a floating-point input, got torch.int64"),
    (torch.zeros(4, 3, dtype=torch.bool), TypeError, "expected a floating-point input, got torch.bool"),
    (torch.zeros(4, 3, dtype=torch.complex64), TypeError, "expected a floating-point input, got torch.complex64"),
    (
        torch.zeros(4, 3, device="meta"),
        RuntimeError,
        "expected the parameters and buffers on the input's device meta, got running_mean on cpu",
    ),
]


@pytest.mark.parametrize(("x", "error", "message"), INPUTS)
@pytest.mark.parametrize("training", [True, False])
def test_inputs(x, error, message, training):
    layer = SyncBatchNorm(3, process_group=Unreachable()).train(training)
    with pytest.raises(error, match=re.escape(message)):
        layer(x)
    for name, buffer in SyncBatchNorm(3).named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer)


def test_parameters_on_another_device():
    layer = SyncBatchNorm(3, process_group=Unreachable(), track_running_stats=False, device="meta")
    with pytest.raises(RuntimeError, match="input's device cpu, got weight on meta"):
        layer(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"running_mean": torch.zeros(3)}, "expected running_mean and running_var together"),
        ({"running_var": torch.zeros(3)}, "expected running_mean and running_var together"),
        ({"training": False}, "expected running_mean and running_var outside training, got None"),
        (
            {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "momentum": None},
            "expected num_batches_tracked with momentum=None",
        ),
        ({"weight": torch.ones(1)}, "expected an input of 1 channels"),
        ({"bias": torch.ones(4)}, r"expected an input of 4 channels, \(N, 4, \*\) as bias has it, got \(4, 3\)"),
        ({"bias": torch.ones(3, 1)}, r"expected a bias of shape \(3,\), got \(3, 1\)"),
        ({"eps": 0.0}, "expected a positive eps in training, got 0.0"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, message):
    arguments = {"running_mean": None, "running_var": None, "training": True, **arguments}
    with pytest.raises(ValueError, match=message):
        sync_batch_norm(torch.zeros(4, 3), process_group=Unreachable(), **arguments)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="expected a tensor as input, got list"):
        SyncBatchNorm(3)([1.0, 2.0, 3.0])


def test_integer_buffers():
    with pytest.raises(TypeError, match=r"expected a floating-point running_mean, got torch\.int64"):
        sync_batch_norm(torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64), torch.ones(3), training=True)


def bad_input_on_every_rank():
    import syncnorm

    group = CountingCommunicator(syncnorm.communicator())
    layer = SyncBatchNorm(3, process_group=group)
    with pytest.raises(ValueError, match="expected an input of 3 channels"):
        layer(torch.zeros(4, 5))
    assert group.calls == []
    layer(torch.randn(4, 3))  # the group still works
    return len(group.calls)


def test_a_group_goes_on_after_bad_input():
    assert run_ranks(bad_input_on_every_rank, 2) == [1, 1]
