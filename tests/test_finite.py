"""NaN and Inf on one rank: an error on all ranks with the layer and the rank, before the statistics take them in."""

import contextlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm import NonFiniteError, SyncBatchNorm, SyncNormError, testing

BAD = [float("nan"), float("inf"), float("-inf")]


class Net(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norms = nn.Linear(3, 3), nn.ModuleList(SyncBatchNorm(3, **arguments) for _ in range(2))

    def forward(self, x, addition=0.0):
        return self.norms[1](self.norms[0](self.linear(x)).tanh() + addition)


def attempts(way, value):
    """Return the error of a step with a bad value on one rank, and how far the training came afterwards."""
    group = syncnorm.communicator()
    model = Net(check_finite=way == "check_finite")
    block = syncnorm.debug() if way == "debug" else contextlib.nullcontext()
    errors = []
    with block:
        for step in range(4):
            x, addition = torch.randn(2, 3), torch.zeros(2, 3)
            if step == 2 and group.rank == group.size - 1:
                addition[1, 2] = value
            before = [buffer.clone() for buffer in model.norms[1].buffers()]
            try:
                model(x, addition).sin().sum().backward()
            except NonFiniteError as error:
                errors.append((step, str(error)))
                assert all(map(torch.equal, before, model.norms[1].buffers()))
    return errors, model.norms[1].num_batches_tracked.item(), model.norms[1].running_var.isfinite().all().item()


@pytest.mark.parametrize("way", ["debug", "check_finite"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_layer_and_rank_are_named_on_all_ranks_and_training_goes_on(run, world_size, way):
    for value in BAD:
        for errors, steps, finite in run(attempts, world_size, way, value):
            ((step, text),) = errors
            assert (step, steps, finite) == (2, 3, True)
            title, place = text.splitlines()
            assert title == "expected finite inputs on all ranks, got NaN or Inf in"
            assert re.fullmatch(
                rf"  rank {world_size - 1}: forward of (call 3 of )?norms\.1 of Net \(SyncBatchNorm no\. \d+\): "
                r"C = 3, float32, input \(2, 3\): 1 value in channel 2",
                place,
            )


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_it_the_statistics_are_as_torch_s(run, world_size):
    """The negative control."""
    for errors, steps, finite in run(attempts, world_size, "none", BAD[0]):
        assert (errors, steps, finite) == ([], 4, False)
    layer = nn.BatchNorm1d(3)
    layer(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, BAD[0]]]))
    assert not layer.running_var.isfinite().all()


def several_ranks():
    rank = syncnorm.communicator().rank
    layer = SyncBatchNorm(12, check_finite=True)
    x = torch.randn(4, 12, 2)
    if rank != 1:
        x[:, : 3 * rank + 1] = BAD[rank % 2]
    with pytest.raises(NonFiniteError) as raised:
        layer(x)
    return str(raised.value)


@pytest.mark.parametrize("world_size", [4])
def test_all_ranks_that_have_some_are_named(run, world_size):
    for text in run(several_ranks, world_size):
        ranks = re.findall(r"rank (\d): .*: (.*)", text)
        assert ranks == [
            ("0", "8 values in channel 0"),
            ("2", "56 values in channels 0, 1, 2, 3, 4, 5, 6"),
            ("3", "80 values in channels 0, 1, 2, 3, 4, 5, 6, 7, ..."),
        ]


def in_backward():
    group = syncnorm.communicator()
    layer = SyncBatchNorm(3, process_group=group)
    x = torch.randn(4, 3, requires_grad=True)
    grad_output = torch.ones(4, 3)
    if group.rank == 0:
        grad_output[0, 1] = float("nan")
    texts = []
    with syncnorm.debug():
        y = layer(x)
        with pytest.raises(NonFiniteError) as raised:
            y.backward(grad_output, retain_graph=True)
        texts.append(str(raised.value))
        y.backward(torch.ones(4, 3))  # the ranks are still together
    layer(x).backward(grad_output)
    return texts, x.grad.isfinite().all().item()


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_checked_in_debug(run, world_size):
    for (text,), finite in run(in_backward, world_size):
        assert "expected finite gradients on all ranks, got NaN or Inf in\n  rank 0: backward of " in text
        assert text.endswith(": 1 value in channel 1")
        assert not finite


