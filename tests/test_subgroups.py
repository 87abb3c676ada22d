"""Statistics shared within blocks of ranks."""

import pytest
import torch

import syncnorm


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


@pytest.mark.parametrize("by", [0, -1, "rack", None, 1.5])
def test_what_is_no_division(by):
    with pytest.raises(ValueError, match='expected "node" or a positive number of ranks'):
        syncnorm.new_subgroups(by)
