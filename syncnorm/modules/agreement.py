"""Check that all ranks of a group are in the same layer, before the first collectives of each layer.

The all-reduces of two layers with the same C have the same size, so no backend notices if ranks mix them up. In its
first calls each layer therefore sends what identifies it: the model that called it, its path there, C and dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import transforms
from ..communicators import Communicator, uncounted
from ..communicators.label import NO_BATCHES, report
from ..communicators.listeners import unreported
from ..errors import DesyncError
from ..exchange import Exchange, Layer, is_compiled

__all__ = ["History"]

COMPARED_CALLS = 2  # of a SyncBatchNorm. The second detects ranks whose first step ended in a caught exception

MESSAGE = 512  # bytes that each rank sends, for every layer
NO_PLACE = report(NO_BATCHES, MESSAGE)  # of a rank in syncnorm.join
LONGEST = 120  # characters of a name in the message
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of DDP, torch.compile, FSDP
_CALL = nn.Module._call_impl.__code__


class _Place(NamedTuple):
    """The layer that a rank is in."""

    model: str  # class of the outermost module that called the layer, "" if the program called the layer directly
    path: str  # of the layer in that module
    number: int  # of the layer, in this process's order of construction
    constructed: int  # number of norms that this process has constructed
    overtaken: int  # number of layers of the same model and path that were constructed later and called earlier
    call: int  # of the layer, from 1
    sizes: list[int]  # must be equal on all ranks: [C], or the sizes of the axes that are not split
    is_split: bool  # whether axes of a sample are split, which is not the case for BatchNorm
    dtype: str
    layer: str  # class of the layer. This and the shape are only for the report
    shape: list[int]  # of the input

    def is_same_as(self, other: _Place) -> bool:
        """Return whether both can be the same layer. A rank may wrap the model, or call a part of it directly."""
        if (self.is_split, self.dtype, self.call) != (other.is_split, other.dtype, other.call):
            return False
        if not self.is_split and self.sizes != other.sizes:
            return False
        if (self.model, self.path) == (other.model, other.path):  # also for layers outside a model
            comparable = self.constructed == other.constructed  # else one rank has constructed additional norms
            return self.overtaken == other.overtaken and (self.number == other.number or not comparable)
        if self.model == other.model:
            return False
        longer, shorter = sorted((f".{self.path}", f".{other.path}"), key=len, reverse=True)
        return shorter == "." or longer.endswith(shorter)

    @property
    def name(self) -> str:
        """The layer, for reports."""
        layer = f"{self.layer} no. {self.number}"
        return f"{self.path} of {self.model} ({layer})" if self.path else f"{layer}, called outside a model"

    @property
    def identity(self) -> str:
        """What tells this layer from all other layers that this rank has."""
        return f"{self.layer} no. {self.number}: {self.path} of {self.model}"

    def __str__(self) -> str:
        sizes = f"sizes {tuple(self.sizes)}" if self.is_split else f"C = {self.sizes[0]}"
        return f"call {self.call} of {self.name}: {sizes}, {self.dtype}, input {tuple(self.shape)}"


class History:
    """The calls of one norm in a group, and what the ranks have already compared of it. They compare each thing once.

    Collectives of `check_call` and `check_sizes`, if they compare: one all-gather of 512 bytes by all ranks of the
    group. A `CountingCommunicator` does not count it. The forward of the norm calls them, after it has checked its
    arguments.
    """

    constructed = 0  # number of norms in this process

    def __init__(self) -> None:
        History.constructed += 1
        self.number = self.constructed
        self.group: Communicator | None = None  # whose ranks have compared
        self.calls = self.compared = 0
        self.sizes: set[tuple[int, ...]] = set()
        self.layer: Layer | None = None  # as its messages name it, since the first comparison

    def count(self, group: Communicator) -> None:
        """Count a call of the norm, before anything of it can fail. Another group starts anew."""
        if group is not self.group:
            self.group, self.calls, self.compared, self.sizes, self.layer = group, 0, 0, set(), None
        self.calls += 1

    def forget(self) -> None:
        """Forget the calls so far, and what was compared of them. All ranks of the group must do so."""
        self.group = None

    def exchange(self, layer: nn.Module, group: Communicator) -> Exchange:
        """Return the exchange of the call that was counted last."""
        if self.layer is None:  # nothing could be compared, on no rank
            kind, (model, path) = type(layer).__name__, _find(layer)
            self.layer = Layer((f"{path} of {model} " if path else "") + f"({kind} no. {self.number})", kind)
        return Exchange(group, self.layer, self.calls)

    def is_complete(self, group: Communicator) -> bool:
        """Return whether `check_call` has nothing left to compare in this group."""
        return group is self.group and self.compared == COMPARED_CALLS

    def check_call(self, layer: nn.Module, input: Tensor, group: Communicator) -> None:
        """Raise unless all ranks of the group are in this call of this SyncBatchNorm.

        Raises:
            DesyncError: on every rank, if they are in different layers or calls, or differ in C or dtype.
        """
        if group.size == 1:
            self.compared = COMPARED_CALLS
        elif not _is_recorded(input):
            self._compare(layer, input, [input.shape[1] if input.dim() > 1 else 0], group, is_split=False)
            self.compared += 1

    def check_sizes(self, layer: nn.Module, input: Tensor, sizes: tuple[int, ...], group: Communicator) -> None:
        """Raise unless all ranks of the group call this norm with these sizes of the axes that are not split.

        Raises:
            DesyncError: on every rank, if they are in different layers, or differ in dtype.
            ValueError: on every rank, if they differ in sizes.
        """
        if group.size == 1 or (group is self.group and sizes in self.sizes) or _is_recorded(input):
            return
        places = self._compare(layer, input, list(sizes), group, is_split=True)
        all_sizes = [tuple(place.sizes) for place in places]
        if len(set(all_sizes)) > 1:
            raise ValueError(
                f"expected the same sizes {all_sizes[0]} on all ranks for the axes that are not split, got "
                f"{tuple(sizes)} of {tuple(input.shape)} on rank {group.rank}; all ranks: {all_sizes}"
            )
        self.sizes.add(sizes)

    def _compare(
        self, layer: nn.Module, input: Tensor, sizes: list[int], group: Communicator, *, is_split: bool
    ) -> list[_Place]:
        """Return the places of all ranks. Raise DesyncError if they cannot be the same."""
        called: dict[tuple[str, str], list[int]] = getattr(group, "__dict__", {}).setdefault("_norms_called", {})
        model, path = map(_shortened, _find(layer))
        earlier = called.setdefault((model, path), [])  # numbers of the norms called at this place
        place = _Place(
            model=model,
            path=path,
            number=self.number,
            constructed=self.constructed,
            overtaken=sum(other > self.number for other in earlier),
            call=self.calls,
            sizes=sizes,
            is_split=is_split,
            dtype=str(input.dtype).removeprefix("torch.") + (", reproducible" if layer.reproducible else ""),
            layer=_shortened(type(layer).__name__),
            shape=list(input.shape)[:8],
        )
        places = _gather(place, input.device, group)
        if not all(places[0].is_same_as(other) for other in places):
            ranks = (f"  rank {rank}: {other}" for rank, other in enumerate(places))
            raise DesyncError("expected all ranks to call the same layer, got\n" + "\n".join(ranks))
        if self.number not in earlier:
            earlier.append(self.number)
        if self.layer is None:
            self.layer = Layer(place.name, places[0].identity, axis="R" if is_split else "C")
        return places


def _is_recorded(input: Tensor) -> bool:
    """Return whether operations are recorded for later, so that no values can be read now, or may be on some rank."""
    return is_compiled() or transforms.recording() or (input.is_cuda and torch.cuda.is_current_stream_capturing())


def _gather(place: _Place, device: torch.device, group: Communicator) -> list[_Place]:
    text = json.dumps(place).encode().ljust(MESSAGE)
    with unreported(), torch._C._DisableFuncTorch():  # its tensors have no values that can be read
        message = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        received = [t.cpu().numpy().tobytes() for t in uncounted(group).all_gather(message)]
    try:
        return [_Place(*json.loads(text)) for text in received if text != NO_PLACE]
    except (ValueError, TypeError):
        raise DesyncError(
            f"expected all ranks to call the same layer, got {place} on rank {group.rank}, while another rank is in "
            "a different collective"
        ) from None


def _find(layer: nn.Module) -> tuple[str, str]:
    """Return the class of the outermost module that is being called and contains the layer, and the layer's path in it.

    Wrappers such as DistributedDataParallel are ignored, since a rank may use none.
    """
    for module in reversed(list(_modules_being_called())):
        for name in WRAPPERS:
            module = module._modules.get(name) or module
        for path, other in module.named_modules():
            if other is layer and path:
                return type(module).__name__, ".".join(word for word in path.split(".") if word not in WRAPPERS)
    return "", ""


def _modules_being_called() -> Iterator[nn.Module]:
    """Yield the modules that this thread is calling, the innermost first."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
