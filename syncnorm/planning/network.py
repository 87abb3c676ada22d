"""What a collective costs: the alpha-beta model of a network of nodes with several ranks each.

A message of n bytes between two ranks takes alpha + n * beta seconds: the latency, and n over the bandwidth. Logarithms
are rounded up to whole steps. All ranks send and receive at the same time, and links are not shared.

Sources: Hockney, The Communication Challenge for MPP: Intel Paragon and Meiko CS-2, Parallel Computing 20, 1994.
Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, International Journal of
High Performance Computing Applications 19, 2005.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Link", "Network", "direct", "doubling", "doubling_all_gather", "halving", "steps"]

BUCKETS = (1 << 20, 25 << 20)  # bytes of the first and of the other buckets of DistributedDataParallel


class Link(NamedTuple):
    """A path between two ranks.

    Attributes:
        latency: alpha, in seconds.
        bandwidth: 1 / beta, in bytes a second.
    """

    latency: float
    bandwidth: float

    def seconds(self, nbytes: float) -> float:
        """Return alpha + n * beta."""
        return self.latency + nbytes / self.bandwidth


def steps(ranks: int) -> int:
    """Return log2 of the number of ranks, rounded up."""
    return (ranks - 1).bit_length()


def halving(nbytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of Rabenseifner's all-reduce: a reduce-scatter by recursive halving, then an all-gather.

    These are 2 log2(p) steps, in which 2 (p - 1) / p of the message are sent. A ring sends as much in 2 (p - 1) steps.
    """
    return 2 * steps(ranks) * link.latency + 2 * (ranks - 1) / ranks * nbytes / link.bandwidth


def doubling(nbytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of an all-reduce by recursive doubling: log2(p) steps, each with the whole message."""
    return steps(ranks) * link.seconds(nbytes)


def direct(nbytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of an all-reduce in which each rank sends its message to each other one, one by one."""
    return (ranks - 1) * link.seconds(nbytes)


def doubling_all_gather(nbytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of an all-gather of n bytes of each rank: log2(p) steps, in which the messages double."""
    return steps(ranks) * link.latency + (ranks - 1) * nbytes / link.bandwidth


class Network(NamedTuple):
    """Nodes with the same number of ranks. Ranks are numbered node by node.

    Attributes:
        ranks_per_node: how many.
        within: the link between two ranks of a node.
        between: the link between ranks of two nodes.
    """

    ranks_per_node: int
    within: Link
    between: Link

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Return the seconds of an all-reduce by recursive doubling, or by halving if that is quicker."""
        on_node, nodes = self.levels(ranks)
        by_level = doubling(nbytes, on_node, self.within) + doubling(nbytes, nodes, self.between)
        return min(by_level, self._slowest(halving, nbytes, ranks))

    def two_levels(self, nbytes: float, ranks: int) -> float:
        """Return the seconds of an all-reduce within each node and a direct exchange between the nodes' first ranks.

        This is what this package does on the CPUs of several hosts, unless MPI sums.
        """
        on_node, nodes = self.levels(ranks)
        within = self.all_reduce(nbytes, on_node)
        return within + direct(nbytes, nodes, self.between)

    def all_gather(self, nbytes: float, ranks: int) -> float:
        """Return the seconds of an all-gather of n bytes of each rank."""
        return self._slowest(doubling_all_gather, nbytes, ranks)

    def gradients(self, nbytes: int, ranks: int) -> float:
        """Return the seconds of the all-reduces of DistributedDataParallel's buckets, one after another."""
        return sum(self.all_reduce(size, ranks) for size in buckets(nbytes))

    def levels(self, ranks: int) -> tuple[int, int]:
        """Return over how many ranks of a node, and over how many nodes, a group of consecutive ranks reaches."""
        on_node = min(ranks, self.ranks_per_node)
        return on_node, -(-ranks // on_node)

    def _slowest(self, algorithm: Callable[[float, int, Link], float], nbytes: float, ranks: int) -> float:
        links = [self.within, self.between] if self.levels(ranks)[1] > 1 else [self.within]
        return max(algorithm(nbytes, ranks, link) for link in links)

    def scaled(self, factor: float) -> Network:
        """Return a network on which everything takes `factor` times as long, or nothing if that is negative."""
        factor = max(0.0, factor)
        within, between = (
            Link(factor * link.latency, link.bandwidth / factor if factor else math.inf)
            for link in (self.within, self.between)
        )
        return self._replace(within=within, between=between)

    def numbers(self) -> dict[str, Any]:
        """Return the network as it is written to JSON."""
        return {
            "ranks_per_node": self.ranks_per_node,
            **{
                name: {"latency_us": 1e6 * link.latency, "bandwidth_gbps": 8e-9 * link.bandwidth}
                for name, link in (("within", self.within), ("between", self.between))
            },
        }


def buckets(nbytes: int) -> list[int]:
    """Return the bytes of the buckets in which DistributedDataParallel sums gradients, if it can fill each of them."""
    first, others = BUCKETS
    sizes = [min(first, nbytes)]
    rest = nbytes - sizes[0]
    sizes += [others] * (rest // others) + [rest % others]
    return [size for size in sizes if size]
