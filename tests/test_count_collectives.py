"""`count_collectives`: every collective of a process, once, whoever issues it, on every kind of group."""

import contextlib
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch_sync_operators
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as TorchFunction
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import CollectiveCall, CountingCommunicator, count_collectives, run_ranks
from syncnorm.testing.dispatched import OPERATORS

BACKENDS = ["gloo", pytest.param("mpi", id="mpirun")]
POINT_TO_POINT = {"send", "recv_", "recv_any_source_"}


class Net(nn.Module):
    def __init__(self, group=None, norm=syncnorm.SyncBatchNorm):
        super().__init__()
        options = {} if group is None else {"process_group": group}
        self.bn, self.head = norm(3, **options), nn.Linear(3, 5)
        self.last = norm(5, **options)

    def forward(self, x):
        return self.last(self.head(self.bn(x)))


def bytes_of(*channels):
    """The bytes of each all-reduce of the layers in forward and backward: those of docs/collectives.md."""
    return [8 * (2 * c + 3) for c in channels] + [8 * (2 * c + 2) for c in reversed(channels)]


def train(model, steps=1):
    """Return the calls of each step."""
    of_steps = []
    for _ in range(steps):
        with count_collectives() as calls:
            model(torch.randn(4, 3, requires_grad=True)).square().sum().backward()
        of_steps.append(list(calls))
    return of_steps


def of_layers(kind):
    group = {"plain": lambda: None, "wrapped": CountingCommunicator, "blocks": lambda: syncnorm.new_subgroups(2)}[
        kind
    ]()
    return train(Net(group), steps=3)


@pytest.mark.parametrize("kind", ["plain", "wrapped", "blocks"])
@pytest.mark.parametrize("backend", [*BACKENDS, "sockets"])
def test_a_layer_is_two_all_reduces_on_every_group(backend, kind, monkeypatch):
    if backend == "sockets":
        monkeypatch.setenv("SYNCNORM_SHARED_MEMORY", "0")
    size = {"plain": 3, "wrapped": 3, "blocks": 2}[kind]
    layers = ["bn", "last", "last", "bn"]
    for rank, steps in enumerate(run_ranks(of_layers, 3, kind, backend=backend.replace("sockets", "gloo"))):
        for calls in steps:
            if kind == "blocks" and rank == 2:  # alone in its block
                assert calls == []
                continue
            assert [call[:3] for call in calls] == [("all_reduce", nbytes, size) for nbytes in bytes_of(3, 5)]
            assert [call.layer.split(" of ")[0] for call in calls] == layers


def without_statistics_of_all():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), syncnorm.LayerNorm(5), nn.BatchNorm1d(5))
    return train(model) + train(Net().eval())


def test_layers_that_do_not_communicate_issue_none():
    assert run_ranks(without_statistics_of_all, 2) == [[[], []]] * 2


