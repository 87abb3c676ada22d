"""Doubles of groups of ranks, for what must not communicate."""


class Unreachable:
    """A group of two whose collectives fail the test."""

    rank, size = 0, 2

    def all_reduce(self, tensor):
        raise AssertionError("a collective was entered")

    broadcast = all_gather = all_gather_object = barrier = all_reduce
