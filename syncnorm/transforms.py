"""Detect transforms and tracers that must see each operation on tensors.

These are the transforms of torch.func (grad, vmap, jvp and their combinations), forward-mode AD, batched gradients
(`is_grads_batched`), torch.jit.trace and make_fx. They cannot see into the compiled kernels. Except for batched
gradients, they cannot see into the hand-written backward either. While one is active, the norms are composed of torch's
operations and `all_reduce`.

These functions run in every step of a layer, so they must be fast.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import _C, Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from torch.jit import TracerWarning  # type: ignore[attr-defined]

__all__ = ["active", "batched", "compiling", "exporting", "is_exporting", "of_compiler", "recording", "unwrapped"]

# torch.jit.trace warns of comparisons of shapes, which it does not record. torch ignores the warning in its own code.
warnings.filterwarnings("ignore", category=TracerWarning, module=__package__)

_torch_func = _C._are_functorch_transforms_active
_jit_trace = _C._is_tracing
_modes, _mode, _PROXY = _C._len_torch_dispatch_stack, _C._get_dispatch_mode, _C._TorchDispatchModeKey.PROXY
_is_batch = _C._functorch.is_legacy_batchedtensor

_compiling = False


@contextlib.contextmanager
def of_compiler() -> Iterator[None]:
    """Run what torch.compile records, in which its tracer is not taken for a transform."""
    global _compiling
    before, _compiling = _compiling, True
    try:
        yield
    finally:
        _compiling = before


def compiling() -> bool:
    """Return whether torch.compile records what runs, or runs what it has recorded."""
    return _compiling


def active(*grads: Tensor | None) -> bool:
    """Return whether a transform of torch.func, forward-mode AD or a tracer is active.

    In a backward pass, pass its gradients. The result is also true if any of them is batched (`is_grads_batched`).
    """
    if _torch_func() or forward_ad._current_level >= 0:
        return True
    if _compiling or is_dynamo_compiling():
        return False
    for grad in grads:
        if grad is not None and _is_batch(grad):
            return True
    return _jit_trace() or (_modes() > 0 and recording())


def recording() -> bool:
    """Return whether torch.jit.trace, make_fx or torch.export is recording operations."""
    if _compiling or is_dynamo_compiling():
        return False
    return _jit_trace() or (_modes() > 0 and (_mode(_PROXY) is not None or is_compiling()))


def exporting() -> bool:
    """Return whether what is recorded leaves this process: as `recording`, and in torch.export(strict=True)."""
    return recording() or is_exporting()


def unwrapped(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors without the wrappers of transforms that have ended, as torch's own operations take them."""
    return unwrap_dead_wrappers(tensors)


def batched(tensor: Tensor) -> bool:
    """Return whether a tensor is a batched gradient of `torch.autograd.grad(..., is_grads_batched=True)`."""
    return not is_dynamo_compiling() and _is_batch(tensor)
