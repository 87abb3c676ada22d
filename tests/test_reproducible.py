"""Norms with reproducible=True: the same bits for any division of the batch over ranks and threads.

Bits are compared with those of one process on the whole batch, errors with a float64 oracle. Upstream gradients are
random. The negative control is the default mode, whose bits depend on the division.
"""

import copy
import io
import itertools
import os
import random
from dataclasses import dataclass, field

import pytest
import torch
from implementation import chosen
from torch import nn

import syncnorm
from syncnorm import DesyncError, NonFiniteError
from syncnorm.communicators import ALONE
from syncnorm.testing import CountingCommunicator, run_ranks

WORLD_SIZES = [1, 2, 3, 4, 8]
SAMPLES = 29
DTYPES = [torch.float32, torch.float64]


@dataclass(frozen=True, eq=False)
class Batch:
    """A whole batch and the layer that it goes through; `parts` divides it."""

    channels: int
    trailing: tuple = ()
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    channels_last: bool = False
    mask: str | None = None  # "bool" or "float"
    residual: bool = False
    layer: dict = field(default_factory=dict)

    def tensors(self):
        """Return x, dy, residual and mask."""
        generator = torch.Generator().manual_seed(SAMPLES + self.channels)
        shape = (SAMPLES, self.channels, *self.trailing)
        spread = torch.rand(1, self.channels, *[1] * len(self.trailing), generator=generator).double() + 0.1
        x, dy, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        x = x * spread + self.mean
        weights = torch.rand((SAMPLES, 1, *self.trailing), generator=generator)
        mask = {None: None, "bool": weights > 0.3, "float": weights * (weights > 0.3)}[self.mask]
        tensors = [t.to(self.dtype) for t in (x, dy, residual)]
        if self.channels_last:
            tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
        return *tensors, mask

    def parts(self, world_size, seed):
        """Return the samples of each rank: any number of them, none too, in any order."""
        draw = random.Random(seed)
        samples = list(range(SAMPLES))
        draw.shuffle(samples)
        cuts = sorted(draw.choices(range(SAMPLES + 1), k=world_size - 1))
        return [samples[start:end] for start, end in itertools.pairwise([0, *cuts, SAMPLES])]


BATCHES = [
    Batch(3),
    Batch(5, (6, 7)),
    Batch(4, (3, 3), mean=1e3),  # small planes
    Batch(7, (33, 31), mean=-2.0),
    Batch(20, (5, 5), channels_last=True),
    Batch(6, (40,), dtype=torch.bfloat16),
    Batch(6, (4, 5, 3), dtype=torch.float16),
    Batch(4, (9, 9), dtype=torch.float64, mean=1e6),
    Batch(4, (6, 6), dtype=torch.float64, channels_last=True),
    Batch(5, (8, 8), mask="bool"),
    Batch(5, (8, 8), mask="float", channels_last=True),
    Batch(3, (12,), mask="float", dtype=torch.float64),
    Batch(4, (6, 6), layer={"activation": "relu"}),
    Batch(4, (6, 6), residual=True, layer={"activation": "silu"}),
    Batch(4, (6, 6), residual=True, layer={"activation": "leaky_relu"}, channels_last=True),
    Batch(4, (6, 6), layer={"activation": "leaky_relu", "inplace": True}),
    Batch(4, (6, 6), layer={"momentum": None, "affine": False}),
]


def train(batch, samples, *, reproducible=True, threads=1, group=None, compiled=False):
    """Return what training on these samples of a batch gives: y and dx of the samples, and the running statistics."""
    torch.set_num_threads(threads)
    x, dy, residual, mask = batch.tensors()
    torch.manual_seed(1)
    layer = syncnorm.SyncBatchNorm(batch.channels, process_group=group, reproducible=reproducible, **batch.layer)
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias)
    layer = layer.double() if batch.dtype == torch.float64 else layer
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    memory_format = torch.channels_last if batch.channels_last else torch.contiguous_format

    def pick(tensor):
        return tensor[samples].contiguous(memory_format=memory_format)

    leaf = pick(x).requires_grad_()
    input = leaf.clone() if layer.inplace else leaf
    y = call(input, residual=pick(residual) if batch.residual else None, mask=None if mask is None else mask[samples])
    y.backward(pick(dy))
    return y.detach(), leaf.grad, layer.running_mean, layer.running_var


def train_all(parts, **options):
    """Return the results of this rank, for each batch and each division of it."""
    rank = syncnorm.communicator().rank
    return [train(batch, division[rank], **options) for batch, division in parts]


def train_all_over_sockets(parts):
    os.environ["SYNCNORM_SHARED_MEMORY"] = "0"
    return train_all(parts, threads=2)


