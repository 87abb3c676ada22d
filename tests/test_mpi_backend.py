"""torch.distributed on the mpi4py backend: every collective and point-to-point call, under mpirun."""

import io
import shutil
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed import ReduceOp, checkpoint
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm import communicators

pytestmark = [pytest.mark.mpi, pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")]

NUMBERS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
FLOATS = [dtype for dtype in NUMBERS if dtype.is_floating_point]
INTEGERS = [dtype for dtype in NUMBERS if not dtype.is_floating_point and not dtype.is_complex]


@pytest.fixture(scope="module", autouse=True)
def group():
    """Join the job as a user does; leave it for the other files."""
    group = syncnorm.init("mpi", timeout=timedelta(seconds=20))
    yield group
    communicators.set_default(None)
    dist.destroy_process_group()


@pytest.fixture
def rank(group):
    return group.rank


@pytest.fixture
def size(group):
    return group.size


def filled(value, dtype=torch.float32, shape=(2, 3)):
    return torch.full(shape, value, dtype=torch.float64).to(dtype)


def each(size, dtype=torch.float32, shape=(2, 3)):
    return [filled(r + 1, dtype, shape) for r in range(size)]


def test_it_is_the_default_group_and_batch_norm_goes_straight_to_mpi(group):
    assert dist.get_backend() == "mpi4py"
    assert (dist.get_rank(), dist.get_world_size()) == (group.rank, group.size)
    assert syncnorm.communicator() is group
    assert syncnorm.communicator(dist.group.WORLD) is group
    assert type(syncnorm.communicator(dist.new_group())).__name__ == "MpiCommunicator"


@pytest.mark.parametrize("dtype", NUMBERS)
def test_sums_and_products(dtype, rank, size):
    t = filled(rank + 1, dtype)
    dist.all_reduce(t)
    assert torch.equal(t, filled(size * (size + 1) // 2, dtype))
    if not dtype.is_complex:  # torch refuses
        t = filled(2, dtype)
        dist.all_reduce(t, ReduceOp.PRODUCT)
        assert torch.equal(t, filled(2**size, dtype))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_extremes(dtype, rank, size):
    for op, expected in ((ReduceOp.MIN, 1), (ReduceOp.MAX, size)):
        t = filled(rank + 1, dtype)
        dist.all_reduce(t, op)
        assert torch.equal(t, filled(expected, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_averages(dtype, rank, size):
    t = filled(rank, dtype)
    dist.all_reduce(t, ReduceOp.AVG)
    assert torch.equal(t, filled((size - 1) / 2, dtype))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_bits(dtype, rank, size):
    ranks = [r + 1 for r in range(size)]
    for op, combine in ((ReduceOp.BAND, int.__and__), (ReduceOp.BOR, int.__or__), (ReduceOp.BXOR, int.__xor__)):
        expected = ranks[0]
        for r in ranks[1:]:
            expected = combine(expected, r)
        t = filled(rank + 1, dtype)
        dist.all_reduce(t, op)
        assert torch.equal(t, filled(expected, dtype))


def test_booleans(rank, size):
    any_, all_ = torch.tensor([rank == 0, False]), torch.tensor([rank == 0, True])
    dist.all_reduce(any_)
    dist.all_reduce(all_, ReduceOp.MIN)
    assert any_.tolist() == [True, False]
    assert all_.tolist() == [size == 1, True]


@pytest.mark.parametrize(
    ("dtype", "op", "message"),
    [
        (torch.float32, ReduceOp.BAND, "expected a tensor of integers for BAND, got torch.float32"),
        (torch.int32, ReduceOp.AVG, "expected a floating-point or complex tensor for AVG, got torch.int32"),
        (torch.complex64, ReduceOp.MAX, "expected a tensor of real numbers for MAX, got torch.complex64"),
        (torch.bool, ReduceOp.AVG, "expected a tensor of numbers for AVG, got torch.bool"),
    ],
)
def test_reductions_that_make_no_sense(dtype, op, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dist.group.WORLD.allreduce([torch.ones(2, dtype=dtype)], options(dist.AllreduceOptions(), op))


def options(opts, op):
    opts.reduceOp = op
    return opts


def test_a_reduction_that_is_not_there():
    with pytest.raises(NotImplementedError, match="that the mpi4py backend supports, got PREMUL_SUM"):
        dist.group.WORLD.allreduce([torch.ones(2)], SimpleNamespace(reduceOp=SimpleNamespace(op=ReduceOp.PREMUL_SUM)))


MOVED = [*NUMBERS, torch.bool, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", MOVED)
def test_moves_of_every_dtype(dtype, rank, size):
    def same(a, b):
        assert torch.equal(a.float() if dtype.itemsize == 1 else a, b.float() if dtype.itemsize == 1 else b)

    t = filled(rank + 1, dtype)
    dist.broadcast(t, size - 1)
    same(t, filled(size, dtype))
    gathered = [torch.empty_like(t) for _ in range(size)]
    dist.all_gather(gathered, filled(rank + 1, dtype))
    for actual, expected in zip(gathered, each(size, dtype), strict=True):
        same(actual, expected)
    received = torch.empty_like(t)
    if size > 1:
        requests = [dist.isend(filled(rank + 1, dtype), (rank + 1) % size), dist.irecv(received, (rank - 1) % size)]
        for request in requests:
            request.wait()
        same(received, filled((rank - 1) % size + 1, dtype))


@pytest.mark.parametrize("shape", [(2, 3), (0,), ()])
def test_gathers_and_scatters(shape, rank, size):
    mine, all_ = filled(rank + 1, shape=shape), each(size, shape=shape)
    single = torch.empty(size * mine.numel())
    dist.all_gather_into_tensor(single, mine.flatten())
    assert torch.equal(single, torch.cat([t.flatten() for t in all_]))
    gathered = [torch.empty(shape) for _ in range(size)] if rank == size - 1 else None
    dist.gather(mine, gathered, dst=size - 1)
    if gathered is not None:
        assert all(torch.equal(*pair) for pair in zip(gathered, all_, strict=True))
    scattered = torch.empty(shape)
    dist.scatter(scattered, all_ if rank == 0 else None)
    assert torch.equal(scattered, mine)
    reduced = filled(rank + 1, shape=shape)
    dist.reduce(reduced, dst=size - 1)
    if rank == size - 1:
        assert torch.equal(reduced, sum(all_))


def test_single_tensor_forms(rank, size):
    gathered = torch.empty(2 * size)
    dist.all_gather_into_tensor(gathered, torch.full((2,), float(rank)))
    assert gathered.tolist() == [r for r in range(size) for _ in range(2)]
    scattered = torch.empty(2)
    dist.reduce_scatter_tensor(scattered, torch.arange(2.0 * size))
    assert scattered.tolist() == [size * 2 * rank, size * (2 * rank + 1)]
    dist.reduce_scatter_tensor(scattered, torch.arange(2.0 * size), ReduceOp.AVG)
    assert scattered.tolist() == [2 * rank, 2 * rank + 1]
    dist.reduce_scatter(scattered, list(torch.arange(2.0 * size).split(2)))
    assert scattered.tolist() == [size * 2 * rank, size * (2 * rank + 1)]


def test_gathering_a_part_of_the_output(rank, size):
    output = torch.zeros(2 * size)
    own = output.split(2)[rank].fill_(rank)  # as fully_shard does
    dist.all_gather_into_tensor(output, own)
    assert output.tolist() == [r for r in range(size) for _ in range(2)]
    dist.all_gather_into_tensor(output, output.split(2)[rank - 1])
    assert output.tolist() == [(r - 1) % size for r in range(size) for _ in range(2)]


def test_uneven_lists(rank, size):
    gathered = [torch.empty(r) for r in range(size)]
    dist.all_gather(gathered, torch.full((rank,), float(rank)))
    assert [t.tolist() for t in gathered] == [[r] * r for r in range(size)]
    scattered = torch.empty(rank + 1)
    dist.reduce_scatter(scattered, [torch.full((r + 1,), float(r)) for r in range(size)])
    assert scattered.tolist() == [rank * size] * (rank + 1)


def test_all_to_all(rank, size):
    outputs = [torch.empty(1) for _ in range(size)]
    dist.all_to_all(outputs, [torch.full((1,), 10.0 * rank + r) for r in range(size)])
    assert [t.item() for t in outputs] == [10 * r + rank for r in range(size)]
    output = torch.empty(size, 2)
    dist.all_to_all_single(output, torch.arange(size * 2.0).view(size, 2) + 10 * rank)
    assert output.tolist() == [[10 * r + 2 * rank, 10 * r + 2 * rank + 1] for r in range(size)]
    output = torch.empty(size * (rank + 1))  # rank r gives s + 1 numbers to rank s
    sizes = [r + 1 for r in range(size)]
    dist.all_to_all_single(output, torch.full((sum(sizes),), float(rank)), [rank + 1] * size, sizes)
    assert output.tolist() == [r for r in range(size) for _ in range(rank + 1)]


def test_strided_tensors(rank, size):
    t = filled(rank + 1, shape=(3, 2)).t()
    dist.all_reduce(t)
    assert torch.equal(t, filled(size * (size + 1) / 2))
    wide = torch.zeros(4, 6)
    dist.broadcast(wide[::2, ::3].fill_(rank), size - 1)
    assert wide.sum() == 4 * (size - 1)


def test_receiving_from_anyone(rank, size):
    if rank == 0:
        seen = set()
        for _ in range(size - 1):
            t = torch.empty(1)
            source = dist.recv(t)
            assert t.item() == source
            seen.add(source)
        assert seen == set(range(1, size))
    else:
        dist.send(torch.full((1,), float(rank)), 0)


def test_asynchronous_calls_meet_synchronous_ones(rank, size):
    t = torch.full((100_000,), float(rank))
    if rank == 0:
        work = dist.all_reduce(t, async_op=True)
        assert work.wait()
        assert work.is_completed()
        assert work.is_success()
    else:
        dist.all_reduce(t)
    assert torch.equal(t, torch.full_like(t, size * (size - 1) / 2))
    works = [dist.all_reduce(filled(i), async_op=True) for i in range(20)]
    for i, work in reversed(list(enumerate(works))):
        work.wait()
        assert torch.equal(work.result()[0], filled(i * size))


def test_futures(size):
    future = dist.all_reduce(filled(1), async_op=True).get_future()
    assert torch.equal(future.wait()[0], filled(size))


def test_futures_before_the_peers_have_come(rank, size):
    other = (rank + 1) % size
    received = torch.zeros(100_000)
    coming = dist.irecv(received, (rank - 1) % size).get_future()
    going = dist.isend(torch.full((100_000,), float(rank)), other).get_future()
    assert not coming.done() or size == 1 or received[0] == (rank - 1) % size
    coming.wait()
    going.wait()
    assert received.unique().tolist() == [(rank - 1) % size]
    if size == 1:
        return
    total = torch.full((10,), 1.0)
    if rank == 1:  # comes to the sum after what rank 0 sends it with the sum under way
        dist.recv(torch.zeros(1), 0)
    future = dist.all_reduce(total, async_op=True).get_future()
    if rank == 0:
        time.sleep(0.05)
        assert not future.done()
        dist.send(torch.zeros(1), 1)
    doubled = future.then(lambda f: f.value()[0] * 2)
    assert doubled.wait().tolist() == [2 * size] * 10


def test_a_future_that_nobody_completes(rank, size):
    if size == 1:
        return
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=0.3))
    if rank == 0:
        future = dist.all_reduce(torch.zeros(1), group=pair, async_op=True).get_future()
        with pytest.raises((syncnorm.DesyncError, RuntimeError), match=r"waited 0.3 s for its peers"):
            future.wait()
    dist.barrier()
    if rank == 1:
        dist.all_reduce(torch.ones(1), group=pair)


def test_objects_and_barriers(rank, size):
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank, "more": "x" * 100 * rank})
    assert [o["rank"] for o in objects] == list(range(size))
    shared = [f"from {rank}"]
    dist.broadcast_object_list(shared, src=size - 1)
    assert shared == [f"from {size - 1}"]
    dist.barrier()
    assert dist.barrier(async_op=True).wait()


def test_subgroups(rank, size):
    ranks = [0, size - 1] if size > 1 else [0]
    ends = dist.new_group(ranks)
    everyone = dist.new_group()
    if rank in ranks:
        t = filled(rank + 1)
        dist.all_reduce(t, group=ends)
        assert torch.equal(t, filled(sum({r + 1 for r in ranks})))
        assert syncnorm.communicator(ends).all_gather_object(rank) == sorted(set(ranks))
    else:
        with pytest.raises(ValueError, match=f"got one without rank {rank}"):
            syncnorm.communicator(ends)
    t = filled(1)
    dist.all_reduce(t, group=everyone)
    assert torch.equal(t, filled(size))


def test_functional_collectives(rank, size):
    world = dist.group.WORLD
    assert torch.equal(functional.all_reduce(filled(1), "sum", world) + 0, filled(size))
    assert torch.equal(functional.all_reduce(filled(rank), "avg", world) + 0, filled((size - 1) / 2))
    gathered = functional.all_gather_tensor(torch.full((1,), float(rank)), 0, world) + 0
    assert gathered.tolist() == list(range(size))
    scattered = functional.reduce_scatter_tensor(torch.arange(2.0 * size), "sum", 0, world) + 0
    assert scattered.tolist() == [size * 2 * rank, size * (2 * rank + 1)]
    exchanged = functional.all_to_all_single(torch.arange(float(size)) + 10 * rank, None, None, world) + 0
    assert exchanged.tolist() == [10 * r + rank for r in range(size)]
    assert torch.equal(functional.broadcast(filled(rank), 0, world) + 0, filled(0))
    one, two = (t + 0 for t in functional.all_reduce_coalesced([filled(1), filled(2)], "sum", world))
    assert torch.equal(one, filled(size))
    assert torch.equal(two, filled(2 * size))


def test_coalescing(rank, size):
    tensors = [filled(rank + i) for i in range(3)]
    with dist._coalescing_manager():
        for t in tensors:
            dist.all_reduce(t)
    for i, t in enumerate(tensors):
        assert torch.equal(t, filled(size * (size - 1) / 2 + i * size))


def test_the_forms_of_torch_s_methods(rank, size):
    group, last, soon = dist.group.WORLD, size - 1, timedelta(seconds=9)
    every = [float(r) for r in range(size)]

    def mine(n=1):
        return torch.full((n,), float(rank))

    def empties(n=1):
        return [torch.empty(n) for _ in range(size)]

    def parts():
        return list(torch.arange(float(size)).split(1))

    for call in (
        lambda t: group.allreduce(t),
        lambda t: group.allreduce([t]),
        lambda t: group.allreduce(tensor=t, timeout=soon),
        lambda t: group.allreduce([t], ReduceOp.SUM, soon),
        lambda t: group.allreduce(t, op=ReduceOp.SUM),
        lambda t: group.allreduce(tensors=[t], opts=dist.AllreduceOptions()),
        lambda t: group.allreduce_coalesced([t]),
    ):
        call(t := mine()).wait()
        assert t.item() == sum(every)
    group.allreduce(t := mine(), ReduceOp.MAX).wait()
    assert t.item() == last
    for call in (
        lambda t: group.broadcast(t, last),
        lambda t: group.broadcast(t, root=last, timeout=soon),
        lambda t: group.broadcast(tensor=t, root=last),
    ):
        call(t := mine()).wait()
        assert t.item() == last
    group.broadcast([t := mine()]).wait()
    assert t.item() == 0
    group.reduce(t := mine(), last, op=ReduceOp.SUM).wait()
    assert rank != last or t.item() == sum(every)
    for call in (
        lambda out: group.allgather(out, mine()),
        lambda out: group.allgather([out], [mine()]),
        lambda out: group.allgather(output_tensors=out, input_tensor=mine(), timeout=soon),
        lambda out: group.allgather_coalesced([[t] for t in out], [mine()]),
    ):
        call(out := empties()).wait()
        assert [t.item() for t in out] == every
    group._allgather_base(out := torch.empty(size), mine()).wait()
    assert out.tolist() == every
    group.gather(out := empties() if rank == last else [], mine(), last).wait()
    assert rank != last or [t.item() for t in out] == every
    group.scatter(t := mine(), parts() if rank == last else [], root=last).wait()
    assert t.item() == rank
    for call in (
        lambda t: group.reduce_scatter(t, parts()),
        lambda t: group.reduce_scatter(output=t, input=parts(), op=ReduceOp.SUM),
        lambda t: group.reduce_scatter([t], [parts()]),
        lambda t: group._reduce_scatter_base(t, torch.arange(float(size))),
    ):
        call(t := mine()).wait()
        assert t.item() == rank * size
    group.alltoall(out := empties(), [mine() for _ in range(size)]).wait()
    assert [t.item() for t in out] == every
    group.all_to_all_single(out := torch.empty(size), mine(size), [], []).wait()
    assert out.tolist() == every
    group.barrier().wait()
    group.barrier(timeout=soon).wait()
    group.monitored_barrier(timeout=soon)
    with pytest.raises(TypeError, match=r"allreduce\(\) got an unexpected argument 'root', or got it twice"):
        group.allreduce(mine(), root=0)
    with pytest.raises(TypeError, match=r"allgather\(\) expected output_tensors, input_tensors"):
        group.allgather(empties())


def test_what_torch_asks_of_a_group(rank, size):
    group = dist.group.WORLD
    assert torch.device("cpu") in group._device_types
    assert group._get_backend(torch.device("cpu")).rank() == rank
    assert dist.distributed_c10d._get_default_store() is not None
    group.get_group_store().set(f"here {rank}", "yes")
    dist.barrier()
    assert group.get_group_store().get(f"here {size - 1}") == b"yes"
    assert dist.get_pg_count() >= 1
    assert (group.name(), group.options.backend) == ("mpi4py", "mpi4py")
    before = group._get_sequence_number_for_group()
    dist.all_reduce(torch.ones(1))
    if size > 1 and rank < 2:
        dist.send(torch.ones(1), 1) if rank == 0 else dist.recv(torch.ones(1), 0)
    assert group._get_sequence_number_for_group() == before + 1
    own = dist.new_group()
    own._set_sequence_number_for_group()
    assert own._get_sequence_number_for_group() == 0
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("dp",))
    t = filled(1)
    dist.all_reduce(t, group=mesh["dp"].get_group())
    assert torch.equal(t, filled(size))


def test_the_profiler_names_collectives(rank, size):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        dist.all_reduce(torch.ones(3))
        works = [dist.broadcast(torch.ones(3), 0, async_op=True) for _ in range(2)]
        for work in works:
            work.wait()
        if size > 1:
            dist.send(torch.ones(1), 1) if rank == 0 else dist.recv(torch.ones(1), 0) if rank == 1 else None
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["mpi4py:all_reduce"] == 1
    assert counts["mpi4py:broadcast"] == 2
    assert rank > 1 or size == 1 or counts["mpi4py:" + ("send", "recv")[rank]] == 1


def test_sparse_tensors(rank, size):
    def contribution(r):  # entries that meet, entries of one rank alone, and as many as the rank says
        rows = [0, *range(r + 1)]
        return torch.sparse_coo_tensor([rows], torch.ones(len(rows), 2) * (r + 1), (size + 1, 2), check_invariants=True)

    t = contribution(rank)
    dist.all_reduce(t)
    assert t.is_sparse
    assert torch.equal(t.to_dense(), sum(contribution(r).to_dense() for r in range(size)))
    with pytest.raises(NotImplementedError, match="expected the SUM of a sparse tensor"):
        dist.group.WORLD.allreduce([contribution(rank)], ReduceOp.MAX)


def test_monitored_barrier(rank, size):
    own = dist.new_group()
    for _ in range(3):
        own.monitored_barrier(timedelta(seconds=20))
        if size > 1 and rank < 2:  # which the others do not count
            dist.send(torch.ones(1), 1, own) if rank == 0 else dist.recv(torch.ones(1), 0, own)
    if size == 1:
        return
    soon = timedelta(seconds=0.2)
    if rank == 0:
        with pytest.raises(RuntimeError, match="Rank 1 failed to pass monitoredBarrier in 200 ms"):
            own.monitored_barrier(soon)
        with pytest.raises(syncnorm.DesyncError, match=r"failed at .*monitored_barrier"):
            dist.all_reduce(torch.ones(1), group=own)
    elif rank > 1:
        with pytest.raises(RuntimeError, match=f"Rank {rank} successfully reached monitoredBarrier, but received err"):
            own.monitored_barrier(soon)
    dist.barrier()


def test_tensors_that_do_not_go_together(rank, size):
    group = dist.group.WORLD
    ones, integers = torch.ones(2), torch.ones(2, dtype=torch.int32)  # as many bytes
    for call in (
        lambda: group.allgather([[integers] * size], [ones]),
        lambda: group._allgather_base(torch.ones(2 * size, dtype=torch.int32), ones),
        lambda: group.gather([[integers] * size] if rank == 0 else [], [ones], 0) if rank == 0 else refuse(),
        lambda: group.scatter([ones], [[integers] * size], 0) if rank == 0 else refuse(),
        lambda: group.reduce_scatter([ones], [[integers] * size]),
        lambda: group.alltoall([ones] * size, [integers] * size),
    ):
        with pytest.raises(ValueError, match=r"expected .*got a tensor of shape .* and torch.int32"):
            call()
    for call in (
        lambda: group.allgather([[ones] * (size + 1)], [ones]),
        lambda: group.allgather([[torch.ones(3)] * size], [ones]),
        lambda: group._allgather_base(torch.ones(2 * size + 1), ones),
        lambda: group.reduce_scatter([torch.ones(3)], [[ones] * size]),
        lambda: group._reduce_scatter_base(ones, torch.ones(2 * size + 1)),
        lambda: group.all_to_all_single(torch.ones(size), torch.ones(size + 1), [], [1] * size),
    ):
        with pytest.raises(ValueError, match=r"expected .*, got"):
            call()
    t = filled(1)
    dist.all_reduce(t)  # the group has not failed
    assert torch.equal(t, filled(size))


def refuse():
    raise ValueError("expected the root, got a tensor of shape () and torch.int32")


def network(norm=syncnorm.SyncBatchNorm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 2)).double()


def whole_batch(size):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size * 3, 6, generator=generator, dtype=torch.float64)


