"""What DesyncError says of ranks that are in different places."""

import re


def check_report(found, title, world_size, of_rank_0, of_rank_1):
    """Assert that all ranks have the same report, with a line for each rank, and went on after it.

    `found`: of each rank, the text of its error, and whether its next all-reduce was right.
    """
    assert len(set(found)) == 1, "other ranks say otherwise"
    text, goes_on = found[0]
    assert goes_on
    first, *ranks = text.splitlines()
    assert first == title
    assert len(ranks) == world_size
    assert re.fullmatch(f"  rank 0: .*{of_rank_0}.*", ranks[0])
    assert re.fullmatch(f"  rank 1: .*{of_rank_1}.*", ranks[1])