def differences(results, parts, expected):
    """Return what differs in bits from the whole batch: batch, tensor."""
    found = []
    for index, (batch, division) in enumerate(parts):
        whole_y, whole_dx, mean, var = expected[batch]
        for rank, samples in enumerate(division):
            y, dx, running_mean, running_var = results[rank][index]
            pairs = {"y": (y, whole_y[samples]), "dx": (dx, whole_dx[samples])}
            pairs |= {"running_mean": (running_mean, mean), "running_var": (running_var, var)}
            found += [(batch, rank, name) for name, (got, wanted) in pairs.items() if not torch.equal(got, wanted)]
    return found


def divided(world_size, seeds):
    return [(batch, batch.parts(world_size, seed)) for batch in BATCHES for seed in seeds]


def whole_batches(batches=BATCHES, **options):
    return {batch: train(batch, list(range(SAMPLES)), group=ALONE, **options) for batch in batches}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bits_do_not_depend_on_the_division(run, world_size):
    """Random divisions in random order, with empty shards: y, dx and the running statistics, of every rank."""
    parts = divided(world_size, seeds=range(2))
    assert differences(run(train_all, world_size, parts), parts, whole_batches()) == []


def test_bits_do_not_depend_on_the_backend():
    """8 ranks under mpirun, and on Gloo without the memory that ranks of a host share."""
    parts, expected = divided(8, seeds=[2]), whole_batches()
    assert differences(run_ranks(train_all, 8, parts, backend="mpi"), parts, expected) == []
    assert differences(run_ranks(train_all_over_sockets, 8, parts), parts, expected) == []


def test_bits_do_not_depend_on_the_number_of_threads():
    """On one rank, and where the ranks have other numbers of threads than each other."""
    try:
        assert all(
            torch.equal(one, other)
            for batch in BATCHES
            for one, other in zip(whole_batches([batch])[batch], whole_batches([batch], threads=3)[batch], strict=True)
        )
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("world_size", [2])
def test_the_default_mode_fails_the_same_comparison(run, world_size):
    """The negative control."""
    parts = divided(world_size, seeds=[3])
    expected = whole_batches(reproducible=False)
    found = differences(run(train_all_by_default, world_size, parts), parts, expected)
    assert {name for _, _, name in found} == {"y", "dx", "running_mean", "running_var"}


def train_all_by_default(parts):
    return train_all(parts, reproducible=False)


@pytest.mark.parametrize(
    "batch", [Batch(4, (9, 9), mean=mean, dtype=dtype) for mean in (0, 1e3, 1e6) for dtype in DTYPES]
)
def test_errors_are_no_larger_than_those_of_the_default_mode(batch):
    """Against the oracle in float64, of all that training gives. A few units in the last place are allowed for."""
    x, dy, _, _ = (t if t is None else t.double() for t in batch.tensors())
    leaf = x.requires_grad_()
    mean, var = leaf.mean((0, 2, 3)), leaf.var((0, 2, 3), correction=0)
    torch.manual_seed(1)
    layer = syncnorm.SyncBatchNorm(batch.channels)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.uniform_(layer.bias)
    shaped = (t.view(1, -1, 1, 1).double() for t in (mean, var, layer.weight, layer.bias))
    mean_, var_, weight, bias = shaped
    y = (leaf - mean_) * (var_ + 1e-5).rsqrt() * weight + bias
    (dx,) = torch.autograd.grad(y, leaf, dy)
    oracle = y, dx, 0.1 * mean, 0.9 + 0.1 * leaf.var((0, 2, 3))
    for name, expected, *got in zip(
        ("y", "dx", "running_mean", "running_var"),
        oracle,
        train(batch, list(range(SAMPLES)), group=ALONE),
        train(batch, list(range(SAMPLES)), group=ALONE, reproducible=False),
        strict=True,
    ):
        error, by_default = ((t.double() - expected.detach()).abs().max() for t in got)
        assert error <= by_default + 2 * torch.finfo(got[0].dtype).eps * expected.detach().abs().max(), name


@pytest.mark.parametrize("world_size", [2])
def test_two_all_reduces_each_way(run, world_size):
    """Of the sizes that the docs give, and one more of each in double."""
    run(count_the_collectives, world_size)


