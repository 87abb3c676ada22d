"""The order and the number of the all-reduces of compiled code, which must be the same on all ranks.

The graphs of the ranks may differ, since they are compiled for inputs of other sizes, and independent operations would
be ordered as it suits each graph. Activation checkpointing would issue an all-reduce again in backward, and torch
cannot do that with an ordered operator.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch.utils import checkpoint

from .. import operators

__all__ = ["keep_order", "keep_order_in_inductor"]


@functools.cache
def keep_order() -> None:
    """Make torch.compile keep the order and the number of the all-reduces."""
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    _register_effectful_op(torch.ops.syncnorm.all_reduce.default, _EffectType.ORDERED)
    if (mode := getattr(checkpoint, "_CachingTorchDispatchMode", None)) is not None:
        torch.library.register_torch_dispatch("syncnorm::all_reduce", mode, _save, lib=operators.LIBRARY)


def _save(mode: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Let the mode by which torch.utils.checkpoint records what is computed again save the sum, whatever its policy."""
    policy, mode.policy_fn = mode.policy_fn, lambda *_, **__: checkpoint.CheckpointPolicy.MUST_SAVE
    try:
        return type(mode).__torch_dispatch__(mode, operator, types, args, kwargs)
    finally:
        mode.policy_fn = policy


def keep_order_in_inductor() -> None:
    """Make Inductor run each all-reduce after the one before it. Call this while a graph is recorded for it.

    Inductor (PyTorch 2.13 and 2.14) notes what an ordered operator comes after by the name of its buffer, and looks it
    up by the name of its operation. So nothing keeps the order. This notes it by the other name too.
    """
    inductor = sys.modules.get("torch._inductor.lowering")  # not imported: another compiler
    if inductor is not None and torch.ops.syncnorm.all_reduce.default not in inductor.lowerings:
        inductor.register_lowering(torch.ops.syncnorm.all_reduce.default, type_promotion_kind=None)(_lower)


def _lower(*args: Any) -> Any:
    from torch._higher_order_ops.effects import _EffectType
    from torch._inductor.ir import FallbackKernel, TensorBox
    from torch._inductor.virtualized import V

    before = len(V.graph.operations)
    result = TensorBox.create(FallbackKernel.create(torch.ops.syncnorm.all_reduce.default, *args))
    if (previous := V.graph.effectful_ops.get(_EffectType.ORDERED)) is not None:
        for operation in V.graph.operations[before:]:
            V.graph.additional_star_deps[operation.get_operation_name()].add(previous.get_name())
    return result