def collectives(debug):
    group = testing.CountingCommunicator(syncnorm.communicator())
    layer = SyncBatchNorm(3, process_group=group)
    with syncnorm.debug() if debug else contextlib.nullcontext():
        layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    return group.calls


def test_while_all_is_well_it_sends_nothing(run):
    assert run(collectives, 2, True) == run(collectives, 2, False)


def under_ddp():
    """Skip a step with a bad input, and train on."""
    rank = syncnorm.communicator().rank
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    skipped = 0
    for step in range(5):
        x = torch.randn(2, 3)
        if step == 2 and rank == 1:
            x[0, 0] = float("inf")
        optimizer.zero_grad()
        try:
            with syncnorm.debug():
                model(x).sin().sum().backward()
        except NonFiniteError:
            skipped += 1
            continue
        optimizer.step()
    syncnorm.assert_running_stats_agree(model)
    return skipped, [tensor.detach() for tensor in model.state_dict().values()]


def test_a_step_can_be_skipped_under_ddp():
    outcomes = testing.run_ranks(under_ddp, 2)
    for skipped, tensors in outcomes:
        assert skipped == 1
        assert all(tensor.isfinite().all() for tensor in tensors)
        assert all(map(torch.equal, tensors, outcomes[0][1]))


def in_join():
    rank = syncnorm.communicator().rank
    layer = SyncBatchNorm(3, check_finite=True)
    texts = []
    with syncnorm.join(layer):
        for step in range((0, 2, 2)[rank]):
            x = torch.randn(2, 3)
            if (rank, step) == (2, 0):
                x[0, 0] = float("nan")
            try:
                layer(x)
            except NonFiniteError as error:
                texts.append(str(error))
    return texts, layer.num_batches_tracked.item()


@pytest.mark.parametrize("world_size", [3])
def test_ranks_without_batches_do_not_get_into_the_way(run, world_size):
    for rank, (texts, steps) in enumerate(run(in_join, world_size)):
        assert steps == 1
        assert [re.findall(r"rank (\d)", text) for text in texts] == ([["2"]] if rank else [])


def test_masked_positions_may_hold_anything():
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)
    x[0, :, 1], mask[0, 1] = float("nan"), False
    SyncBatchNorm(3, check_finite=True)(x, mask=mask)
    with pytest.raises(NonFiniteError, match=r"rank 0: .*3 values in channels 0, 1, 2"):
        SyncBatchNorm(3, check_finite=True)(x)


def test_squares_beyond_float64_are_named():
    x = torch.tensor([[1e200], [-1e200]], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="values whose squares have no float64 in channel 0"):
        SyncBatchNorm(1, check_finite=True, dtype=torch.float64)(x)


@syncnorm.debug()
def decorated(layer, x):
    return layer(x)


def test_it_is_a_decorator_and_can_be_nested():
    layer, x = SyncBatchNorm(3), torch.full((2, 3), float("nan"))
    with pytest.raises(NonFiniteError):
        decorated(layer, x)
    with syncnorm.debug():
        with syncnorm.debug():
            pass
        with pytest.raises(NonFiniteError):
            layer(x)
    layer(x)
    assert issubclass(NonFiniteError, SyncNormError)


def test_copies_and_representation_tell_it():
    layer = SyncBatchNorm(3, check_finite=True)
    assert "check_finite=True" in repr(layer)
    assert "check_finite" not in repr(SyncBatchNorm(3))
    with pytest.raises(TypeError, match="check_finite"):
        SyncBatchNorm(3, check_finite=1)
    lazy = syncnorm.LazySyncBatchNorm(check_finite=True)
    with pytest.raises(NonFiniteError):
        lazy(torch.full((2, 3), float("nan")))


PROGRAM = """
import torch, syncnorm
layer = syncnorm.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
layer(torch.full((2, 3), float("nan")))
"""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("1", r"NonFiniteError: .*\n  rank 0: forward of .*0 of Sequential .*: 6 values in channels 0, 1, 2"),
        ("0", None),
        ("yes", "ValueError: expected SYNCNORM_DEBUG to be 0 or 1, got 'yes'"),
    ],
)
def test_the_environment_variable(value, text):
    job = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**__import__("os").environ, "SYNCNORM_DEBUG": value},
    )
    assert (job.returncode == 0) == (text is None)
    assert text is None or re.search(text, job.stderr)
