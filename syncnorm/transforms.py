"""What follows the operations on tensors beside reverse-mode autograd, and has to see each of them.

These are the transforms of torch.func (grad, vmap, jvp and what is made of them), forward-mode AD, batched gradients
(`is_grads_batched`), torch.jit.trace and make_fx. They see neither into the compiled kernels nor, but for batched
gradients, into the hand-written backward. For them the norms are composed of torch's operations and of `all_reduce`.

It is asked in each step of a layer, so each look-up counts.
"""

from __future__ import annotations

import warnings

from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.jit import TracerWarning  # type: ignore[attr-defined]

__all__ = ["active", "batched", "plain", "recording"]

# torch.jit.trace warns where a shape is compared, which is no part of the trace. torch ignores that for itself too.
warnings.filterwarnings("ignore", category=TracerWarning, module=__package__)

_torch_func = _C._are_functorch_transforms_active
_jit_trace = _C._is_tracing
_modes, _mode, _PROXY = _C._len_torch_dispatch_stack, _C._get_dispatch_mode, _C._TorchDispatchModeKey.PROXY
_is_batch = _C._functorch.is_legacy_batchedtensor


def active(*grads: Tensor | None) -> bool:
    """Return whether a transform of torch.func, forward-mode AD or a tracer follows the operations.

    In a backward pass, also whether any of its gradients is a batch, as `is_grads_batched` makes it.
    """
    if _torch_func() or forward_ad._current_level >= 0:
        return True
    if is_dynamo_compiling():  # torch.compile sees through the reference, and cannot answer what is asked below
        return False
    for grad in grads:
        if grad is not None and _is_batch(grad):
            return True
    return _jit_trace() or (_modes() > 0 and recording())


def recording() -> bool:
    """Return whether torch.jit.trace, make_fx or torch.export records the operations."""
    if is_dynamo_compiling():
        return False
    return _jit_trace() or (_modes() > 0 and (_mode(_PROXY) is not None or is_compiling()))


def batched(tensor: Tensor) -> bool:
    """Return whether a tensor is a batch, as `torch.autograd.grad(..., is_grads_batched=True)` makes it."""
    return not is_dynamo_compiling() and _is_batch(tensor)


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor that the transforms of torch.func have wrapped: under vmap, that of the whole batch."""
    while _C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _C._functorch.get_unwrapped(tensor)
    return tensor
