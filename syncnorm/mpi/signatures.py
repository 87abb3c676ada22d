"""The call signatures of the methods of a torch.distributed process group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import ReduceOp

__all__ = ["torch_signatures"]


def torch_signatures(options: type, *tensors: str, rest: str = "timeout", lists: bool = True) -> Callable[[Any], Any]:
    """Add torch's other signatures to a method that takes tensors and options, which is how C++ calls it.

    Args:
        options: the class of the options.
        tensors: the names of the arguments before the options. "tensors|tensor" gives alternative names of one.
        rest: the names, in order, of arguments that can replace the options. They are fields of the options.
        lists: whether a single tensor is accepted for a list of one tensor.
    """
    fields = {"op": "reduceOp", "root": "rootRank", "timeout": "timeout"}
    names = {name: place for place, alternatives in enumerate(tensors) for name in alternatives.split("|")}
    given_as = rest.split()
    scalars = int | timedelta | ReduceOp | ReduceOp.RedOpType | None

    def canonical(method: str, *args: Any, **keywords: Any) -> list[Any]:
        given = dict(enumerate(args[: len(tensors)]))
        opts, values = options(), dict(zip(given_as, args[len(tensors) :], strict=False))
        if "opts" in keywords or (values and not isinstance(args[len(tensors)], scalars)):
            opts, values = keywords.pop("opts", None) or args[len(tensors)], {}
        for name, value in keywords.items():
            if name in names and names[name] not in given:
                given[names[name]] = value
            elif name in given_as and name not in values:
                values[name] = value
            else:
                raise TypeError(f"{method}() got an unexpected argument {name!r}, or got it twice")
        missing = [name for place, name in enumerate(tensors) if place not in given]
        if missing or len(args) > len(tensors) + len(given_as):
            raise TypeError(f"{method}() expected {', '.join(tensors)} and {rest} or opts, got {len(args)} arguments")
        for name, value in values.items():
            if value is not None:
                setattr(opts, fields[name], value)
        ordered = [given[place] for place in range(len(tensors))]
        if lists and any(isinstance(value, Tensor) for value in ordered):
            ordered = [[value] for value in ordered]
        return [*ordered, opts]

    def decorate(method: Any) -> Any:
        count = len(tensors) + 1

        @functools.wraps(method)
        def call(self: Any, *args: Any, **keywords: Any) -> Any:
            if len(args) != count or type(args[-1]) is not options:
                args = tuple(canonical(method.__name__, *args, **keywords))
            return method(self, *args)

        return call

    return decorate
