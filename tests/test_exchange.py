"""Messages of different layers, calls, directions and dtypes are never taken for one sum, on any rank."""

import re

import pytest
import torch
from reports import check_report
from torch import nn

import syncnorm
from syncnorm import DesyncError, SyncBatchNorm
from syncnorm.communicators import ALONE
from syncnorm.exchange import NUMBERS, Exchange, Layer
from syncnorm.job.desync import current_location
from syncnorm.testing import CountingCommunicator, TimedCommunicator

X = torch.linspace(-1, 1, 4 * 6 * 3).view(4, 6, 3)


class Unlabelled(CountingCommunicator):
    """The ranks of a group, whose communicator is not told what a message belongs to: the kernels' check is alone."""

    takes_labels = False


class Unchecked(Unlabelled):
    """The negative control: the stamps of the sums are those that this rank expects, as if none had been sent."""

    def all_reduce(self, tensor, label=None):
        own = tensor[-2:].clone()
        return torch.cat([super().all_reduce(tensor)[:-2], self.size * own])


def states(model):
    return [tensor.clone() for tensor in model.state_dict().values()]


def error_of(train, kind, *arguments):
    """Return the text of the DesyncError that train(rank, group, ...) raises, and whether the ranks can go on."""
    group = kind() if kind else syncnorm.communicator()
    try:
        train(group.rank, group, *arguments)
    except DesyncError as error:
        return str(error), syncnorm.communicator().all_reduce(torch.ones(2)).tolist() == [group.size] * 2
    return None, True


def layers_of(group, count=2, **options):
    return nn.ModuleList(SyncBatchNorm(6, process_group=group, **options) for _ in range(count))


def swapped_layers(rank, group, **options):
    """After the calls that compare layers, rank 1 calls two layers of equal C in the other order."""
    model = layers_of(group, **options)
    for step in range(4):
        kept = states(model)
        x = X.clone()
        for layer in model if rank == 0 or step < 3 else reversed(model):
            try:
                layer(x)
            except DesyncError:
                assert step == 3
                assert all(map(torch.equal, states(model), kept)), "a buffer moved"
                assert torch.equal(x, X), "the input was overwritten"
                raise


def swapped_layers_in_place(rank, group):
    swapped_layers(rank, group, inplace=True)


def swapped_backward(rank, group):
    """Rank 1 goes back through the layers in the other order."""
    model = layers_of(group)
    for step in range(4):
        xs = [X.clone().requires_grad_() for _ in model]
        losses = [layer(x).square().sum() for layer, x in zip(model, xs, strict=True)]
        for loss, x in list(zip(losses, xs, strict=True))[:: 1 if rank == 0 or step < 3 else -1]:
            try:
                loss.backward()
            except DesyncError:
                assert step == 3
                assert x.grad is None
                raise


def skipped_call(rank, group):
    """Rank 1 gets a bad sample, catches the error and skips the step."""
    layer = SyncBatchNorm(6, process_group=group)
    for step in range(5 + (rank == 1)):
        x = X[:, :5] if (rank, step) == (1, 3) else X
        try:
            layer(x)
        except ValueError:
            assert (rank, step) == (1, 3)


def another_dtype(rank, group):
    layer = SyncBatchNorm(6, process_group=group)
    for step in range(4):
        layer(X.bfloat16() if (rank, step) == (1, 3) else X)


def swapped_split_norms(rank, group, norm=syncnorm.RMSNorm):
    layers = [norm(3, process_group=group) for _ in range(2)]
    for step in range(4):
        for layer in layers if rank == 0 or step < 3 else layers[::-1]:
            layer(X)


def swapped_layer_norms(rank, group):
    swapped_split_norms(rank, group, syncnorm.LayerNorm)


def skipped_group_norm(rank, group):
    layer = syncnorm.GroupNorm(2, 6, process_group=group)
    for step in range(5 + (rank == 1)):
        try:
            layer(X[:, :4] if (rank, step) == (1, 3) else X)
        except ValueError:
            assert (rank, step) == (1, 3)


