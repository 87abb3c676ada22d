"""Operators of `torch.ops.syncnorm`, which torch.compile records as one node and does not look into."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library

__all__ = ["LIBRARY", "define"]

LIBRARY = Library("syncnorm", "DEF")  # type: ignore[no-untyped-call]
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # a CUDA graph would replay without the program of the host


def define(schema: str, function: Callable[..., Tensor]) -> None:
    """Define an operator that needs the program of the host, and returns a tensor like its first argument."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=() if _UNSAFE is None else (_UNSAFE,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"syncnorm::{name}", lambda like, *_: torch.empty_like(like), lib=LIBRARY)
