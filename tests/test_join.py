"""Ranks that run out of batches, held against one process on the samples that are present at each step, in float64."""

import contextlib
import functools
import threading

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm import DesyncError, SyncBatchNorm, testing
from syncnorm.communicators import uneven
from syncnorm.communicators.uneven import UnevenGroup
from syncnorm.testing import CountingCommunicator

COUNTS = {2: [(3, 3), (3, 1), (0, 2)], 4: [(2, 0, 3, 1), (1, 4, 4, 2)]}  # batches of each rank
MICROBATCHES = 2  # where gradients are accumulated


class Net(nn.Module):
    """A model with a layer that is called twice, and one that is called at every other step."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second, self.third = norm(3), norm(3), norm(3)
        self.linear, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x, step):
        x = self.first(self.linear(x)).tanh()
        x = self.first(self.linear(x)).tanh()
        x = self.second(self.linear(x)).sin() + (self.third(x) if step % 2 else 0)
        return self.head(x)


def net(norm):
    torch.manual_seed(0)
    return Net(norm).double()


def samples(step, rank, microbatch=0):
    generator = torch.Generator().manual_seed(100 * step + 10 * microbatch + rank)
    return torch.randn(2 + rank, 3, generator=generator, dtype=torch.float64) * (rank + 1) + rank


def loss_of(y):
    return y.sin().square().sum()


class Outcome:
    """What a rank has at the end: parameters, buffers and the loss of each of its steps."""

    def __init__(self, model, losses):
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.losses = losses


def train(counts, way, norm=SyncBatchNorm):
    """Train on this rank's batches."""
    group = syncnorm.communicator()
    model = net(norm)
    ddp = DistributedDataParallel(
        model,
        find_unused_parameters=True,
        broadcast_buffers=way != "no buffers",
    )
    if way.startswith("zero"):
        from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns that it uses torch.jit

        optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, lr=0.1)
    else:
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    context = {
        "zero": lambda: syncnorm.join(ddp, optimizer),
        "zero in Join": lambda: Join([syncnorm.join(ddp), ddp, optimizer]),
        "in Join": lambda: Join([syncnorm.join(ddp), ddp]),
        "plain": lambda: Join([ddp]),  # without the norms
        "by the number of ranks left": lambda: syncnorm.join(ddp, divide_by_initial_world_size=False),
    }.get(way, lambda: syncnorm.join(ddp))
    losses = []
    with context():
        for step in range(counts[group.rank]):
            optimizer.zero_grad()
            for microbatch in range(MICROBATCHES if way == "accumulated" else 1):
                last = microbatch == MICROBATCHES - 1
                with contextlib.nullcontext() if last or way != "accumulated" else ddp.no_sync():
                    loss = loss_of(ddp(samples(step, group.rank, microbatch), step))
                    loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if way == "evaluated":
                ddp.eval()
                with torch.no_grad():
                    ddp(samples(step, group.rank), step)
                ddp.train()
    assert "syncnorm.join" not in [thread.name for thread in threading.enumerate()]
    return Outcome(model, losses)


