"""The sum over hosts: one rank of each host, its leader, exchanges the sums of the hosts with the others.

Each leader sends its sum to all others, point to point, over the backend of the process group, and adds what it
receives in the order of the hosts. For the small messages of a norm, one such step is faster than the two or more of an
all-reduce that sends each value over the network once.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Leaders"]

TAG = 0x53594E43  # of the messages, so that they are not taken for those of the program
SLOT, VALUES_AT = 256 + 65536, 256  # bytes of `Slot` in shared_memory.h, and where its values begin
COMPARED = 40  # bytes of a message that are equal on all ranks
REFUSED = bytes([255] * 7 + [254])  # a number that no label has


class Leaders:
    """The first ranks of all hosts.

    Args:
        group: the process group. None stands for the default group.
        ranks: the leaders, as ranks of the group, in the order of the hosts.
        rank: this rank, if it is one of them. The others only know that there are several hosts.
    """

    def __init__(self, group: dist.ProcessGroup | None, ranks: Sequence[int], rank: int):
        self.group, self.ranks, self.rank = group, ranks, rank
        self._received = {other: torch.empty(SLOT, dtype=torch.uint8) for other in ranks if other != rank}
        self._sent: list[object] = []  # until the messages are away

    def all_reduce(self, slot: int, size: int, dtype: torch.dtype, agrees: bool) -> bool:
        """Sum the values of a slot over the hosts, in place.

        Args:
            slot: the address of the message and the values.
            size: bytes of the values. 0: only compare the messages.
            dtype: of the values.
            agrees: whether the ranks of this host have sent the same message.

        Returns:
            whether the ranks of all hosts have. The same on all leaders.

        Raises:
            RuntimeError: of the backend, such as for a rank that has ended, or after its timeout.
        """
        own = torch.frombuffer((ctypes.c_uint8 * SLOT).from_address(slot), dtype=torch.uint8)
        frame = own[: VALUES_AT + size] if agrees else _refusal()
        receiving = [self._receive(other) for other in self._received]
        sending = [self._send(frame, other) for other in self._received]
        for work in (*receiving, *sending):
            work.wait()
        expected = bytes(own[:COMPARED].numpy())
        if not agrees or any(bytes(other[:COMPARED].numpy()) != expected for other in self._received.values()):
            return False
        if size:
            of_hosts = [own if rank == self.rank else self._received[rank] for rank in self.ranks]
            values = [frame[VALUES_AT : VALUES_AT + size].view(dtype) for frame in of_hosts]
            total = values[0].clone()
            for of_host in values[1:]:
                total += of_host
            own[VALUES_AT : VALUES_AT + size].view(dtype).copy_(total)
        return True

    def give_up(self) -> None:
        """Tell the other leaders that this host has no sum, so that they do not wait for it."""
        with contextlib.suppress(RuntimeError):
            self._sent += [self._send(_refusal(), other) for other in self._received]

    def _send(self, frame: Tensor, leader: int) -> dist.Work:
        work = dist.isend(frame, group=self.group, tag=TAG, group_dst=leader)
        assert work is not None  # this rank is in the group
        return work

    def _receive(self, leader: int) -> dist.Work:
        work = dist.irecv(self._received[leader], group=self.group, tag=TAG, group_src=leader)
        assert work is not None
        return work


def _refusal() -> Tensor:
    return torch.frombuffer(bytearray(REFUSED.ljust(VALUES_AT, b"\0")), dtype=torch.uint8)
