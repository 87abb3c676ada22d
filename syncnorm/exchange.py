"""The collectives of one call of a layer, and the stamp by which the ranks see that their messages belong together.

The all-reduces of different layers, calls and directions often have the same size, so no backend notices if ranks mix
them up. Each message therefore carries a number, made of the layer, the call, the direction, the dtype and C. The
kernels check it after the sum (`kernels.Stamp`).
"""

from __future__ import annotations

import functools
import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from .communicators import ALONE, Communicator, uncounted
from .communicators.label import MARK, Label, report
from .communicators.listeners import listeners, of_layer, unreported
from .errors import DesyncError, printable
from .job import desync
from .kernels import Stamp, flags

__all__ = ["NO_EXCHANGE", "Exchange", "Layer", "is_compiled", "note_compilation", "of_function"]

ISSUES_COLLECTIVES = True  # lets `syncnorm.job.desync` recognize these functions

NUMBERS = 2**20  # of which a stamp is one
LONGEST = 160  # bytes of a layer's name in a label
MESSAGE = 512  # bytes that each rank sends for a report
RECENT = 4096  # stamps of which a GPU's flag can be explained

_compiled = False  # whether torch.compile has traced an exchange of this process
_recent: dict[tuple[int, int], tuple[Exchange, bool]] = {}  # by device and number: whose message, and the direction


class Layer:
    """A layer as its messages name it.

    Args:
        name: for reports.
        identity: what tells layers apart, the same text on all ranks.
        axis: what the values in a message are called that belong together: "C" channels, or "R" positions.
    """

    __slots__ = "axis", "identity", "key", "name"

    def __init__(self, name: str, identity: str, axis: str = "C"):
        self.name = name.encode()[:LONGEST]
        self.identity = identity
        self.axis = axis
        self.key = self.key_for(torch.float32, 0)  # the last one

    def key_for(self, dtype: torch.dtype, channels: int) -> tuple[torch.dtype, int, int, int]:
        """Return dtype and channels with what they give: an odd factor and an offset, the same on all ranks."""
        digest = hashlib.sha256(f"{self.identity}, {dtype}, {channels}".encode()).digest()
        factor, offset = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
        return dtype, channels, factor % NUMBERS | 1, offset % NUMBERS

    def __str__(self) -> str:
        return self.name.decode(errors="ignore")