def other_functions(rank, group):
    """Of layer_norm and group_norm, whose messages have the same size."""
    functional = syncnorm.functional
    if rank == 0:
        functional.layer_norm(X[0], (3,), process_group=group)
    else:
        functional.group_norm(X[:3], 2, process_group=group)


def other_directions(rank, group):
    """The forward of 3 channels about zero has as many values as the backward of 4."""
    functional = syncnorm.functional
    x = torch.randn(4, 5, requires_grad=True)
    y = functional.rms_norm(x, (5,), process_group=group)
    if rank == 0:
        y.sum().backward()
    else:
        functional.rms_norm(x[:3], (5,), process_group=group)


NUMBERED = r"SyncBatchNorm no\. \d+, called outside a model"
CASES = [  # what rank 0 was in, and rank 1
    (swapped_layers, rf"forward of call 4 of {NUMBERED}", rf"forward of call 4 of {NUMBERED}"),
    (swapped_layers_in_place, rf"forward of call 4 of {NUMBERED}", rf"forward of call 4 of {NUMBERED}"),
    (swapped_backward, rf"backward of call 4 of {NUMBERED}", rf"backward of call 4 of {NUMBERED}"),
    (skipped_call, rf"forward of call 4 of {NUMBERED}", rf"forward of call 5 of {NUMBERED}"),
    (another_dtype, "call 4 of .*: C = 6, float32", "call 4 of .*: C = 6, bfloat16"),
    (swapped_split_norms, r"call 4 of RMSNorm no\. \d+.*: R = 24, float32", r"call 4 of RMSNorm .*: R = 24, float32"),
    (swapped_layer_norms, r"call 4 of LayerNorm no\. \d+.*: R = 24", r"call 4 of LayerNorm no\. \d+.*: R = 24"),
    (skipped_group_norm, r"call 4 of GroupNorm .*: R = 8", r"call 5 of GroupNorm .*: R = 8"),
    (other_functions, r"forward of layer_norm \(called .*: R = 6", r"forward of group_norm \(called .*: R = 6"),
    (other_directions, r"backward of rms_norm .*: R = 4, ", r"forward of rms_norm .*: R = 3, "),
]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("train", "of_rank_0", "of_rank_1"), CASES, ids=[train.__name__ for train, *_ in CASES])
def test_every_rank_reports_who_was_where(run, world_size, train, of_rank_0, of_rank_1):
    found = run(error_of, world_size, train, Unlabelled)
    check_report(
        found, "expected all ranks to be in the same call of the same layer, got", world_size, of_rank_0, of_rank_1
    )


@pytest.mark.parametrize("train", [train for train, *_ in CASES], ids=lambda train: train.__name__)
def test_every_rank_reports_it_by_the_usual_communicator(run, train):
    """Which may know more than the kernels: the memory that the ranks of a host share compares the labels itself."""
    for text, _ in run(error_of, 2, train, None):
        assert "  rank 0: " in text
        assert "  rank 1: " in text


@pytest.mark.parametrize("train", [train for train, *_ in CASES], ids=lambda train: train.__name__)
def test_without_stamps_nobody_would_know(run, train):
    """The negative control: the same trainings end silently, with wrong sums."""
    assert run(error_of, 2, train, Unchecked) == [(None, True)] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_a_layer_differ(dtype):
    """In all calls that may meet, in both directions; those of other layers, dtypes and C by chance alone."""
    calls = range(1, 2**18 + 1)
    layer = Layer("", "SyncBatchNorm no. 7: layer1.0.bn2 of ResNet")
    exchange = Exchange(ALONE, layer).on(X.to(dtype), 6)
    exchange.size = 2
    found = set()
    for exchange.call in calls:
        for backward in (False, True):
            found.add(exchange.stamp(backward=backward).number)
    assert len(found) == 2 * len(calls)
    assert min(found) >= 0
    assert max(found) < NUMBERS
    exchange.call = 5
    own = exchange.stamp(backward=False).number
    others = [Exchange(ALONE, Layer("", str(i)), 5).on(X.to(dtype), 6) for i in range(2000)]
    others += [Exchange(ALONE, layer, 5).on(X.to(dtype), i) for i in range(7, 2000)]
    for other in others:
        other.size = 2
    assert sum(other.stamp(backward=False).number == own for other in others) < 3
    assert len({other.stamp(backward=False).number for other in others}) > 0.99 * len(others)


