"""What a training step of a model sends: its norm layers, their messages and the gradients of its parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from ..convert import convert_sync_batchnorm
from ..modules import SyncBatchNorm
from ..modules.known import ORIGIN
from ..testing.whole_batch.training import Batch, trained_outputs

__all__ = ["NormCall", "Trace", "trace"]

LOCAL = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _InstanceNorm)  # norms that need no communication
# The messages of C channels, those of forward and of backward: (a, b) for a C + b float64.
MESSAGES = [(2, 3)], [(2, 2)]
REPRODUCIBLE = [(4, 6), (4, 4)], [(8, 2), (4, 2)]  # for float32 inputs


class NormCall(NamedTuple):
    """One call of a layer that `convert_sync_batchnorm` synchronizes.

    Attributes:
        layer: its path in the model.
        kind: its class before the conversion.
        channels: C.
        values: of each channel in the input of one rank, N * spatial positions.
        backward: whether the input needs a gradient. Without one, the backward pass sends nothing.
        reproducible: whether the layer is.
    """

    layer: str
    kind: str
    channels: int
    values: int
    backward: bool
    reproducible: bool = False

    def messages(self) -> list[int]:
        """Return the bytes of its all-reduces in a step."""
        forward, backward = REPRODUCIBLE if self.reproducible else MESSAGES
        sent = forward + backward if self.backward else forward
        return [8 * (each * self.channels + more) for each, more in sent]


@dataclass(frozen=True)
class Trace:
    """What one step of a model sends.

    Attributes:
        calls: of layers that are synchronized, in the order of the forward pass.
        local: how many layers of each class normalize without communication.
        gradient_bytes: of all parameters that are trained.
    """

    calls: list[NormCall]
    local: dict[str, int]
    gradient_bytes: int

    def messages(self) -> list[int]:
        """Return the bytes of all all-reduces of the synchronized layers in a step."""
        return [size for call in self.calls for size in call.messages()]

    def collectives_of_torch(self) -> int:
        """Return how many collectives torch.nn.SyncBatchNorm issues in a step."""
        return len(self.calls) + sum(call.backward for call in self.calls)

    def kinds(self) -> dict[str, int]:
        """Return how many synchronized layers there are of each class. A layer that is called twice is one."""
        return dict(Counter({call.layer: call.kind for call in self.calls}.values()))


def trace(model: nn.Module, batch: Batch) -> Trace:
    """Run one forward pass and return what a step sends. Issues no collective in a process that is alone.

    Args:
        model: in training mode. Its BatchNorm layers are converted in place, as by `convert_sync_batchnorm`.
        batch: of one rank.

    Raises:
        TypeError: no output of the model requires a gradient. Other errors are those of the model.
    """
    model = convert_sync_batchnorm(model)
    calls: list[NormCall] = []
    local: dict[nn.Module, str] = {}
    handles = []
    for name, module in model.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, *, name: str = name) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            if isinstance(module, SyncBatchNorm) and module.training:
                channels = x.shape[1]
                values = x.numel() // max(1, channels)
                called = NormCall(name, _kind_of(module), channels, values, x.requires_grad, module.reproducible)
                calls.append(called)
            elif isinstance(module, LOCAL):
                local[module] = type(module).__name__

        if isinstance(module, (SyncBatchNorm, *LOCAL)):
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        trained_outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return Trace(calls, dict(Counter(local.values())), gradients)


def _kind_of(layer: SyncBatchNorm) -> str:
    """Return the name of the class that a layer had before its conversion."""
    original, _ = vars(layer).get(ORIGIN, (type(layer), None))
    return str(original.__name__)
