"""What a layer's message belongs to."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MARK", "NO_BATCHES", "Label", "report"]

MARK = b"syncnorm "  # how a message for a report begins
NO_BATCHES = "has no batches left"  # what a rank in syncnorm.join reports


def report(text: str, length: int) -> bytes:
    """Return the message of so many bytes in which a rank tells the others a text."""
    return (MARK + text.encode())[:length].ljust(length)


class Label(NamedTuple):
    """What a message belongs to.

    Communicators that can show it to the other ranks define `takes_labels = True`, and then
    `all_reduce(tensor, label=None)`.

    Attributes:
        number: equal on two ranks if their messages belong together, below 2^20.
        call: of the layer, counted from 1. 0: not counted.
        backward: whether the message is that of the backward pass.
        layer: the name of the layer for reports, at most 160 bytes.
    """

    number: int
    call: int
    backward: bool
    layer: bytes

    def __str__(self) -> str:
        call = f"call {self.call} of " if self.call else ""
        return f"{call}{self.layer.decode(errors='ignore')}, {'backward' if self.backward else 'forward'}"