class Wrapper(nn.Module):
    """A rank's own program around the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model[0](x)


def stamps_of_three_steps(wrap):
    """Return the last two values of each message of a model that rank 1 wraps, beside other layers."""
    group = syncnorm.communicator()
    sent = []

    class Recording(CountingCommunicator):
        def all_reduce(self, tensor, label=None):
            sent.append((tensor[-2:].tolist(), label and label.number, label and label.call, label and label.backward))
            return super().all_reduce(tensor, label)

    if group.rank == 1:
        SyncBatchNorm(6)
    layer = SyncBatchNorm(6, process_group=Recording(group))
    model = nn.Sequential(layer)
    if wrap and group.rank == 1:
        model = Wrapper(model)
    for _ in range(3):
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
    return sent


@pytest.mark.parametrize("wrap", [False, True])
def test_ranks_that_wrap_a_model_differently_send_the_same(run, wrap):
    first, second = run(stamps_of_three_steps, 2, wrap)
    assert first == second
    assert len({number for (number, _), *_ in first}) == 6
    for (number, square), *label in first:
        assert square == number**2
        assert label[0] in (number, None)
    assert [label[1:] for _, *label in first] in (
        [[call, backward] for call in (1, 2, 3) for backward in (False, True)],
        [[None, None]] * 6,  # MPI's communicator takes no labels
    )


def calls_without_a_message(kind):
    """Only rank 1 calls its layer where nothing is sent: the ranks stay in the same call."""
    group = kind()
    layer = SyncBatchNorm(6, process_group=group)
    for step in range(4):
        layer(X)
        if group.rank == 1:
            layer.eval()(X)
            layer.train()
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                layer(mode.from_tensor(X))
            if step == 2:
                with pytest.raises(RuntimeError, match="expected a model without all-reduces to trace"):
                    torch.jit.trace(layer, X)
    return layer.num_batches_tracked.item()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # as the package does, but pytest undoes it
def test_calls_that_send_nothing_are_not_counted(run):
    assert run(calls_without_a_message, 2, Unlabelled) == [4, 4]


def another_group():
    """A layer that has made calls alone with one group makes its first one with another."""
    group = syncnorm.communicator()
    own, all_of_them = group.split(group.rank), CountingCommunicator(group)
    layer = SyncBatchNorm(6, process_group=own)
    for _ in range(group.rank):
        layer(X)
    layer.process_group = all_of_them
    layer(X)
    return layer.process_group.calls


def test_another_group_starts_with_its_first_call(run):
    assert run(another_group, 2) == [[("all_reduce", 8 * 15)]] * 2


def elsewhere():
    """Rank 1 sums a tensor of its own, which has the size of rank 0's message."""
    group = Unlabelled()
    layer = SyncBatchNorm(6, process_group=group)
    for _ in range(3):
        layer(X)
    if group.rank == 1:
        group.all_reduce(torch.ones(15, dtype=torch.float64))
        return group.all_gather(torch.zeros(512, dtype=torch.uint8))
    kept = states(layer)
    with pytest.raises(DesyncError) as caught:
        layer(X)
    assert all(map(torch.equal, states(layer), kept))
    return str(caught.value)


def test_a_rank_in_a_collective_of_its_own(run):
    text, _ = run(elsewhere, 2)
    title, first, second = text.splitlines()
    assert title == "expected all ranks to be in the same call of the same layer, got"
    assert re.fullmatch(rf"  rank 0: forward of call 4 of {NUMBERED}: C = 6, float32, input \(4, 6, 3\)", first)
    assert second == "  rank 1: in a different collective"


