"""The model that a tool is given: a function that returns it, or the name of one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from difflib import get_close_matches
from inspect import isfunction
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
        ValueError: the name is not of this form, there is no such file or function, or the model has parameters that
            are not initialized.
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
        if not path.is_file():
            files = [other.name for other in path.parent.glob("*.py")]
            raise ValueError(f"expected a file, got none there: {path}{_nearest(path.name, files)}")
        sys.path.insert(0, str(path.parent))  # where the file finds what it imports
        module = path.stem
    loaded = importlib.import_module(module)
    if not hasattr(loaded, function):
        functions = [name for name, value in vars(loaded).items() if isfunction(value) and value.__module__ == module]
        raise ValueError(
            f"expected a function of {name.rpartition(':')[0]}, got {function!r}{_nearest(function, functions)}"
        )
    found: Callable[[], nn.Module] = getattr(loaded, function)
    return found


def _nearest(name: str, names: list[str]) -> str:
    """Return the end of an error that lists what there is and looks like the name."""
    nearest = get_close_matches(name, names, n=5, cutoff=0.3)
    return f"; the nearest names are {', '.join(nearest)}" if nearest else ""