def count_the_collectives():
    group = CountingCommunicator()
    for dtype, second in ((torch.float32, 4 * 3 + 4), (torch.float64, 10 * 3 + 4)):
        layer = syncnorm.SyncBatchNorm(3, process_group=group, reproducible=True, dtype=dtype)
        layer(torch.randn(4, 3, dtype=dtype))
        group.calls.clear()
        y = layer(torch.randn(4, 3, dtype=dtype, requires_grad=True))
        assert group.calls == [("all_reduce", 8 * (4 * 3 + 6)), ("all_reduce", 8 * second)]
        group.calls.clear()
        y.backward(torch.randn_like(y))
        of_sums = (4 if dtype == torch.float32 else 8) * 3 + 2
        assert group.calls == [("all_reduce", 8 * (8 * 3 + 2)), ("all_reduce", 8 * of_sums)]
        group.calls.clear()
        layer.eval()(torch.randn(4, 3, dtype=dtype, requires_grad=True)).sum().backward()
        layer.train()(torch.randn(4, 3, dtype=dtype)).sum().backward()  # whose input needs no gradient
        assert len(group.calls) == 2


NORMS = {
    "layer": (lambda size, **options: syncnorm.LayerNorm(size, **options), -1, (6, 50)),
    "rms": (lambda size, **options: syncnorm.RMSNorm(size, **options), -1, (6, 50)),
    "rms-eps-outside": (lambda size, **options: syncnorm.RMSNorm(size, eps_outside=True, **options), -1, (3, 4, 50)),
    "group": (lambda size, **options: syncnorm.GroupNorm(2, 4, **options), 2, (3, 4, 50)),
}


def normalize_part(cuts, dtype, reproducible, group=None):
    """Return what each norm gives for this rank's part of the split axis: y and dx."""
    group = syncnorm.communicator() if group is None else group
    results = []
    for make, axis, shape in NORMS.values():
        generator = torch.Generator().manual_seed(5)
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) + 2 for _ in range(2))
        start, end = cuts[group.rank], cuts[group.rank + 1]
        x, dy = (t.narrow(axis, start, end - start) for t in (x, dy))
        norm = make(end - start, process_group=group, reproducible=reproducible, dtype=dtype)
        y = norm(x.requires_grad_())
        results.append((y.detach(), *torch.autograd.grad(y, x, dy)))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_sharded_norms(run, world_size, dtype):
    """Features, or space, split in any way; without a process group too."""
    cuts = [0, *sorted(random.Random(world_size).choices(range(51), k=world_size - 1)), 50]
    whole = normalize_part([0, 50], dtype, True, group=ALONE)
    parts = run(normalize_part, world_size, cuts, dtype, True)
    for index, (_, axis, _) in enumerate(NORMS.values()):
        for which in range(2):
            assert torch.equal(torch.cat([part[index][which] for part in parts], axis), whole[index][which])


def test_sharded_norms_without_a_group_agree_with_torch():
    x = torch.randn(5, 8)
    for norm, torchs in ((syncnorm.LayerNorm(8, reproducible=True), nn.LayerNorm(8)),):
        torch.testing.assert_close(norm(x), torchs(x))
    torch.testing.assert_close(syncnorm.RMSNorm(8, reproducible=True)(x), nn.RMSNorm(8, eps=1e-6)(x))
    torch.testing.assert_close(syncnorm.GroupNorm(2, 8, reproducible=True)(x), nn.GroupNorm(2, 8)(x))


@pytest.mark.parametrize("world_size", [4])
def test_sharded_norms_by_default_fail_the_same_comparison(run, world_size):
    """The negative control."""
    whole = normalize_part([0, 50], torch.float32, False, group=ALONE)
    parts = run(normalize_part, world_size, [0, 1, 20, 33, 50], torch.float32, False)
    equal = [
        torch.equal(torch.cat([part[index][which] for part in parts], axis), whole[index][which])
        for index, (_, axis, _) in enumerate(NORMS.values())
        for which in range(2)
    ]
    assert not all(equal)


@pytest.mark.parametrize("world_size", [2])
def test_errors_across_ranks(run, world_size):
    run(raise_errors, world_size)


def raise_errors():
    group = syncnorm.communicator()
    layer = syncnorm.SyncBatchNorm(3, check_finite=True, reproducible=True)
    x = torch.randn(4, 3)
    x[0, 1] = torch.nan if group.rank == 1 else 0
    with pytest.raises(NonFiniteError, match=r"rank 1: .*1 value in channel 1"):
        layer(x)
    assert layer.running_mean.eq(0).all()
    layer.check_finite = False
    y = layer(x)
    assert y.isnan().any(0).tolist() == [False, True, False]
    layer = syncnorm.SyncBatchNorm(3, reproducible=True)
    y = layer(torch.randn(4, 3, requires_grad=True))
    with syncnorm.debug(), pytest.raises(NonFiniteError, match=r"rank 0: backward.* in channel 2"):
        y.backward(torch.tensor([1.0, 1.0, torch.inf if group.rank == 0 else 1.0]).expand(4, 3))
    mixed = syncnorm.SyncBatchNorm(3, reproducible=group.rank == 0)
    with pytest.raises(DesyncError, match=r"rank 0: .*float32, reproducible"):
        mixed(torch.randn(4, 3))
    one, other = syncnorm.SyncBatchNorm(3, reproducible=True), syncnorm.SyncBatchNorm(3, reproducible=True)
    for layer in (one, other, one, other):
        layer(torch.randn(4, 3))
    with pytest.raises(DesyncError, match=r"call 3 of .*SyncBatchNorm"):
        (one if group.rank == 0 else other)(torch.randn(4, 3))