class Silent(Unlabelled):
    """A group whose other ranks do not answer."""

    @property
    def uncounted(self):
        return self

    def all_gather(self, tensor):
        if sum(call.name == "all_gather" for call in self.calls) == 4:  # two layers have compared two calls each
            raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")
        return super().all_gather(tensor)


def unanswered():
    group = syncnorm.communicator()
    try:
        swapped_layers(group.rank, Silent())
    except DesyncError as error:
        return str(error)


def test_ranks_that_do_not_answer(run):
    for rank, text in enumerate(run(unanswered, 2)):
        assert re.fullmatch(
            "expected all ranks to be in the same call of the same layer, got forward of call 4 of "
            rf"{NUMBERED}: C = 6, float32, input \(4, 6, 3\) on rank {rank}, while the other ranks were elsewhere and "
            "did not say where: Timed out waiting 1000ms for recv operation to complete",
            text,
        )


def one_value():
    """One sample of one value on rank 0, whose message meets that of another layer."""
    group = Unlabelled()
    model = layers_of(group)
    for step in range(4):
        x = torch.ones(1 if step == 3 and group.rank == 0 else 4, 6)
        for layer in model if group.rank == 0 or step < 3 else reversed(model):
            try:
                layer(x)
            except DesyncError:
                return step


def test_a_mismatch_comes_before_what_the_sums_say(run):
    assert run(one_value, 2) == [3, 3]


class Locating(CountingCommunicator):
    """A group that notes where this rank is during an all-reduce."""

    def __init__(self, kind):
        super().__init__()
        self.places = []
        self.takes = kind is not Unlabelled

    def all_reduce(self, tensor, label=None):
        self.places.append(current_location())
        return super().all_reduce(tensor, label)


def places(kind):
    group = Locating(kind)
    model = nn.Sequential(SyncBatchNorm(6, process_group=group))
    model(X.clone().requires_grad_()).sum().backward()
    return group.places


def test_the_location_of_a_rank_names_the_layer(run):
    name = r"of call 1 of 0 of Sequential \(SyncBatchNorm no\. \d+\)"
    for forward, backward in run(places, 2, Unlabelled):
        assert re.match(rf"in all_reduce of 15 float64 {name}, forward, at ", forward)
        assert re.match(rf"in all_reduce of 14 float64 {name}, backward, at ", backward)


@pytest.mark.parametrize("kind", [CountingCommunicator, TimedCommunicator])
def test_wrappers_take_labels_if_the_wrapped_communicator_does(kind):
    class Taking:
        rank, size, takes_labels, seen = 0, 2, True, ()

        def all_reduce(self, tensor, label=None):
            self.seen += (label,)
            return tensor

        broadcast = all_gather = all_gather_object = barrier = all_reduce

    taking = Taking()
    assert kind(kind(taking)).takes_labels
    assert not kind(ALONE).takes_labels
    kind(kind(taking)).all_reduce(torch.ones(1), "label")
    assert taking.seen == ("label",)
    assert torch.equal(kind(ALONE).all_reduce(torch.ones(1), "label"), torch.ones(1))


def compiled():
    """Train a compiled layer with inputs of many sizes. Rank 1 stops to compile it before rank 0 does."""
    torch._dynamo.config.recompile_limit = 3 - syncnorm.communicator().rank
    layer = SyncBatchNorm(6)
    call = torch.compile(layer, backend="eager", dynamic=False)
    grads = []
    for size in (4, 4, 5, 6, 7, 8, 4):
        x = X[:1].repeat(size, 1, 1).requires_grad_()
        call(x).sin().sum().backward()
        grads.append(x.grad)
    return grads, layer.state_dict()


def test_a_rank_may_stop_compiling_before_another():
    """A compiled call sends no stamp, and neither does any call after that."""
    [(expected, state)] = syncnorm.testing.run_ranks(compiled, 1)  # here it would stop later tests from compiling
    for grads, of_rank in syncnorm.testing.run_ranks(compiled, 2):
        for actual, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        assert of_rank["num_batches_tracked"] == state["num_batches_tracked"] == 7
        torch.testing.assert_close(of_rank["running_mean"], state["running_mean"])
