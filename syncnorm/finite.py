"""Find NaN and Inf before they enter the statistics of other ranks, and name the rank that has them.

A sum over the ranks that is not finite is so on all of them. So a check needs no further collective while all is well:
all ranks find it at once, and then tell each other which of them it came from.
"""

from __future__ import annotations

import contextlib
import os
from types import TracebackType

import torch
from torch import Tensor

from . import transforms
from .communicators.label import NO_BATCHES
from .errors import NonFiniteError, printable
from .exchange import ELSEWHERE, Exchange

__all__ = ["check", "checks", "debug"]

FEW = 8  # channels that a message names
FINITE = "finite"

_asked = os.environ.get("SYNCNORM_DEBUG", "0")
if _asked not in ("0", "1"):
    raise ValueError(f"expected SYNCNORM_DEBUG to be 0 or 1, got {_asked!r}")
_blocks = int(_asked)  # of `debug` that this process is in


class debug(contextlib.ContextDecorator):  # noqa: N801  # as torch.no_grad
    """Check for NaN and Inf before the ranks take them into statistics or gradients.

        with syncnorm.debug():
            loss = model(x)
            loss.backward()

    In the block all layers of SyncBatchNorm check their inputs in training, as with `check_finite=True`, and in
    backward what the gradients of their outputs add to the sums of all ranks. The environment variable SYNCNORM_DEBUG=1
    does the same for the whole program. Use it on all ranks or on none.

    A check reads as many numbers as the message of a layer has. On a GPU it waits for the device. What torch.compile
    has compiled, and transforms of torch.func, are not checked. A `torch.amp.GradScaler` makes gradients infinite on
    purpose: turn it off, or use `check_finite=True` instead, which only checks inputs.

    Collectives: no additional ones, unless a value is not finite: then one all-gather of 512 bytes.

    Raises:
        NonFiniteError: on all ranks, with the layer and the ranks. This layer has not changed its running statistics.
            Layers before it have. A program can catch an error in forward, skip the step and train on. After an error
            in backward it must zero the gradients, and DistributedDataParallel cannot train on.
    """

    def __enter__(self) -> debug:
        global _blocks
        _blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _blocks
        _blocks -= 1


def checks(asked: bool = False) -> bool:
    """Return whether a layer checks: if it is asked to or in a block of `debug`, and values can be read now."""
    return (asked or _blocks > 0) and not (transforms.compiling() or transforms.active())


def _is_finite(values: Tensor) -> bool:
    """Return whether all values are finite. Waits for the device."""
    return bool(torch.isfinite(values.detach()).all())


def check(total: Tensor, own: Tensor, tensor: Tensor, exchange: Exchange, *, backward: bool) -> None:
    """Raise NonFiniteError unless the sum over the ranks is finite. Collective if it is not.

    Args:
        total: the sum over the ranks, (2C + 3,) or (2C + 2,).
        own: a copy of what this rank has added, or of one rank's moments.
        tensor: from which it comes: the input or the gradient of the output.
        exchange: of the call of the layer.
        backward: the direction of the message.
    """
    if _is_finite(total):
        return
    places = exchange.places(_described(own, tensor), backward=backward)
    found = {rank: place for rank, place in enumerate(places) if not place.endswith((FINITE, NO_BATCHES, ELSEWHERE))}
    name = "gradients" if backward else "inputs"
    raise NonFiniteError(
        "\n".join(
            [
                f"expected finite {name} on all ranks, got NaN or Inf in",
                *(f"  rank {rank}: {printable(place)}" for rank, place in (found or dict(enumerate(places))).items()),
            ]
        )
    )


def _described(own: Tensor, tensor: Tensor) -> str:
    """Return which values of this rank are not finite."""
    if _is_finite(own):
        return FINITE
    channels = tensor.shape[1]
    finite = torch.isfinite(own[: 2 * channels]).view(2, channels).all(0)
    where = (~finite).nonzero().flatten().tolist()
    some = ", ".join(map(str, where[:FEW])) + (", ..." if len(where) > FEW else "")
    count = int((~torch.isfinite(tensor)).sum())
    what = f"{count} value{'s' * (count != 1)}" if count else "values whose squares have no float64"
    return f"{what} in channel{'s' * (len(where) != 1)} {some}"