@pytest.mark.parametrize(
    "use",
    [
        lambda layer, x: torch.func.vmap(layer)(x.unsqueeze(0)),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
        lambda layer, x: torch.autograd.grad(layer(x).square().sum(), x, create_graph=True),
        lambda layer, x: torch.jit.trace(layer, x, check_trace=False),
    ],
    ids=["vmap", "jvp", "create_graph", "trace"],
)
def test_what_would_differentiate_rounding_is_refused(use):
    layer = syncnorm.SyncBatchNorm(3, track_running_stats=False, reproducible=True)
    with pytest.raises(RuntimeError, match="reproducible=True, got one"):
        use(layer, torch.randn(4, 3, requires_grad=True))


def test_gradcheck():
    """The gradient is that of the formula."""
    layer = syncnorm.SyncBatchNorm(3, dtype=torch.float64, reproducible=True)
    assert torch.autograd.gradcheck(layer, torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True))


def test_checkpointing_has_the_same_bits():
    layer = syncnorm.SyncBatchNorm(3, reproducible=True)
    x, dy = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5)
    plain = torch.autograd.grad(copy.deepcopy(layer)(x), x, dy)
    for use_reentrant in (False, True):
        twin, leaf = copy.deepcopy(layer), x.detach().requires_grad_()
        torch.utils.checkpoint.checkpoint(twin, leaf, use_reentrant=use_reentrant).backward(dy)
        assert torch.equal(leaf.grad, *plain)


def test_convert_revert_and_pickle():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), syncnorm.SyncBatchNorm(4))
    converted = syncnorm.convert_sync_batchnorm(model, reproducible=True)
    assert [layer.reproducible for layer in converted[1:]] == [True, True]
    assert "reproducible=True" in repr(converted[1])
    assert syncnorm.convert_sync_batchnorm(converted)[1].reproducible  # which keeps it
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)[1].reproducible
    assert copy.deepcopy(converted)[2].reproducible
    assert converted.state_dict().keys() == model.state_dict().keys()
    reverted = syncnorm.revert_sync_batchnorm(converted)
    assert type(reverted[1]) is nn.BatchNorm2d
    assert not hasattr(reverted[1], "reproducible")
    with pytest.raises(TypeError, match="expected reproducible to be True or False"):
        syncnorm.SyncBatchNorm(3, reproducible="yes")


@pytest.mark.parametrize("world_size", [2])
def test_uneven_batches(run, world_size):
    """In syncnorm.join a rank without batches adds nothing: the bits are those of the others alone."""
    results = run(train_unevenly, world_size)
    assert torch.equal(*results)


def train_unevenly():
    group = syncnorm.communicator()
    layer = syncnorm.SyncBatchNorm(3, reproducible=True)
    batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    with syncnorm.join(layer):
        for step, batch in enumerate(batches):
            if step == 0 or group.rank == 0:
                x = batch if step else batch[2 * group.rank :][:2]
                layer(x.clone().requires_grad_()).square().sum().backward()
    alone = syncnorm.SyncBatchNorm(3, process_group=ALONE, reproducible=True)
    for batch in batches:
        alone(batch)
    assert torch.equal(layer.running_mean, alone.running_mean)
    return layer.running_var


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_has_the_same_bits(backend):
    layer = syncnorm.SyncBatchNorm(3, reproducible=True)
    twin = copy.deepcopy(layer)
    x, dy = torch.randn(8, 3, 5, requires_grad=True), torch.randn(8, 3, 5)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    with chosen("reference"):
        expected = layer(x)
    got = compiled(x)
    assert torch.equal(layer.running_var, twin.running_var)
    assert torch.equal(layer.running_mean, twin.running_mean)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y, x, dy)[0] for y in (expected, got)]
    torch.testing.assert_close(*grads)


def test_compiled_sharded_norm_has_the_same_bits():
    layer = syncnorm.LayerNorm(8, reproducible=True)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 8)
    with chosen("reference"):
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("world_size", [2])
def test_compiled_ranks_have_the_bits_of_one_process(run, world_size):
    batches = BATCHES[1:2]
    parts = [(batches[0], batches[0].parts(world_size, 0))]
    found = differences(run(train_all_compiled, world_size, parts), parts, whole_batches(batches, compiled=True))
    assert found == []


def train_all_compiled(parts):
    return train_all(parts, compiled=True)
