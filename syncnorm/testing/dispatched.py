"""Report the collectives of torch.distributed to the listeners of `count_collectives`.

Each of them is an operator `c10d::...` of torch's dispatcher, whether Python issues it, compiled code, or the C++ of
DistributedDataParallel. A kernel for the key BackendSelect runs before that of the device, in every thread. So a Python
kernel there reports the call, and passes it on.

`torch.distributed.tensor.debug.CommDebugMode` is a TorchDispatchMode instead. That belongs to one thread and those of
its backward passes, sees each operator of the model, and torch.compile compiles nothing beneath it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import Library

from ..communicators.listeners import report_call

__all__ = ["OPERATORS", "reporting"]

OPERATORS = {  # the name in torch.distributed, and which argument is this rank's input
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "allgather_": ("all_gather", 1),
    "allgather_coalesced_": ("all_gather", 1),
    "_allgather_base_": ("all_gather_into_tensor", 1),
    "allgather_into_tensor_coalesced_": ("all_gather_into_tensor", 1),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 0),  # ranks other than the root have no input
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter_tensor", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter_tensor", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all_single", 1),
    "barrier": ("barrier", None),
    "monitored_barrier_": ("monitored_barrier", None),
}


def reporting() -> Library:
    """Report the collectives of torch.distributed until the `_destroy` of the returned library is called."""
    library = Library("c10d", "IMPL", "BackendSelect")  # type: ignore[no-untyped-call]
    for operator, (name, place) in OPERATORS.items():
        if hasattr(torch.ops.c10d, operator):  # not in a build of torch without torch.distributed
            kernel = _kernel(getattr(torch.ops.c10d, operator).default, name, place)
            library.impl(operator, kernel, with_keyset=True)  # type: ignore[no-untyped-call]
    return library


def _kernel(operator: Any, name: str, place: int | None) -> Callable[..., Any]:
    """Return a kernel that reports the call of an operator and passes it on to the kernel of the device."""

    def kernel(keys: Any, *arguments: Any) -> Any:
        group = next(argument for argument in arguments if isinstance(argument, torch.ScriptObject))
        tensors = () if place is None else _flat(arguments[place])
        report_call(name, tensors, dist.ProcessGroup.unbox(group).size())
        return operator.redispatch(keys.remove(torch._C.DispatchKey.BackendSelect), *arguments)

    return kernel


def _flat(tensors: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists."""
    if isinstance(tensors, Tensor):
        yield tensors
    else:
        for inner in tensors:
            yield from _flat(inner)
