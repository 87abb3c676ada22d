"""The process group of a module, and what the four norms have in common."""

from __future__ import annotations

import contextlib
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn

from .. import checkpointing, functional, transforms
from ..communicators import ALONE, Collectives, Communicator, LocalCommunicator, ProcessGroupLike, communicator
from ..job.launcher import names_several_ranks, warn_if_not_joined
from .agreement import History

__all__ = ["ProcessGroupMixin", "ProcessGroupReference"]


class ProcessGroupMixin(nn.Module):
    """A norm with a process group. Pickles do not contain the group, and deep copies share it."""

    reproducible: bool = False  # the default of converted layers and of old pickles

    @property
    def process_group(self) -> ProcessGroupLike:
        """The ranks that share the statistics, in the form in which they were passed."""
        return self._group.given

    @process_group.setter
    def process_group(self, process_group: ProcessGroupLike) -> None:
        self._group = ProcessGroupReference(process_group)

    def __prepare_scriptable__(self) -> NoReturn:
        """Raise TypeError: torch.jit.script calls this method, and cannot compile the norm."""
        raise TypeError(
            f"expected torch.nn's own norms in torch.jit.script, got syncnorm's {type(self).__name__}: call "
            "syncnorm.revert_sync_batchnorm(model) first, load the state_dict into a model with norms of torch.nn, or "
            "call model.eval() and torch.jit.trace"
        )

    def _fits_one_node(self, input: fx.Proxy) -> bool:
        """Return whether a torch.fx trace can record the call of this layer as one node.

        The node calls the whole layer: its hooks, and the forward of a subclass. If the layer has these, the trace has
        already recorded them, and the node would run them again.
        """
        forward = type(self).forward
        own = forward.__module__.startswith(__package__) and "forward" not in vars(self)
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return own and not hooks and input.tracer.root is not self  # type: ignore[attr-defined]

    def _as_node(self, input: fx.Proxy, **others: Any) -> Any:
        """Record the call of this layer as one node of a torch.fx trace, as fx does for layers of torch.nn."""
        given = {name: value for name, value in others.items() if value is not None}
        path = input.tracer.path_of_module(self)  # type: ignore[attr-defined]
        return input.tracer.create_proxy("call_module", path, (input,), given)

    def _parameters_like(self, input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and bias as DTensors if the input is one, else this rank's local shards."""
        weight, bias = self.weight, self.bias
        return (weight, bias) if hasattr(input, "to_local") else (_local(weight), _local(bias))  # type: ignore[arg-type, return-value]

    def _reset_affine(self) -> None:
        for parameter, initialize in ((self.weight, nn.init.ones_), (self.bias, nn.init.zeros_)):
            if parameter is not None:
                initialize(parameter)  # type: ignore[arg-type]

    def _group_repr(self) -> str:
        """Return the part of extra_repr that describes the process group, and how the ranks add up."""
        group = "" if self.process_group is None else f", process_group={self._group}"
        return f", reproducible=True{group}" if self.reproducible else group


def _local(parameter: Tensor | None) -> Tensor | None:
    """Return this rank's shard of a parameter if tensor parallelism has sharded it, else the parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[union-attr]


class ProcessGroupReference:
    """A module's process group. Deep copies share it. Pickles leave it out, since another job may load them.

    Attributes:
        given: the process group as it was passed to the module.
        history: what the ranks of the group have compared of the module.
    """

    def __init__(self, given: ProcessGroupLike):
        self.given = given
        self.history = History()
        self._resolved: Communicator | None = None  # or other collectives, as `substitute` sets them
        with contextlib.suppress(ValueError):  # a rank outside the group may build the model, but not train it
            self.resolve()

    def resolve(self) -> Communicator | None:
        """Return the communicator of the group, resolved once. None stays None: the default group may change."""
        if self._resolved is None and self.given is not None:
            self._resolved = communicator(self.given)
        return self._resolved

    def substitute(self, group: Collectives | None) -> None:
        """Use a communicator of the same ranks instead of the given group, until this is called with None.

        The ranks may have made different numbers of calls, so they compare them anew.
        """
        self._resolved = cast(Communicator, group)
        self.history.forget()

    def enter(self, input: Tensor, *, recalls: bool = False) -> Communicator | None:
        """Return the communicator of the group for a call of the norm, and count the call.

        The norm calls this before it checks anything. So a rank that has left a call by an exception, whatever that
        was, is at another call than the other ranks from then on, and they see it. None: torch is compiling the call
        for the default group. Calls that communicate on no rank are not counted.

        `recalls`: in a recomputation the norm takes the moments of its first pass, and does not communicate.
        """
        group = self.resolve() if self._resolved is None else self._resolved
        if isinstance(group, LocalCommunicator) or torch.compiler.is_compiling():
            return group
        chosen = communicator() if group is None else group
        if isinstance(chosen, LocalCommunicator):
            if names_several_ranks() and not functional.without_values(input):
                warn_if_not_joined()
        elif recalls and checkpointing.recomputes():
            return ALONE
        elif isinstance(input, Tensor) and not (functional.without_values(input) or transforms.recording()):
            self.history.count(chosen)
        return chosen

    def exchange(
        self, group: Communicator | None, layer: nn.Module, input: Tensor, sizes: tuple[int, ...]
    ) -> ProcessGroupLike:
        """Return the exchange of a call that splits some axes of the input over the group that `enter` returned.

        The ranks compare the sizes of the other axes.
        """
        if group is None or isinstance(group, LocalCommunicator) or functional.without_values(input):
            return group
        if torch.compiler.is_compiling():
            return group
        self.history.check_sizes(layer, input, sizes, group)
        return self.history.exchange(layer, group)  # type: ignore[return-value]  # which functional takes for one

    def __str__(self) -> str:
        """Return the size of the group, or "other ranks" if this rank is not in it."""
        size = 0 if self._resolved is None else self._resolved.size
        return f"{size} rank{'s' * (size != 1)}" if size else "other ranks"

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroupReference:
        return ProcessGroupReference(self.given)

    def __reduce__(self) -> tuple[type[ProcessGroupReference], tuple[None]]:
        return ProcessGroupReference, (None,)