def assert_gradients_of_the_whole_batch(model, size):
    alone = network(nn.BatchNorm1d)
    alone(whole_batch(size)).square().sum().backward()
    for actual, expected in zip(model.parameters(), alone.parameters(), strict=True):
        grad = actual.grad.full_tensor() if hasattr(actual.grad, "full_tensor") else actual.grad
        torch.testing.assert_close(grad * size, expected.grad, rtol=1e-10, atol=1e-10)


def test_distributed_data_parallel(rank, size):
    shard = whole_batch(size).split(3)[rank]
    model = DistributedDataParallel(network())
    model(shard).square().sum().backward()
    assert_gradients_of_the_whole_batch(model, size)
    with model.no_sync():
        model.zero_grad()
        model(shard).square().sum().backward()
    local = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(shard).square().sum().backward()
    assert size == 1 or not torch.equal(local[0], next(model.parameters()).grad)


def bf16_hook(state, bucket):
    """torch's, which it registers for NCCL alone, by its name."""
    return default_hooks.bf16_compress_hook(state, bucket)


HOOKS = {
    "allreduce": (lambda _: None, default_hooks.allreduce_hook, 1e-10),
    "fp16": (lambda _: None, default_hooks.fp16_compress_hook, 1e-2),
    "bf16": (lambda _: None, bf16_hook, 1e-1),
    "PowerSGD": (
        lambda group: powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.1, warm_start=True
        ),
        powerSGD_hook.powerSGD_hook,
        1e-3,
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_communication_hooks(name, rank, size):
    make_state, hook, tolerance = HOOKS[name]
    dtype = torch.float64 if name == "allreduce" else torch.float32

    def wide():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 60), nn.ReLU(), nn.Linear(60, 2), nn.Linear(2, 2)).to(dtype)

    inputs, targets = (t[:, :2].to(dtype) for t in whole_batch(size).chunk(2, 1))
    alone, model = wide(), DistributedDataParallel(wide(), bucket_cap_mb=0.0005)  # several buckets
    model.register_comm_hook(make_state(None), hook)
    for _ in range(4):
        for net, x, y in ((alone, inputs, targets), (model, inputs.split(3)[rank], targets.split(3)[rank])):
            net.zero_grad()
            (net(x) * y[:, :2]).mean().backward()
        for actual, expected in zip(model.module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=tolerance, atol=tolerance)