class Exchange:
    """The collectives of one call of a layer.

    The stamp of a message is the number

        (offset + factor * (2 * call + backward)) mod 2^20

    with an odd factor and an offset from a hash of the layer, the dtype and C. So the messages of one layer within
    2^19 calls have different numbers, and those of two layers have the same one with a probability of 2^-20.

    Args:
        group: the ranks.
        layer: which layer they are in. None: torch.compile is tracing, and all messages have the number 0. This also
            holds once it has traced any layer of this process, since a call may then be compiled or not, and the ranks
            may differ in that.
        call: of the layer, from 1, the same on all ranks. 0: not counted.
    """

    __slots__ = "call", "channels", "dtype", "factor", "group", "layer", "offset", "shape", "size"

    in_graph = False  # of torch.compile

    def __init__(self, group: Communicator, layer: Layer | None = None, call: int = 0):
        self.group = group
        self.layer = None if _compiled else layer
        self.call = call
        self.size = group.size
        self.factor = self.offset = 0

    @property
    def rank(self) -> int:
        """The rank of this process in the group."""
        return self.group.rank

    def on(self, input: Tensor, channels: int) -> Exchange:
        """Set the input of the call, whose messages have values for so many channels. Return this exchange."""
        layer, dtype = self.layer, input.dtype
        if layer is not None:
            key = layer.key
            if key[0] is not dtype or key[1] != channels:
                key = layer.key = layer.key_for(dtype, channels)
            self.dtype, self.channels, self.factor, self.offset = key
            self.shape = input.shape
        return self

    def stamp(self, *, backward: bool) -> Stamp | None:
        """Return the stamp of the message in a direction. None: there is one rank, and no message."""
        if self.size == 1:
            return None
        return Stamp(self._number(backward), self.size)

    def all_reduce(self, tensor: Tensor, *, backward: bool) -> Tensor:
        """Sum the message of a direction over the ranks, in place, and return it.

        Raises:
            DesyncError: an earlier message on the same GPU had another stamp on another rank.
        """
        if self.layer is None:
            return self.group.all_reduce(tensor)
        number = self._number(backward)
        label = Label(number, self.call, backward, self.layer.name)
        if flags.in_use:
            _raise_if_flagged(tensor, self.group)
            self._remember(tensor.get_device(), number, backward)
        if listeners:
            with of_layer(label):
                return self._send(tensor, label)
        return self._send(tensor, label)

    def mismatch(self, *, backward: bool) -> DesyncError:
        """Return the error for a message whose stamp did not match. It says what each rank was in.

        Collective: one all-gather of 512 bytes on the CPU. All ranks that have summed the message call this.
        """
        try:
            places = self.places("", backward=backward)
        except RuntimeError as error:  # the other ranks are elsewhere
            return DesyncError(
                f"{EXPECTED} {self._place(backward)} on rank {self.rank}, while the other ranks were elsewhere and did "
                f"not say where: {error}"
            )
        return DesyncError("\n".join([EXPECTED, *(f"  rank {i}: {printable(p)}" for i, p in enumerate(places))]))

    def places(self, addition: str, *, backward: bool) -> list[str]:
        """Return what each rank is in, with what it adds. Collective: one all-gather of 512 bytes on the CPU."""
        here = f"{self._place(backward)}: {addition}" if addition else self._place(backward)
        message = torch.frombuffer(bytearray(report(here, MESSAGE)), dtype=torch.uint8)
        with unreported(), torch._C._DisableFuncTorch():
            received = [t.numpy().tobytes().rstrip() for t in uncounted(self.group).all_gather(message)]
        return [t[len(MARK) :].decode(errors="ignore") if t.startswith(MARK) else ELSEWHERE for t in received]

    def _send(self, tensor: Tensor, label: Label) -> Tensor:
        if getattr(self.group, "takes_labels", False):
            return self.group.all_reduce(tensor, label)  # type: ignore[call-arg]
        return self.group.all_reduce(tensor)

    def _number(self, backward: bool) -> int:
        return (self.offset + self.factor * (2 * self.call + backward)) % NUMBERS

    def _remember(self, device: int, number: int, backward: bool) -> None:
        if len(_recent) >= RECENT:
            for key in list(_recent)[: RECENT // 2]:
                del _recent[key]
        _recent[device, number] = self, backward

    def _place(self, backward: bool) -> str:
        if self.layer is None:
            return "a layer that is compiled on this rank"
        call = f"call {self.call} of " if self.call else ""
        direction = "backward" if backward else "forward"
        layer, dtype = self.layer, str(self.dtype).removeprefix("torch.")
        return f"{direction} of {call}{layer}: {layer.axis} = {self.channels}, {dtype}, input {tuple(self.shape)}"


EXPECTED = "expected all ranks to be in the same call of the same layer, got"
ELSEWHERE = "in a different collective"
NO_EXCHANGE = Exchange(ALONE)


def note_compilation() -> None:
    """Send no more stamps: torch.compile has traced a call."""
    global _compiled
    _compiled = True


def is_compiled() -> bool:
    """Return whether torch.compile has traced an exchange of this process. The other ranks have, too."""
    return _compiled


@functools.cache
def of_function(name: str, axis: str = "C") -> Layer:
    """Return the layer that the calls of a function without a module stand for."""
    return Layer(f"{name} (called as a function)", name, axis)


def _raise_if_flagged(tensor: Tensor, group: Communicator) -> None:
    """Raise DesyncError if the device of a tensor has found a stamp that did not match so far. Does not wait for it."""
    device = tensor.get_device()
    number = flags.take(device)
    if number is None:
        return
    exchange, backward = _recent.get((device, number), (None, False))
    here = "a message of a layer" if exchange is None else exchange._place(backward)
    title = f"{EXPECTED} {here} on rank {group.rank}, while another rank was elsewhere"
    raise DesyncError("\n".join(filter(None, [title, desync.collect(_ranks_of(group))])))


def _ranks_of(group: Communicator) -> list[int]:
    """Return the ranks of the group in the job."""
    process_group = getattr(uncounted(group), "group", None)
    if isinstance(process_group, dist.ProcessGroup):
        return dist.get_process_group_ranks(process_group)
    return list(range(group.size))
