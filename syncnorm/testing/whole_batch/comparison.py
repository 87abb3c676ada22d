"""A rank's training held against that of one process: how far each layer departs, and what is known of the first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from .reference import buffers, calls, first_tensor, state, watch
from .training import Range

__all__ = ["ACTIVATIONS", "GRADIENTS", "INITIAL", "STATISTICS", "Comparison", "Departure", "Found"]

ACTIVATIONS, STATISTICS, GRADIENTS = "activations", "statistics", "gradients"  # what is compared, layer by layer
INITIAL, CALLS = "initial values", "calls"
RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-2}  # tolerance, of the largest value of the layer
SMALL_GRADIENTS = 0.01  # of the model's largest: the tolerance of smaller ones is that of this one, since some are zero


@dataclass
class Departure:
    """The first value that is further away than the tolerance, and what a rank knows of it."""

    quantity: str
    layer: str
    step: int
    event: int  # its number among the comparisons of the rank, by which ranks are put in order
    units: float
    name: str = ""  # of the parameter or buffer
    traits: list[str] = field(default_factory=list)


@dataclass
class Found:
    """The outcome of a rank.

    Attributes:
        units: the largest difference in units of the tolerance, by layer and quantity.
        departure: the first one that is above 1.
        final: of the buffers after the last step, a number that differs if they do.
        statistics: of the inputs of normalizations in the first step, (count, mean, mean square) by layer.
    """

    units: dict[str, dict[str, float]] = field(default_factory=dict)
    departure: Departure | None = None
    final: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, tuple[int, Tensor, Tensor]] = field(default_factory=dict)


class Comparison:
    """Observes a rank. `found` is its outcome."""

    def __init__(self, model: nn.Module, record: dict[str, Any], dtype: torch.dtype):
        self.events = self.number = 0
        self.model, self.record, self.relative = model, record, RELATIVE[dtype]
        self.found = Found()
        self.modules = dict(model.named_modules())
        self.inputs: dict[str, Tensor] = {}
        for name, initial in state(model).items():
            if not torch.equal(initial.cpu().double(), record["initial"][name].to(dtype).double()):
                self._note(INITIAL, name.rpartition(".")[0], math.inf, name)
        watch(model, self._after)

    def begin(self, step: int, samples: Range) -> None:
        """See Observer."""
        self.number, self.samples, self.step = step, samples, self.record["steps"][step]
        self.seen: Counter[str] = Counter()
        self.before = buffers(self.model)

    @torch.no_grad()
    def _after(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        found, x = first_tensor(output), first_tensor(arguments)
        if found is None:
            return
        self.found.kinds.setdefault(name, type(module).__name__)
        expected = self.step["outputs"].get(name, [])
        if len(expected) <= self.seen[name]:
            self._note(CALLS, name, math.inf)
            return
        found, whole = found.detach().cpu(), expected[self.seen[name]]
        self.seen[name] += 1
        if x is not None and _is_batch_norm(module) and x.numel():
            self.inputs[name] = x.detach().cpu().double()
            if self.number == 0:
                self.found.statistics.setdefault(name, _moments(self.inputs[name]))
        units = self._units(found, _parts(whole, found, self.samples, self.step["samples"]), _largest(whole))
        traits = self._of_output(module, self.inputs.get(name), found) if units > 1 else []
        if found.isnan().any() and not whole.isnan().any():
            traits = ["nan"]
        self._note(ACTIVATIONS, name, units, traits=traits)

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """See Observer."""
        for name in calls(self.step) - self.seen:
            self._note(CALLS, name, math.inf)
        for name, on_device in buffers(self.model).items():
            buffer = on_device.cpu()
            expected = self.step["buffers"][name]
            units = self._units(buffer, [expected], _largest(expected) if buffer.is_floating_point() else 0.0)
            traits = self._of_buffer(name, buffer) if units > 1 else []
            self._note(STATISTICS, name.rpartition(".")[0], units, name, traits)
        pairs = zip(self.step["upstream"], outputs, strict=True)
        return [next(_parts(dy, y, self.samples, self.step["samples"])) for dy, y in pairs]

    def end(self, gradients: dict[str, Tensor]) -> None:
        """See Observer."""
        expected = self.step["gradients"]
        floor = SMALL_GRADIENTS * max(map(_largest, expected.values()), default=0.0)
        for name, gradient in reversed(gradients.items()):  # in the order of the backward pass
            units = self._units(gradient.cpu(), [expected[name]], max(floor, _largest(expected[name])))
            self._note(GRADIENTS, name.rpartition(".")[0], units, name)
        self.found.final = {name: float(buffer.double().sum()) for name, buffer in self.model.named_buffers()}

    def _units(self, found: Tensor, candidates: Any, scale: float) -> float:
        """Return the distance to the nearest candidate in units of the tolerance."""
        distances = [_distance(found, candidate) for candidate in candidates]
        distance = min(distances, default=math.inf)
        tolerance = self.relative * scale
        if distance <= tolerance * 1e-30:
            return 0.0
        return distance / tolerance if tolerance and not math.isnan(distance) else math.inf

    def _note(self, quantity: str, layer: str, units: float, name: str = "", traits: Sequence[str] = ()) -> None:
        of_layer = self.found.units.setdefault(layer, {})
        of_layer[quantity] = max(units, of_layer.get(quantity, 0.0))
        self.events += 1
        if units > 1 and self.found.departure is None:
            self.found.departure = Departure(quantity, layer, self.number, self.events, units, name, list(traits))
        if quantity == CALLS:  # for which the other ranks may wait
            raise RuntimeError(
                f"expected this rank to call {layer} as often as one process does, got another number of calls in step "
                f"{self.number}: a condition on the rank or on its data decides, and all ranks must call all "
                "synchronized layers in the same order"
            )

    def _of_output(self, module: nn.Module, x: Tensor | None, found: Tensor) -> list[str]:
        if x is None or not module.training:
            return []
        weight = None if module.weight is None else module.weight.cpu().double()
        bias = None if module.bias is None else module.bias.cpu().double()
        alone = F.batch_norm(x, None, None, weight, bias, True, 0.0, module.eps)  # type: ignore[arg-type]
        return ["local"] if _distance(found, alone) <= 1e-3 * _largest(alone) else []

    def _of_buffer(self, name: str, found: Tensor) -> list[str]:
        """Tell which update of running statistics explains this one."""
        layer, _, buffer = name.rpartition(".")
        momentum = getattr(self.modules[layer], "momentum", None)
        if buffer not in ("running_mean", "running_var") or momentum is None or layer not in self.inputs:
            return []
        before, expected, found = self.before[name].cpu().double(), self.step["buffers"][name], found.double()
        moved, should = found - before, expected - before
        count, mean, square = _moments(self.inputs[layer])
        local = mean if buffer == "running_mean" else (square - mean.square()) * count / max(1, count - 1)
        of_all = before + should / momentum
        whole = count * self.step["samples"] / max(1, self.samples[1] - self.samples[0])
        biased = of_all * (whole - 1) / whole
        near = 1e-3 * _largest(moved - should)
        if _distance(moved, momentum * (local - before)) <= near:
            return ["local"]
        if buffer == "running_var" and _distance(moved, momentum * (biased - before)) <= near:
            return ["biased"]
        ratio = (moved * should).sum() / should.square().sum()
        if _distance(moved, ratio * should) <= near:
            return [f"momentum {momentum} {float(ratio) * momentum:.4g}"]
        return []


def _is_batch_norm(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("running_mean", "running_var", "eps", "weight", "bias"))


def _moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return x.numel() // x.shape[1], x.mean(axes), x.square().mean(axes)


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    return float((found.double() - expected.double()).abs().max()) if found.numel() else 0.0


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _parts(whole: Tensor, part: Tensor, samples: Range, size: int) -> Iterator[Tensor]:
    """Yield what of the whole batch's tensor may be a shard's: along an axis of the samples, or of their positions."""
    begin, end = samples
    for axis in range(whole.dim()):
        times, rest = divmod(whole.shape[axis], size)
        others = [*whole.shape[:axis], times * (end - begin), *whole.shape[axis + 1 :]]
        if rest or not times or others != [*part.shape]:
            continue
        yield whole.narrow(axis, times * begin, times * (end - begin))
        if times > 1:
            yield whole.unflatten(axis, (times, size)).narrow(axis + 1, begin, end - begin).flatten(axis, axis + 1)  # type: ignore[no-untyped-call]
    if whole.shape == part.shape:
        yield whole
