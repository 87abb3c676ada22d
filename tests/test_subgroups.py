"""Statistics shared within blocks of ranks."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import syncnorm
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import CountingCommunicator


def members(by):
    group = syncnorm.new_subgroups(by)
    return group.rank, group.size, group.all_gather_object(syncnorm.communicator().rank)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_blocks_of_k_ranks(run, world_size, k):
    for rank, (inner, size, ranks) in enumerate(run(members, world_size, k)):
        first = rank // k * k
        assert ranks == list(range(first, min(first + k, world_size)))
        assert (inner, size) == (rank - first, len(ranks))


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_ranks_of_one_machine_are_a_node(run, world_size):
    assert [ranks for _, _, ranks in run(members, world_size, "node")] == [list(range(world_size))] * world_size


def running_means(k):
    rank = syncnorm.communicator().rank
    layer = syncnorm.SyncBatchNorm(2, momentum=1.0, process_group=syncnorm.new_subgroups(k))
    layer(torch.full((2 + rank, 2), float(rank)))
    return layer.running_mean[0].item()


@pytest.mark.parametrize("world_size", [3, 4])
def test_statistics_stay_in_the_block(run, world_size):
    """Rank r brings 2 + r values r."""
    first = (2 * 0 + 3 * 1) / 5
    second = 2.0 if world_size == 3 else (4 * 2 + 5 * 3) / 9
    expected = [first, first, second, second][:world_size]
    assert run(running_means, world_size, 2) == pytest.approx(expected)


def parts_of(group, by):
    """Return the ranks of the job that are in this rank's part of a group, and their sum over it."""
    part = syncnorm.new_subgroups(by, group)
    total = part.all_reduce(torch.tensor([float(syncnorm.communicator().rank)]))
    return part.all_gather_object(syncnorm.communicator().rank), total.item()


def parts_of_communicators():
    """Divide the halves of 4 ranks, and count the collectives of one of them."""
    job = syncnorm.communicator()
    half = job.split(job.rank // 2)
    counted = CountingCommunicator(half)
    return [parts_of(group, by) for group in (half, counted) for by in (1, 2, "node")], counted.calls


def parts_of_torch_groups():
    """Divide a process group of each half of 4 ranks, and both axes of a mesh."""
    half = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return [parts_of(group, by) for group in (half, mesh["tp"], mesh["dp"]) for by in (1, 2, "node")]


def expected_parts(rank, *groups):
    return [(ranks, float(sum(ranks))) for group in groups for ranks in ([rank], group, group)]


@pytest.mark.parametrize("world_size", [4])
def test_parts_of_a_communicator(run, world_size):
    for rank, (parts, calls) in enumerate(run(parts_of_communicators, world_size)):
        half = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert parts == expected_parts(rank, half, half)
        assert [call.name for call in calls] == ["split", "split", "all_gather_object", "split"]


def test_parts_of_a_process_group_and_a_mesh():
    for rank, parts in enumerate(syncnorm.testing.run_ranks(parts_of_torch_groups, 4)):
        half, across = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert parts == expected_parts(rank, half, half, across)


def parts_after_an_unequal_start():
    rank = dist.get_rank()
    dist.new_group([0])
    halves = dist.new_group([0, 1]), dist.new_group([2, 3])
    try:
        return syncnorm.new_subgroups(2, halves[rank // 2]).size
    except RuntimeError as error:
        return str(error)


def test_ranks_in_unequally_many_groups_are_told_so_and_do_not_hang():
    results = syncnorm.testing.run_ranks(parts_after_an_unequal_start, 4)
    assert results[2:] == [2, 2]
    assert results[0] == results[1]
    assert "equally many process groups, got rank 0 in 3, rank 1 in 2: call new_subgroups before" in results[0]


def without_split():
    alone = LocalCommunicator()
    names = ("rank", "size", "all_reduce", "broadcast", "all_gather", "all_gather_object", "barrier")
    return SimpleNamespace(**{name: getattr(alone, name) for name in names})


class Inherits(syncnorm.Communicator):
    rank, size = 0, 1


def test_a_communicator_without_split_can_be_a_process_group_and_not_be_divided():
    made = without_split()
    assert isinstance(made, syncnorm.Communicator)
    assert syncnorm.communicator(made) is made
    assert syncnorm.SyncBatchNorm(2, process_group=made)(torch.randn(3, 2)).shape == (3, 2)
    for group in (made, Inherits(), CountingCommunicator(made)):
        with pytest.raises(TypeError, match=r"expected a communicator that defines split\(block\), got .*: add"):
            syncnorm.new_subgroups(1, group)
    assert not isinstance(SimpleNamespace(rank=0, size=1), syncnorm.Communicator)
    assert syncnorm.new_subgroups(1, LocalCommunicator()).size == 1
    with pytest.raises(TypeError, match=r"expected process_group to be .* got 3"):
        syncnorm.new_subgroups(1, 3)


@pytest.mark.parametrize("by", [0, -1, "rack", None, 1.5, True])
def test_what_is_no_division(by):
    with pytest.raises(ValueError, match='expected "node" or a positive number of ranks'):
        syncnorm.new_subgroups(by)