def in_one_process(counts, way):
    """Train on the samples of all ranks that are present at each step."""
    model = net(nn.BatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(max(counts)):
        present = [rank for rank, count in enumerate(counts) if count > step]
        optimizer.zero_grad()
        for microbatch in range(MICROBATCHES if way == "accumulated" else 1):
            loss = loss_of(model(torch.cat([samples(step, rank, microbatch) for rank in present]), step))
            ranks = len(present) if way == "by the number of ranks left" else len(counts)
            (loss / ranks).backward()
        optimizer.step()
        losses.append(loss.item())
    return Outcome(model, losses)


WAYS = [
    "ddp",
    "in Join",
    "zero",
    "zero in Join",
    "accumulated",
    "evaluated",
    "no buffers",
    "by the number of ranks left",
]


def train_all(cases):
    return [train(counts, way) for counts, way in cases]


def assert_matches(outcomes, counts, way):
    expected = in_one_process(counts, way)
    for rank, outcome in enumerate(outcomes):
        assert len(outcome.losses) == counts[rank]
        for name, tensor in outcome.tensors.items():
            message = f"{name} of rank {rank}, {counts}, {way}"
            torch.testing.assert_close(
                tensor, expected.tensors[name], rtol=1e-10, atol=1e-10, msg=lambda text, m=message: f"{m}: {text}"
            )
            if "running" in name:
                assert torch.equal(tensor, outcomes[0].tensors[name])
    for step, loss in enumerate(expected.losses):
        of_ranks = [outcome.losses[step] for outcome in outcomes if len(outcome.losses) > step]
        assert sum(of_ranks) == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("backend", ["gloo", "mpi"])
def test_ddp_trains_on_the_samples_that_are_there(backend, world_size):
    cases = [(counts, "ddp") for counts in COUNTS[world_size]]
    cases += [(COUNTS[world_size][-1], way) for way in WAYS[1:]]
    outcomes = testing.run_ranks(train_all, world_size, cases, backend=backend, timeout=120)
    for of_ranks, (counts, way) in zip(zip(*outcomes, strict=True), cases, strict=True):
        assert_matches(of_ranks, counts, way)


def test_plain_batch_norm_in_torch_s_join_does_not():
    """The negative control."""
    counts = (3, 1)
    outcomes = testing.run_ranks(functools.partial(train, norm=nn.BatchNorm1d), 2, counts, "plain")
    with pytest.raises(AssertionError):
        assert_matches(outcomes, counts, "plain")


def without_ddp(counts):
    """Return for each step the gradients on this rank, and at the end the buffers. The parameters stay."""
    group = syncnorm.communicator()
    model, outcomes = net(SyncBatchNorm), []
    with syncnorm.join(model):
        for step in range(counts[group.rank]):
            model.zero_grad()
            x = samples(step, group.rank).requires_grad_()
            loss_of(model(x, step)).backward()
            outcomes.append([x.grad, *(parameter.grad for parameter in model.parameters())])
            model.eval()(samples(step, group.rank), step)
            model.train()
    model(samples(9, group.rank), 9)  # all ranks go on together
    return outcomes, list(model.buffers())


@pytest.mark.parametrize(
    ("world_size", "counts"), [(2, (3, 3)), (2, (3, 1)), (2, (0, 2)), (2, (0, 0)), (4, (2, 0, 3, 1))], ids=str
)
def test_models_without_ddp(run, world_size, counts):
    outcomes = run(without_ddp, world_size, counts)
    model = net(nn.BatchNorm1d)
    for step in range(max(counts)):
        present = [rank for rank, count in enumerate(counts) if count > step]
        shards = [samples(step, rank) for rank in present]
        x = torch.cat(shards).requires_grad_()
        model.zero_grad()
        loss_of(model(x, step)).backward()
        of_ranks = [outcomes[rank][0][step] for rank in present]
        torch.testing.assert_close(torch.cat([grads[0] for grads in of_ranks]), x.grad, rtol=1e-10, atol=1e-10)
        for actual, parameter in zip(
            zip(*(grads[1:] for grads in of_ranks), strict=True), model.parameters(), strict=False
        ):
            if parameter.grad is not None:
                torch.testing.assert_close(sum(actual), parameter.grad, rtol=1e-10, atol=1e-10)
    model(torch.cat([samples(9, rank) for rank in range(world_size)]), 9)
    for _, buffers in outcomes:
        for buffer, expected, first in zip(buffers, model.buffers(), outcomes[0][1], strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-10, atol=1e-10)
            assert torch.equal(buffer, first)


def in_two_groups():
    """Layers of pairs of ranks and of all ranks in one model; the ranks of a pair run out at different times."""
    group = syncnorm.communicator()
    pair = syncnorm.new_subgroups(2)
    torch.manual_seed(0)
    layers = [SyncBatchNorm(3, process_group=pair), SyncBatchNorm(3), SyncBatchNorm(3, process_group=pair)]
    model = nn.Sequential(*layers).double()
    with syncnorm.join(model):
        for step in range((3, 1, 0, 2)[group.rank]):
            loss_of(model(samples(step, group.rank))).backward()
    after = [layer.process_group is kept for layer, kept in zip(layers, (pair, None, pair), strict=True)]
    return list(model.buffers()), after


@pytest.mark.parametrize("world_size", [4])
def test_layers_in_different_groups(run, world_size):
    outcomes = run(in_two_groups, world_size)
    for pair in ((0, 1), (2, 3)):
        for rank in pair:
            buffers, after = outcomes[rank]
            assert after == [True] * 3
            assert all(map(torch.equal, buffers, outcomes[pair[0]][0]))
            assert all(map(torch.equal, buffers[3:6], outcomes[0][0][3:6]))  # of the layer of all ranks
    assert [outcomes[rank][0][2].item() for rank in range(4)] == [3, 3, 2, 2]


def counted():
    """Return the collectives of one step in the block, of a layer that has compared its calls."""
    group = CountingCommunicator(syncnorm.communicator())
    layer = SyncBatchNorm(3, process_group=group)
    own = group.split(0)
    group._for_joins = uneven._Own(own, own)
    with syncnorm.join(layer):
        for _ in range(3):
            own.calls.clear()
            layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
            calls = list(own.calls)
    return calls


def test_a_collective_is_preceded_by_one_of_nine_numbers(run):
    for calls in run(counted, 2):
        assert calls == [("all_reduce", 72), ("all_reduce", 72), ("all_reduce", 72), ("all_reduce", 64)]


def diverging():
    """The ranks that have batches call different layers. One has none, and must know, too."""
    group = syncnorm.communicator()
    model = nn.ModuleList([SyncBatchNorm(3), SyncBatchNorm(3)])
    try:
        with syncnorm.join(model):
            for _ in range(3 if group.rank else 0):
                for layer in model:
                    layer(samples(0, group.rank))
            if group.rank:
                model[group.rank - 1](samples(0, group.rank))
    except DesyncError as error:
        return str(error)
    return None


@pytest.mark.parametrize("world_size", [3])
def test_ranks_that_diverge_raise_on_all_ranks(run, world_size):
    texts = run(diverging, world_size)
    assert len(set(texts)) == 1
    title, *ranks = texts[0].splitlines()
    assert title == "expected all ranks that have batches to be in the same call of the same layer, got"
    assert ranks[0] == "  rank 0: has no batches left"
    for rank in (1, 2):
        assert ranks[rank].startswith(f"  rank {rank}: all_reduce of (9,) of call 4 of SyncBatchNorm no. ")


def test_one_sample_on_the_last_rank_with_batches():
    with pytest.raises((ValueError, testing.RankError)) as raised:
        testing.run_ranks(raise_too_few, 2)
    assert "Expected more than 1 value per channel when training" in str(raised.value)


def raise_too_few():
    group = syncnorm.communicator()
    layer = SyncBatchNorm(3)
    with syncnorm.join(layer):
        for step in range(1 + group.rank):
            layer(torch.randn(2 - step, 3))


def after_an_exception():
    """All ranks leave the block by an exception of their own, and enter it again."""
    group = syncnorm.communicator()
    layer = SyncBatchNorm(3).double()
    for end in (True, False):
        with contextlib.suppress(ZeroDivisionError), syncnorm.join(layer):
            for step in range(2 if end else 1 + group.rank):
                layer(samples(step, group.rank))
            if end:
                raise ZeroDivisionError
    layer(samples(9, group.rank))
    syncnorm.assert_running_stats_agree(layer)
    return layer.num_batches_tracked.item()


def test_an_exception_on_all_ranks_leaves_no_trace(run):
    assert run(after_an_exception, 2) == [5, 5]


def refusals():
    """Return what is refused, each before anything is exchanged."""
    texts = []
    layer = SyncBatchNorm(3)
    lazy = nn.Sequential(syncnorm.LazySyncBatchNorm())
    compiled = torch.compile(layer, backend="eager")
    ddp = DistributedDataParallel(layer)

    class FSDPModule(nn.Module):
        pass

    with syncnorm.join(layer):
        for attempt in (
            lambda: syncnorm.join(layer).__enter__(),
            lambda: syncnorm.join(lazy).__enter__(),
            lambda: syncnorm.join(compiled).__enter__(),
            lambda: syncnorm.join(FSDPModule()).__enter__(),
            lambda: syncnorm.join(SyncBatchNorm(3)).__enter__(),
            lambda: syncnorm.join(layer, divide_by_initial_worldsize=False),
        ):
            try:
                attempt()
            except (ValueError, RuntimeError, TypeError) as error:
                texts.append(f"{type(error).__name__}: {error}")
    try:
        Join([ddp, syncnorm.join(ddp)])
    except ValueError as error:
        texts.append(f"{type(error).__name__}: {error}")
    layer(torch.randn(4, 3))
    with syncnorm.join(ddp, enable=False), Join([syncnorm.join(layer), ddp], enable=False):
        assert not isinstance(layer._group.resolve(), UnevenGroup)
        layer(torch.randn(4, 3))
    return texts


def test_what_cannot_work_is_refused():
    for texts in testing.run_ranks(refusals, 2):
        assert [text.split(", got")[0] for text in texts] == [
            "RuntimeError: expected a model that is not in syncnorm.join",
            "ValueError: expected layers that have parameters in syncnorm.join",
            "RuntimeError: expected a model that is not compiled in syncnorm.join",
            "ValueError: expected a model without FSDPModule in syncnorm.join",
            "RuntimeError: expected one syncnorm.join at a time for the layers of a process group",
            "TypeError: join.__init__() got an unexpected keyword argument 'divide_by_initial_worldsize'",
            "ValueError: expected syncnorm.join(model) as the first joinable of a Join",
        ]


def early(with_ddp):
    group = syncnorm.communicator()
    model = DistributedDataParallel(SyncBatchNorm(3)) if with_ddp else SyncBatchNorm(3)
    try:
        with syncnorm.join(model, throw_on_early_termination=True):
            for _ in range(1 + group.rank):
                model(torch.randn(4, 3)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return None


def test_ranks_can_be_told_to_end_together():
    for text in testing.run_ranks(early, 2, True):
        assert "exhaust" in text  # torch's words
    for text in testing.run_ranks(early, 2, False):
        assert text.startswith(
            "expected as many batches on all ranks with throw_on_early_termination=True, got none on 1"
        )


def one_rank_starts_anew():
    """Rank 1 leaves a block by an exception and enters the next one, while rank 0 is still in the first."""
    group = syncnorm.communicator()
    layer = SyncBatchNorm(3)
    layer(torch.randn(2, 3))
    try:
        if group.rank == 1:
            with contextlib.suppress(ZeroDivisionError), syncnorm.join(layer):
                raise ZeroDivisionError
        with syncnorm.join(layer):
            for _ in range(group.rank):
                layer(torch.randn(2, 3))
    except DesyncError as error:
        return str(error)
    return None


def test_a_rank_in_another_block_is_found_out():
    """Else its batches would count in an earlier block. Rank 1 is told so, or finds that rank 0 has ended."""
    with pytest.raises((DesyncError, testing.RankError)):
        raise_texts(testing.run_ranks(one_rank_starts_anew, 2, timeout=20))


def raise_texts(texts):
    assert "expected all ranks to be in the same block of syncnorm.join, got rank 0 in block 1" in texts[0]
    raise DesyncError(texts[0])


@pytest.mark.parametrize("ranks", [2, 91, 113, 127, 257, 1000, 8192])
def test_equal_numbers_of_many_ranks_are_found_equal(ranks):
    """The squares of their sums have no float64, whose rounding must not matter."""
    for value in (2**20 - 1, 2**20 - 3, 699_050, 1):
        total, total_of_squares = float(ranks * value), float(ranks * value**2)
        assert uneven._agree(ranks, int(total), int(total_of_squares))
        assert not uneven._agree(ranks, int(total) + 1, int(total_of_squares) + 2 * value + 1)


def timeouts():
    from datetime import timedelta

    from syncnorm.communicators.sharing import timeout_of

    world = syncnorm.communicator()
    given = syncnorm.communicator(torch.distributed.new_group(timeout=timedelta(seconds=7)))
    return [timeout_of(group._current_group()) for group in (given, given.split(0), world, world.split(world.rank))]


def test_groups_have_the_timeout_of_the_group_that_they_are_made_from():
    for given, part, world, own in testing.run_ranks(timeouts, 2):
        assert given == part == 7
        assert world == own


def in_torch_s_own_join():
    """Average by the number of ranks that are left, which DistributedDataParallel reads from a Work."""
    group = syncnorm.communicator()
    ddp = DistributedDataParallel(nn.Linear(3, 1, bias=False))
    with Join([ddp], divide_by_initial_world_size=False):
        for step in range(1 + group.rank):
            ddp.zero_grad()
            ddp(torch.full((1, 3), 1.0 + group.rank)).backward()
            if step == 1:
                return_value = ddp.module.weight.grad.tolist()
    return return_value if group.rank else None


def test_torch_s_own_join_runs_on_mpi():
    assert testing.run_ranks(in_torch_s_own_join, 2, backend="mpi") == [None, [[2.0, 2.0, 2.0]]]


def test_alone_it_does_nothing():
    model = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3))
    with syncnorm.join(model) as joined:
        model(torch.randn(4, 3)).sum().backward()
    assert joined.join_device == torch.device("cpu")
    assert model[1].num_batches_tracked == 1
