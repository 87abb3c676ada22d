"""One contract for every communicator; and what `process_group` may be."""

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hosts import move_to
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from virtual_cluster import need_namespaces

import syncnorm
from syncnorm import testing
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import CountingCommunicator, run_ranks

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
]
SHAPES = [(5,), (), (0,), (2, 3), (0, 4)]
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def contribution(rank, shape, dtype, device):
    """Return small integers, which every dtype holds and sums exactly."""
    return (torch.arange(torch.Size(shape).numel()).reshape(shape) + 2 * rank + 1).to(device, dtype)


def strided(tensor):
    """Return the same values with every axis but the first non-contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


class Contract:
    """The promises of `syncnorm.Communicator`; each method is called on every rank of a group."""

    @staticmethod
    def has_rank_and_size(group):
        assert isinstance(group, syncnorm.Communicator)
        assert group.all_gather_object((group.rank, group.size)) == [(r, group.size) for r in range(group.size)]

    @staticmethod
    def all_reduce_sums_in_place(group):
        for device in DEVICES:
            for dtype in DTYPES:
                for shape in SHAPES:
                    mine = contribution(group.rank, shape, dtype, device)
                    total = sum(contribution(r, shape, dtype, device) for r in range(group.size))
                    assert group.all_reduce(mine) is mine
                    assert torch.equal(mine, total), (dtype, shape)

    @staticmethod
    def all_reduce_gives_the_same_bits_everywhere(group):
        torch.manual_seed(group.rank)
        mine = torch.randn(1001, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (1001,))
        totals = group.all_gather(group.all_reduce(mine))
        assert all(torch.equal(total, mine) for total in totals)

    @staticmethod
    def strided_tensors_are_written_in_place(group):
        mine = strided(contribution(group.rank, (2, 3), torch.float32, "cpu"))
        total = sum(contribution(r, (2, 3), torch.float32, "cpu") for r in range(group.size))
        assert not mine.is_contiguous()
        assert group.all_reduce(mine) is mine
        assert torch.equal(mine, total)
        mine = strided(contribution(group.rank, (2, 3), torch.float16, "cpu"))
        assert group.broadcast(mine) is mine
        assert torch.equal(mine, contribution(0, (2, 3), torch.float16, "cpu"))

    @staticmethod
    def conjugates_and_negatives_move_as_the_numbers_they_are(group):
        ours = [torch.tensor([complex(r, r + 1)], dtype=torch.complex64) for r in range(group.size)]
        conjugate = ours[group.rank].conj()
        assert conjugate.is_conj()
        assert conjugate.imag.is_neg()
        for mine, expected in [
            (conjugate, [z.conj().resolve_conj() for z in ours]),
            (conjugate.imag, [-z.imag for z in ours]),
        ]:
            assert all(map(torch.equal, group.all_gather(mine), expected))
            assert torch.equal(group.broadcast(mine.clone()), expected[0])
            assert torch.equal(group.all_reduce(mine.clone()), sum(expected))
        total = sum(z.conj() for z in ours)
        assert torch.equal(group.all_reduce(conjugate), total)
        assert torch.equal(ours[group.rank], total.conj())  # it was written in place

    @staticmethod
    def tensors_that_require_grad_are_written_in_place(group):
        mine = torch.ones(3, requires_grad=True)
        with torch.no_grad():
            group.all_reduce(mine)
        assert torch.equal(mine.detach(), torch.full((3,), float(group.size)))

    @staticmethod
    def broadcast_takes_every_root(group):
        for device in DEVICES:
            for dtype in [*DTYPES, torch.bool]:
                for shape in SHAPES:
                    for root in range(group.size):
                        mine = contribution(group.rank, shape, dtype, device)
                        assert group.broadcast(mine, root) is mine
                        assert torch.equal(mine, contribution(root, shape, dtype, device)), (dtype, shape)

    @staticmethod
    def all_gather_is_in_rank_order(group):
        for device in DEVICES:
            for dtype in DTYPES:
                for shape in SHAPES:
                    mine = contribution(group.rank, shape, dtype, device)
                    gathered = group.all_gather(mine)
                    expected = [contribution(r, shape, dtype, device) for r in range(group.size)]
                    assert all(torch.equal(*pair) for pair in zip(gathered, expected, strict=True)), (dtype, shape)
                    assert torch.equal(mine, expected[group.rank])
                    assert all(t.device == mine.device for t in gathered)

    @staticmethod
    def all_gather_object_takes_unequal_objects(group):
        objects = group.all_gather_object({"rank": group.rank, "payload": "x" * 1000 * group.rank})
        assert [len(o["payload"]) for o in objects] == [1000 * r for r in range(group.size)]

    @staticmethod
    def split_returns_the_ranks_of_the_block(group):
        part = group.split(group.rank % 2)
        assert isinstance(part, syncnorm.Communicator)
        assert part.all_gather_object(group.rank) == list(range(group.rank % 2, group.size, 2))
        assert (part.rank, part.size) == (group.rank // 2, len(range(group.rank % 2, group.size, 2)))

    @staticmethod
    def barrier_returns_after_all_have_entered(group):
        time.sleep(0.1 * group.rank)
        entered = time.monotonic()  # one clock for all processes of a machine
        assert group.barrier() is None
        left = time.monotonic()
        assert left >= max(group.all_gather_object(entered))


PROMISES = [name for name in vars(Contract) if not name.startswith("_")]


def keep_all():
    """Return the promises that were kept, which are all unless one raised."""
    for promise in PROMISES:
        try:
            getattr(Contract, promise)(syncnorm.communicator())
        except Exception as error:
            raise AssertionError(f"{promise}: {type(error).__name__}: {error}") from error
    return PROMISES


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_contract(run, world_size):
    assert run(keep_all, world_size) == [PROMISES] * world_size


def keep_all_on(hosts):
    group = syncnorm.communicator()
    move_to(hosts[group.rank])
    return keep_all(), group.route()


@pytest.mark.parametrize("hosts", ["aaaa", "aaaaaaaa", "aabb", "aaab"])
def test_contract_in_shared_memory(hosts):
    """Also of more ranks than cores, and of two hosts."""
    need_namespaces()
    for promises, route in testing.run_ranks(keep_all_on, len(hosts), hosts):
        assert promises == PROMISES
        assert route.startswith("in shared memory")


def test_contract_without_shared_memory(monkeypatch):
    monkeypatch.setenv("SYNCNORM_SHARED_MEMORY", "0")
    assert testing.run_ranks(keep_all, 3) == [PROMISES] * 3


@pytest.mark.parametrize("promise", PROMISES)
def test_contract_of_this_process_alone(promise):
    getattr(Contract, promise)(LocalCommunicator())


@pytest.mark.parametrize("promise", PROMISES)
def test_contract_through_a_counter(promise):
    getattr(Contract, promise)(CountingCommunicator(LocalCommunicator()))


@pytest.mark.mpi
@pytest.mark.parametrize("promise", PROMISES)
def test_contract_of_mpi_with_a_timeout(promise):
    from mpi4py import MPI

    from syncnorm.mpi.communicator import MpiCommunicator

    getattr(Contract, promise)(MpiCommunicator(MPI.COMM_WORLD, timedelta(seconds=30)))


@pytest.mark.mpi
def test_mpi_refuses_to_sum_what_it_has_no_type_for():
    from mpi4py import MPI

    with pytest.raises(TypeError, match=r"expected a tensor of a dtype that MPI can sum, got torch\.bool"):
        syncnorm.communicator(MPI.COMM_SELF).all_reduce(torch.ones(2, dtype=torch.bool))


@pytest.mark.mpi
def test_an_mpi_collective_whose_peers_stay_away_times_out():
    from mpi4py import MPI

    from syncnorm.mpi.communicator import MpiCommunicator

    own = MPI.COMM_WORLD.Dup()
    group = MpiCommunicator(own, timedelta(seconds=0.2))
    if group.rank == 0:
        with pytest.raises(syncnorm.DesyncError, match=r"MPI_Allreduce on rank 0 of \d waited 0.2 s for its peers"):
            group.all_reduce(torch.zeros(2))
        for again in (group, MpiCommunicator(own), syncnorm.communicator(own)):
            assert_it_has_failed(again, r"MPI_Allreduce on rank 0 of \d waited 0.2 s")
    MPI.COMM_WORLD.Barrier()
    if group.rank != 0:
        late = torch.ones(2)
        MpiCommunicator(own, timedelta(seconds=30)).all_reduce(late)  # so that rank 0's request ends
        assert late.tolist() == [group.size - 1] * 2
    MPI.COMM_WORLD.Barrier()
    assert_it_has_failed(group, "MPI_Allreduce") if group.rank == 0 else None  # though its request has ended
    fresh = MpiCommunicator(MPI.COMM_WORLD.Dup())
    assert fresh.all_reduce(torch.ones(1)).item() == fresh.size


def assert_it_has_failed(group, call):
    """Every call that would communicate raises, and says which call failed first, when, and what to do."""
    for name, arguments in [
        ("all_reduce", [torch.ones(2, dtype=torch.float64)]),
        ("all_reduce", [torch.ones(2, dtype=torch.float16)]),
        ("broadcast", [torch.ones(2)]),
        ("all_gather", [torch.ones(2)]),
        ("all_gather_object", [1]),
        ("barrier", []),
        ("local_rank", []),
        ("split", [0]),
    ]:
        with pytest.raises(
            syncnorm.DesyncError, match=rf"failed at \d\d:\d\d:\d\d: {call}.*start a new one from the last checkpoint"
        ):
            getattr(group, name)(*arguments)


@pytest.mark.mpi
def test_an_mpi_communicator_is_not_used_after_an_error():
    from mpi4py import MPI

    from syncnorm.mpi.communicator import MpiCommunicator

    for timeout in (None, timedelta(seconds=30)):
        group = MpiCommunicator(MPI.COMM_WORLD.Dup(), timeout)
        with pytest.raises((MPI.Exception, syncnorm.DesyncError), match=r"MPI_ERR_ROOT|Invalid root"):
            group.broadcast(torch.ones(2), root=99)
        assert_it_has_failed(group, r"MPI_Bcast on rank \d of \d: (MPI_ERR_ROOT|Invalid root)")


def subgroup_of_ranks(ranks):
    group = dist.new_group(ranks)
    try:
        return syncnorm.communicator(group).all_gather_object(dist.get_rank())
    except ValueError as error:
        return str(error)


def test_a_torch_group_that_this_rank_is_not_in():
    results = syncnorm.testing.run_ranks(subgroup_of_ranks, 3, [0, 2])
    assert results[0] == results[2] == [0, 2]
    assert results[1] == "expected a process group that this rank is a member of, got one without rank 1"


def layer_on_a_foreign_group():
    group = dist.new_group([0])
    layer = syncnorm.SyncBatchNorm(2, process_group=group)
    before = layer.state_dict()
    try:
        layer(torch.randn(4, 2))
    except ValueError as error:
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
        return str(error)
    return None


def test_a_layer_on_a_group_that_this_rank_is_not_in():
    member, foreigner = syncnorm.testing.run_ranks(layer_on_a_foreign_group, 2)
    assert member is None
    assert foreigner.endswith("without rank 1")


def mesh_groups():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r"expected a one-dimensional DeviceMesh, got one of shape \(2, 2\)"):
        syncnorm.communicator(mesh)
    return [syncnorm.communicator(mesh[axis]).all_gather_object(dist.get_rank()) for axis in ("dp", "tp")]


def test_a_device_mesh():
    results = syncnorm.testing.run_ranks(mesh_groups, 4)
    assert results == [[[0, 2], [0, 1]], [[1, 3], [0, 1]], [[0, 2], [2, 3]], [[1, 3], [2, 3]]]


def mesh_of_others():
    mesh = DeviceMesh("cpu", [0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match=r"expected a DeviceMesh that contains this rank, got .* on rank 1"):
            syncnorm.communicator(mesh)


def test_a_device_mesh_that_this_rank_is_not_in():
    run_ranks(mesh_of_others, 2)


def broadcast_in_subgroup():
    ranks = [1, 2]
    group = dist.new_group(ranks)
    if dist.get_rank() not in ranks:
        return None
    return syncnorm.communicator(group).broadcast(torch.tensor(dist.get_rank()), root=1).item()


def test_the_root_is_a_rank_of_the_group():
    assert syncnorm.testing.run_ranks(broadcast_in_subgroup, 3) == [None, 2, 2]


def test_communicators_pass_through():
    group = CountingCommunicator(LocalCommunicator())
    assert syncnorm.communicator(group) is group


def test_none_is_this_process_alone():
    assert isinstance(syncnorm.communicator(), LocalCommunicator)


def test_anything_else_is_a_type_error():
    with pytest.raises(TypeError, match=r"expected process_group to be a torch\.distributed ProcessGroup, .* got 3"):
        syncnorm.communicator(3)
    with pytest.raises(TypeError, match=r"got <class .*LocalCommunicator'>"):
        syncnorm.communicator(LocalCommunicator)  # the class, not a communicator
    with pytest.raises(TypeError, match="got 'gloo'"):
        syncnorm.SyncBatchNorm(3, process_group="gloo")


def test_an_object_of_the_same_class_as_a_communicator_may_be_none():
    alone = LocalCommunicator()
    names = ("rank", "size", "all_reduce", "broadcast", "all_gather", "all_gather_object", "barrier")
    made = SimpleNamespace(**{name: getattr(alone, name) for name in names})
    assert syncnorm.communicator(made) is made
    with pytest.raises(TypeError, match=r"got namespace\(\)"):
        syncnorm.communicator(SimpleNamespace())


@pytest.mark.mpi
def test_comm_null_names_the_rank():
    from mpi4py import MPI

    with pytest.raises(ValueError, match=rf"got MPI.COMM_NULL on rank {MPI.COMM_WORLD.rank} of MPI.COMM_WORLD"):
        syncnorm.communicator(MPI.COMM_NULL)


def test_this_process_alone_has_one_root():
    with pytest.raises(ValueError, match="expected a root rank below the group's size 1, got 1"):
        LocalCommunicator().broadcast(torch.zeros(1), root=1)