def test_hooks_of_c_plus_plus(rank, size):
    model = DistributedDataParallel(network())
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    model(whole_batch(size).split(3)[rank]).square().sum().backward()
    assert_gradients_of_the_whole_batch(model, size)


@pytest.mark.parametrize("differ", ["in shape", "in number"])
def test_ddp_verifies_that_the_models_are_one(differ, rank, size):
    if size == 1:
        return
    own = dist.new_group(timeout=timedelta(seconds=10))
    model = (
        nn.Linear(3, 2 + rank) if differ == "in shape" else nn.Sequential(*[nn.Linear(2, 2) for _ in range(rank + 1)])
    )
    if differ == "in shape" and rank == 0:  # whose shapes the others compare theirs with
        DistributedDataParallel(model, process_group=own)
    else:
        expected = "appears not to match" if differ == "in shape" else "DDP expects same model across all ranks"
        with pytest.raises(RuntimeError, match=expected):
            DistributedDataParallel(model, process_group=own)


def test_ddp_joins_uneven_inputs(rank, size):
    """Rank r has r + 1 batches of the constant r + 1; a rank without a batch adds nothing to the mean gradient."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 2).double())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.join():
        for _ in range(rank + 1):
            optimizer.zero_grad()
            model(torch.full((4, 3), rank + 1.0).double()).sum().backward()
            optimizer.step()
    batches = [(step, r + 1.0) for step in range(size) for r in range(step, size)]
    weight, bias = (before[i] - 0.1 * sum(4 * value ** (1 - i) for _, value in batches) / size for i in range(2))
    for actual, expected in zip(model.parameters(), (weight, bias), strict=True):
        torch.testing.assert_close(actual, expected)


def test_fully_sharded_data_parallel(rank, size):
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    model(whole_batch(size).split(3)[rank]).square().sum().backward()
    assert_gradients_of_the_whole_batch(model, size)


@pytest.mark.filterwarnings("ignore")  # torch's, of what it uses itself
@pytest.mark.parametrize("shard", ["FSDP1", "FSDP2"])
def test_sharded_state_is_saved_and_loaded(shard, rank, size, shared_directory):
    if shard == "FSDP1":
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    else:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    options = StateDictOptions(full_state_dict=True)
    full = get_model_state_dict(model, options=options)
    assert full.keys() == network().state_dict().keys()
    for name, expected in network().state_dict().items():
        assert torch.equal(full[name], expected)

    def parts():
        return [(p.to_local() if hasattr(p, "to_local") else p).detach() for p in model.parameters()]

    def assert_it_comes_back(load):
        for p in parts():
            p.zero_()
        load()
        assert all(map(torch.equal, parts(), before))

    before = [p.clone() for p in parts()]
    assert any(p.any() for p in before)
    assert_it_comes_back(lambda: set_model_state_dict(model, full, options=options))
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=shared_directory / "now")
    if shard == "FSDP1":  # of whose shards torch copies none, and loads empty ones with CUDA only
        return
    checkpoint.async_save({"model": get_model_state_dict(model)}, checkpoint_id=shared_directory / "later").result()

    def load(which):
        state = get_model_state_dict(model)
        checkpoint.load({"model": state}, checkpoint_id=shared_directory / which)
        set_model_state_dict(model, state)

    assert_it_comes_back(lambda: load("now"))
    assert_it_comes_back(lambda: load("later"))


@pytest.fixture
def shared_directory(rank):
    name = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(name)
    yield Path(name[0])
    dist.barrier()
    if rank == 0:
        shutil.rmtree(name[0])


@pytest.mark.filterwarnings("ignore")  # torch's, of what it does while it compiles
def test_a_compiled_ddp_model_trains_as_an_eager_one(rank, size):
    if size > 2:  # where it does the same, slowly
        return

    def train(compiled):
        model = DistributedDataParallel(network())
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(size * step + rank)
            run(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        return model.state_dict()

    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    eager, compiled = train(False), train(True)
    assert frames["ok"] > before
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected, rtol=1e-10, atol=1e-10)


def test_a_peer_that_stays_away(rank, size):
    if size == 1:
        return
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=0.3))
    if rank == 0:
        other = dist.all_reduce(torch.zeros(1), group=pair, async_op=True)
        work = dist.all_reduce(torch.zeros(1), group=pair, async_op=True)
        assert not work.is_completed()
        with pytest.raises(syncnorm.DesyncError, match=r"all_reduce on rank 0 of 2 of group \w+ waited 0.3 s for"):
            work.wait()
        assert work.exception() is not None
        assert not work.is_success()
        failed = r"failed at \d\d:\d\d:\d\d: all_reduce on rank 0 of 2 .* start a new one"
        for call in (
            other.wait,
            lambda: dist.all_reduce(torch.ones(1), group=pair),
            lambda: dist.broadcast(torch.ones(1), 0, group=pair),
            lambda: dist.barrier(pair),
            lambda: dist.send(torch.ones(1), 1, group=pair),
            lambda: pair.monitored_barrier(),
            lambda: syncnorm.communicator(pair).all_reduce(torch.ones(1)),
        ):
            with pytest.raises(syncnorm.DesyncError, match=failed):
                call()
        with pytest.raises(syncnorm.DesyncError, match=r"waited 0.3 s"):
            work.wait()
    dist.barrier()
    if rank == 1:
        for _ in range(2):
            dist.all_reduce(late := torch.ones(1), group=pair)  # so that rank 0's requests end
            assert late.item() == 1
    dist.barrier()
    if rank == 0:
        assert not work.is_success()


def test_an_aborted_group(rank):
    own = dist.new_group()
    own.abort()
    with pytest.raises(syncnorm.DesyncError, match=rf"failed at .*: abort on rank {rank}"):
        dist.all_reduce(torch.ones(1), group=own)


def test_models_are_saved_and_loaded(rank):
    stream = io.BytesIO()
    torch.save(DistributedDataParallel(network()).module, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False)[1].process_group is None
