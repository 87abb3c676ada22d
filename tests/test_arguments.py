"""Bad input: an exception that says what was expected and what came, no collective, nothing changed."""

import re

import pytest
import torch
from fakes import Unreachable

import syncnorm
from syncnorm import SyncBatchNorm
from syncnorm.functional import sync_batch_norm
from syncnorm.testing import CountingCommunicator, run_ranks

INPUTS = [
    (torch.zeros(4, 5), ValueError, "expected an input of 3 channels, (N, 3, *), to match running_mean, got (4, 5)"),
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
    ("counter", "error", "message"),
    [
        (
            torch.zeros((), device="meta"),
            RuntimeError,
            "expected num_batches_tracked on the input's device cpu, got meta",
        ),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"expected a num_batches_tracked of shape \(\), got \(2,\)"),
    ],
)
def test_counters(counter, error, message):
    buffers = torch.zeros(3), torch.ones(3)
    with pytest.raises(error, match=message):
        sync_batch_norm(
            torch.zeros(4, 3), *buffers, training=True, num_batches_tracked=counter, process_group=Unreachable()
        )


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
        ({"bias": torch.ones(4)}, r"expected an input of 4 channels, \(N, 4, \*\), to match bias, got \(4, 3\)"),
        ({"bias": torch.ones(3, 1)}, r"expected a bias of shape \(3,\), got \(3, 1\)"),
        ({"eps": 0.0}, "expected a positive eps in training, got 0.0"),
        ({"eps": -1.0}, "expected a positive eps in training, got -1.0"),
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.0, -1e-9])
def test_eps_is_refused_where_torch_refuses_it(eps, training):
    arguments = torch.randn(4, 3), torch.zeros(3), torch.ones(3), None, None, training, 0.1, eps
    outcomes = []
    for function in (torch.nn.functional.batch_norm, sync_batch_norm):
        try:
            outcomes.append(function(*arguments))
        except ValueError as error:
            assert "eps" in str(error)  # noqa: PT017
            outcomes.append(None)
    expected, actual = outcomes
    assert (actual is None) == (eps < 0 or (training and eps == 0))
    if eps != 0 or training:  # which PyTorch before 2.12 refuses in eval, too
        assert (expected is None) == (actual is None)
    if actual is not None and expected is not None:
        torch.testing.assert_close(actual, expected)


def test_an_eps_that_the_user_has_set_is_checked_too():
    layer = SyncBatchNorm(3, eps=-1.0, process_group=Unreachable()).eval()
    with pytest.raises(ValueError, match=re.escape("expected an eps of at least 0, got -1.0")):
        layer(torch.zeros(4, 3))


WITHOUT_VALUES = [(0,), (0, 0), (3, 0), (0, 3), (3, 0, 2), (3, 3, 0)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", WITHOUT_VALUES)
def test_inputs_without_values_are_what_torch_takes(shape, training):
    """Torch's own tests have (0,), as an input without channels."""
    channels = shape[1] if len(shape) > 1 else 0
    results = []
    for function in (torch.nn.functional.batch_norm, sync_batch_norm):
        x = torch.zeros(shape, requires_grad=True)
        y = function(x, torch.zeros(channels), torch.ones(channels), training=training)
        y.sum().backward()
        results.append((y.shape, y.dtype, x.grad.shape))
    assert results[0] == results[1] == (shape, torch.float32, shape)


def test_batches_without_channels_are_counted():
    """As torch counts them; what no batch of ours moves for is one without positions."""
    for kind in (torch.nn.BatchNorm1d, SyncBatchNorm):
        layer = kind(0, affine=False)
        layer(torch.zeros(3, 0))
        assert layer.num_batches_tracked == 1
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            layer(torch.zeros(1, 0))


def test_a_layer_with_channels_refuses_an_input_of_no_axis_for_them():
    with pytest.raises(ValueError, match=re.escape("expected an input of at least 2 axes (N, C, *), got shape (0,)")):
        SyncBatchNorm(3, process_group=Unreachable())(torch.zeros(0))


DENSE = torch.zeros(4, 3, 5)
NOT_DENSE = {
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(3, 5), torch.zeros(2, 5)], layout=torch.jagged),
    "nested-strided": lambda: torch.nested.nested_tensor([torch.zeros(3, 5), torch.zeros(2, 5)]),
    "sparse": lambda: DENSE.to_sparse(),
    "sparse-csr": lambda: DENSE.to_sparse_csr(),
    "mkldnn": lambda: DENSE.to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:.*in (prototype|beta):UserWarning")
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense(kind):
    """One line each, before any collective; layer and RMS normalization take the nested ones that torch's take."""
    x = NOT_DENSE[kind]()
    way_out = "pad it with torch.nested.to_padded_tensor" if "nested" in kind else "call its to_dense()"
    group = Unreachable()

    def message(name):
        return rf"^expected a dense {name}, got a (nested )?tensor of layout {x.layout}: {re.escape(way_out)}$"

    for layer in (
        SyncBatchNorm(3, process_group=group),
        SyncBatchNorm(3).eval(),
        syncnorm.LazySyncBatchNorm(process_group=group),
        syncnorm.GroupNorm(3, 3),
        syncnorm.LayerNorm(5, process_group=group),
        syncnorm.RMSNorm(5, process_group=group),
        syncnorm.RMSNorm(5, eps_outside=True),
    ):
        with pytest.raises(TypeError, match=message("input")):
            layer(x)
    layer = SyncBatchNorm(3, process_group=group)
    with pytest.raises(TypeError, match=message("residual")):
        layer(DENSE, residual=x)
    with pytest.raises(TypeError, match=message("mask")):
        layer(DENSE, mask=x)
    for name, buffer in SyncBatchNorm(3).named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer)
    for layer, torchs in (
        (syncnorm.LayerNorm(5), torch.nn.LayerNorm(5)),
        (syncnorm.RMSNorm(5), torch.nn.RMSNorm(5, eps=1e-6)),
    ):
        if kind == "nested":
            torch.testing.assert_close(layer(x).values(), torchs(x).values())
        else:
            with pytest.raises(TypeError, match=message("input")):
                layer(x)


def bad_input_on_every_rank():
    group = CountingCommunicator(syncnorm.communicator())
    layer = SyncBatchNorm(3, process_group=group)
    with pytest.raises(ValueError, match="expected an input of 3 channels"):
        layer(torch.zeros(4, 5))
    assert group.calls == []
    layer(torch.randn(4, 3))  # the group still works
    return len(group.calls)


def test_a_group_goes_on_after_bad_input():
    assert run_ranks(bad_input_on_every_rank, 2) == [1, 1]
