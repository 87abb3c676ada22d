"""Forked children of ranks, which leave alone what their parents hold of the job."""

import pytest
from forks import FORKED, check
from launchers import launch, launch_one_by_one


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_children_end_and_ranks_train_on(launcher):
    check([3, 1, 0, 4], launch(launcher, 2, FORKED, "raise SystemExit"))


def test_children_where_rank_0_serves_the_store():
    check([3, 1, 0], *launch_one_by_one(2, FORKED))
