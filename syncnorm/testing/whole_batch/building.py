"""The model that a tool is given: a function that returns it, or the name of one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["build_model", "name_of"]


def build_model(build: Callable[[], nn.Module] | str, seed: int = 0) -> nn.Module:
    """Return the model in training mode.

    Args:
        build: a function that returns the model, or "MODULE:FUNCTION". MODULE may be the path of a file.
        seed: of the initial weights.

    Raises:
        TypeError: the function returns something else than a model.
        ValueError: the name is not of this form, or the model has parameters that are not initialized.
    """
    torch.manual_seed(seed)
    model = (_load(build) if isinstance(build, str) else build)()
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a function that returns a torch.nn.Module, got {type(model).__name__}")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("expected a model with initialized parameters, got lazy ones: call it once where it is built")
    return model.train()


def name_of(build: Callable[[], nn.Module] | str) -> str:
    """Return how reports name the model."""
    return build if isinstance(build, str) else getattr(build, "__name__", repr(build))


def _load(name: str) -> Callable[[], nn.Module]:
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise ValueError(f'expected "MODULE:FUNCTION", got {name!r}')
    if module.endswith(".py"):
        path = Path(module).resolve()
        sys.path.insert(0, str(path.parent))  # where the file finds what it imports
        module = path.stem
    found: Callable[[], nn.Module] = getattr(importlib.import_module(module), function)
    return found
