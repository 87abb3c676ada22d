"""The all-reduce of compiled code: an operator that torch.compile records as one node and does not look into.

A graph holds no communicator. So each communicator has a number in this process, its handle, which the graph holds as
a constant. When the graph runs, the operator looks the communicator up and calls its `all_reduce`: memory that the
ranks of a host share, MPI and wrapped communicators work in compiled code as they do elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from .. import operators
from .order import keep_order_in_inductor

__all__ = ["all_reduce", "handle_of", "of_handle", "register"]

ISSUES_COLLECTIVES = True  # lets `syncnorm.job.desync` recognize these functions

_HANDLE = "_syncnorm_handle"  # attribute of a communicator
_handles = itertools.count(1)
_registered: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(communicator: Any) -> None:
    """Give a communicator its handle, unless it has one, takes no attributes or no weak references."""
    attributes = getattr(communicator, "__dict__", None)
    if attributes is None or _registered.get(attributes.get(_HANDLE)) is communicator:  # a copy has that of another
        return
    handle = next(_handles)
    with contextlib.suppress(TypeError):
        _registered[handle] = communicator
        attributes[_HANDLE] = handle


def handle_of(communicator: Any) -> Any:
    """Return the handle of a communicator, as torch.compile can read it. None: it has none."""
    return getattr(communicator, _HANDLE, None)


def of_handle(handle: int) -> Any:
    """Return the communicator with a handle."""
    communicator = _registered.get(handle)
    if communicator is None:
        raise RuntimeError(
            "expected the process group that a model was compiled with, got none: it no longer exists. Keep it, or "
            "call torch.compiler.reset()"
        )
    return communicator


def all_reduce(tensor: Tensor, handle: int) -> Tensor:
    """Return the sum of a tensor over the ranks of the communicator with this handle, as a new tensor."""
    keep_order_in_inductor()
    return torch.ops.syncnorm.all_reduce.default(tensor, handle)  # type: ignore[no-any-return]


def _all_reduce(tensor: Tensor, group: int) -> Tensor:
    summed: Tensor = of_handle(group).all_reduce(tensor.clone(memory_format=torch.contiguous_format))
    return summed


operators.define("all_reduce(Tensor tensor, int group) -> Tensor", _all_reduce)