def of_torch_distributed():
    """Issue each collective of torch.distributed once."""
    rank, x = dist.get_rank(), torch.zeros(4)
    pair, parts = torch.zeros(8), [torch.zeros(4), torch.zeros(4)]
    world = dist.group.WORLD
    with count_collectives() as calls:
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        dist.broadcast(x, 1)
        dist.reduce(x, 1)
        dist.all_gather(parts, x)
        dist.all_gather_into_tensor(pair, x)
        dist.gather(x, parts if rank == 1 else None, 1)
        dist.scatter(x, parts if rank == 1 else None, 1)
        dist.reduce_scatter_tensor(x, pair)
        dist.all_to_all_single(pair, pair.clone())
        dist.all_gather_object([None, None], "object")
        dist.barrier()
        world.monitored_barrier(timedelta(seconds=20), False)
        functional.all_reduce(x, "sum", world).wait()
        functional.all_gather_tensor(x, 0, world).wait()
    sizes = [call.nbytes for call in calls]
    names = [call.name for call in calls]
    assert calls.nbytes == sum(sizes)
    assert {call.world_size for call in calls} == {2}
    return list(zip(names, sizes, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_collectives_of_torch_distributed_are_counted_by_their_names(backend):
    expected = [("all_reduce", 16), ("all_reduce", 16), ("broadcast", 16), ("reduce", 16), ("all_gather", 16)]
    expected += [("all_gather_into_tensor", 16), ("gather", 16), ("scatter", 16), ("reduce_scatter_tensor", 32)]
    expected += [("all_to_all_single", 32), ("all_gather", 8), ("all_gather", None), ("barrier", 0)]
    expected += [("monitored_barrier", 0), ("all_reduce", 16), ("all_gather_into_tensor", 16)]
    for found in run_ranks(of_torch_distributed, 2, backend=backend):
        pickled = found[11][1]  # bytes
        assert found == [(name, pickled if size is None else size) for name, size in expected]


def in_ddp():
    """Return the layers' bytes, those of DDP's buckets, and those of the parameters, in a step."""
    model = DistributedDataParallel(Net(), bucket_cap_mb=5e-5)
    train(model)  # after it, DDP broadcasts the order of the buckets
    (calls,) = train(model)
    parameters = sum(4 * parameter.numel() for parameter in model.parameters())
    buckets = [call.nbytes for call in calls if not call.layer and call.name == "all_reduce"]
    return [call.nbytes for call in calls if call.layer], buckets, parameters


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_buckets_of_ddp_are_counted_beside_the_layers(backend):
    for of_layers, buckets, parameters in run_ranks(in_ddp, 2, backend=backend):
        assert of_layers == bytes_of(3, 5)
        assert len(buckets) > 2
        assert sum(buckets) == parameters


def in_torchs_layer():
    """Return what torch.nn.SyncBatchNorm issues. Its operators are those for GPUs in plain PyTorch."""
    operators = torch_sync_operators.define()
    x, c = torch.randn(4, 3, 5, requires_grad=True), torch.zeros(3)
    with count_collectives() as calls:
        y = TorchFunction.apply(x, c + 1, c, c.clone(), c + 1, 1e-5, 0.1, dist.group.WORLD, 2)
        y.square().sum().backward()
    del operators
    return [call[:3] for call in calls]


def test_torchs_own_layer_is_counted():
    assert run_ranks(in_torchs_layer, 2) == [[("all_gather", 28, 2), ("all_reduce", 24, 2)]] * 2


def in_other_threads():
    found = []

    def step():
        found.append(train(Net(syncnorm.new_subgroups(2))))

    with count_collectives() as calls:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    return [*calls][-4:], found[0][0]


def test_other_threads_are_counted():
    for outer, inner in run_ranks(in_other_threads, 2):
        assert outer == inner
        assert [call.nbytes for call in outer] == bytes_of(3, 5)


def has_kernels():
    return torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "BackendSelect")


def nested():
    x = torch.zeros(2)
    with count_collectives() as outer:
        with contextlib.suppress(KeyError), count_collectives() as inner:
            dist.all_reduce(x)
            raise KeyError
        assert has_kernels()
        dist.barrier()
    assert not has_kernels()
    dist.all_reduce(x)
    return [call.name for call in inner], [call.name for call in outer]


def test_blocks_nest_and_end_with_an_exception():
    assert run_ranks(nested, 1) == [(["all_reduce"], ["all_reduce", "barrier"])]


def compiled(backend):
    """Return the calls of three steps, and how often it was compiled."""
    model, compilations = Net(), []

    def compile_graph(graph, inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    run = torch.compile(model, fullgraph=True, backend=compile_graph)
    x = torch.randn(4, 3, requires_grad=True)
    run(x).square().sum().backward()
    reduced = torch.compile(lambda x: functional.all_reduce(x, "sum", dist.group.WORLD) + 1, backend=compile_graph)
    with count_collectives() as calls:
        run(x).square().sum().backward()
        reduced(x.detach())
        reduced(x.detach())
    run(x).square().sum().backward()
    return list(calls), len(compilations)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_is_counted_and_not_compiled_again(backend):
    for calls, compilations in run_ranks(compiled, 2, "aot_eager", backend=backend):
        assert [call[:2] for call in calls] == [("all_reduce", n) for n in [*bytes_of(3, 5), 48, 48]]
        assert {call.layer for call in calls} == {""}
        assert compilations == 2


class OnSockets(LocalCommunicator):
    """A communicator of a program, which uses none of this package and of torch.distributed."""

    size = 2

    def all_reduce(self, tensor):
        return tensor.mul_(2)

    def all_gather(self, tensor):
        return [tensor.clone(), tensor.clone()]


def not_counted():
    rank = dist.get_rank()
    with count_collectives() as calls:
        send = dist.isend(torch.zeros(1), 1 - rank)
        dist.recv(torch.zeros(1), 1 - rank)
        send.wait()
        Net(OnSockets())(torch.randn(4, 3))
    return list(calls)


def test_point_to_point_calls_and_a_communicator_of_the_program_are_not_counted():
    assert run_ranks(not_counted, 2) == [[], []]


def checked():
    with syncnorm.debug():
        return train(Net(), steps=2)


def test_the_checks_of_debug_are_not_counted():
    for steps in run_ranks(checked, 2):
        assert [[call.nbytes for call in calls] for calls in steps] == [bytes_of(3, 5)] * 2


def test_each_collective_of_torch_is_known():
    """A new one in a later version of torch has to be added."""
    operators = {name.removeprefix("c10d::") for name in torch._C._dispatch_get_all_op_names() if "c10d::" in name[:6]}
    assert "allreduce_" in operators
    assert operators <= OPERATORS.keys() | POINT_TO_POINT | {"check_for_nan"}


def test_the_calls_are_a_sequence():
    with count_collectives() as calls:
        pass
    assert (len(calls), calls.nbytes, calls.count("all_reduce")) == (0, 0, 0)
    assert repr(calls) == "CollectiveCalls([])"
    calls._calls.append(CollectiveCall("barrier", 0, 2))
    assert calls[0] == ("barrier", 0, 2, "")
    assert calls[:1] == [calls[-1]]
    assert calls.count("barrier") == 1
