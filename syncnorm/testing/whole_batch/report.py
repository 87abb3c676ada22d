"""What `verify` found: as a table, as JSON and as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...report import COLOURS, Table
from ..ranks import RankError
from .comparison import ACTIVATIONS, GRADIENTS, STATISTICS, Departure, Found
from .reasons import reason
from .training import Range

__all__ = ["Report", "Run"]

SHOWN = 3  # steps in the table
QUANTITIES = (ACTIVATIONS, STATISTICS, GRADIENTS)


class Run:
    """One training on several ranks.

    Attributes:
        world_size: the number of ranks.
        split: how the samples were dealt out.
        dtype: of the ranks.
        samples: the number of samples of each rank in each step.
        units: the largest difference over the ranks and steps, in units of the tolerance, by layer and quantity.
        kinds: the class of each layer.
        rank: the one that departed first, or None.
        departure: where, or None.
        reason: why it departed or failed. Empty: it passed.
    """

    def __init__(self, world_size: int, split: str, dtype: torch.dtype, shards: Sequence[Sequence[Range]]):
        self.world_size, self.split, self.dtype = world_size, split, dtype
        self.samples = [[end - begin for begin, end in of_ranks] for of_ranks in zip(*shards, strict=True)]
        self.units: dict[str, dict[str, float]] = {}
        self.kinds: dict[str, str] = {}
        self.rank: int | None = None
        self.departure: Departure | None = None
        self.reason = ""

    def take(self, found: Sequence[Found], traits: Mapping[str, str]) -> None:
        """Take the outcomes of the ranks. `traits` are those of the layers in one process."""
        for outcome in found:
            self.kinds.update(outcome.kinds)
            for layer, quantities in outcome.units.items():
                of_layer = self.units.setdefault(layer, {})
                for quantity, units in quantities.items():
                    of_layer[quantity] = max(units, of_layer.get(quantity, 0.0))
        departed = [(rank, outcome.departure) for rank, outcome in enumerate(found) if outcome.departure is not None]
        if departed:
            self.rank, self.departure = min(departed, key=lambda item: item[1].event)
            self.reason = reason(self.rank, self.departure, found, traits)

    def fail(self, error: Exception) -> None:
        """Take the error that ended the ranks."""
        where = str(error.__cause__).partition(" raised")[0] if isinstance(error.__cause__, RankError) else "A rank"
        kind = "" if isinstance(error, RankError) else f"{type(error).__name__}: "
        self.reason = f"{where[0].upper()}{where[1:]} failed. {kind}{error}"

    @property
    def passed(self) -> bool:
        """Whether every layer agreed on every rank in every step."""
        return not self.reason

    @property
    def largest(self) -> float:
        """The largest difference in units of the tolerance."""
        return max((units for quantities in self.units.values() for units in quantities.values()), default=math.nan)

    def __str__(self) -> str:
        return f"{self.world_size} ranks, {self.split} shards, {str(self.dtype).removeprefix('torch.')}"


class Report:
    """All trainings of a model."""

    def __init__(self, model: str, backend: str, runs: Sequence[Run], seed: int, is_converted: bool = True):
        self.model, self.backend, self.runs, self.seed = model, backend, runs, seed
        self.is_converted = is_converted

    @property
    def passed(self) -> bool:
        """Whether all of them agreed with one process."""
        return all(run.passed for run in self.runs)

    def layers(self) -> Iterator[tuple[str, str, dict[str, float]]]:
        """Yield name, class and largest differences of each layer over all trainings."""
        names = {name: None for run in self.runs for name in run.units}
        for name in names:
            kinds = {run.kinds[name] for run in self.runs if name in run.kinds}
            of_runs = [run.units.get(name, {}) for run in self.runs]
            worst = {
                quantity: max(units[quantity] for units in of_runs if quantity in units)
                for quantity in QUANTITIES
                if any(quantity in units for units in of_runs)
            }
            yield name or "(the model)", ", ".join(sorted(kinds)), worst

    def summary(self) -> str:
        """Return a sentence, and the reason of the first training that failed."""
        failed = [run for run in self.runs if not run.passed]
        if not failed:
            how = "with its BatchNorm layers converted (--no-convert leaves them), " if self.is_converted else ""
            return (
                f"{self.model}, {how}trains on several ranks as one process does on the whole batch ({self.backend})."
            )
        lines = [f"{self.model} departs from one process on the whole batch ({self.backend}, {failed[0]})."]
        if (where := failed[0].departure) is not None:
            times = f": {where.units:.3g} times the tolerance" if math.isfinite(where.units) else ""
            lines.append(
                f"The first difference is in the {where.quantity} of {_named(where.layer)}, step {where.step}, "
                f"rank {failed[0].rank}{times}."
            )
        repeat = f"Seed {self.seed}. Samples of the ranks in each step: {_samples(failed[0])}."
        return "\n".join([*lines, failed[0].reason, repeat])

    def show(self) -> None:
        """Print the tables and the summary. Needs rich."""
        columns = ["training", "verdict", "largest difference", "first difference", "samples in each step"]
        of_runs = [
            [
                str(run),
                "passed" if run.passed else "DEPARTS",
                f"{run.largest:.2g}" if run.units else "",
                _where(run),
                _samples(run, most=SHOWN),
            ]
            for run in self.runs
        ]
        Table(f"trainings, seed {self.seed}", columns, [of_runs], names=2).show()
        rows = [
            [name, kind, *(_cell(units, quantity) for quantity in QUANTITIES)] for name, kind, units in self.layers()
        ]
        title = "largest difference over all trainings, ranks and steps, in units of the tolerance"
        if rows:
            Table(title, ["layer", "class", *QUANTITIES], [rows], names=2).show()
        print(self.summary())

    def json(self) -> dict[str, Any]:
        """Return everything as JSON has it. A number that is not finite is None."""
        return {
            "model": self.model,
            "backend": self.backend,
            "passed": self.passed,
            "seed": self.seed,
            "runs": [
                {
                    "ranks": run.world_size,
                    "split": run.split,
                    "samples": run.samples,
                    "dtype": str(run.dtype),
                    "passed": run.passed,
                    "rank": run.rank,
                    "departure": None if run.departure is None else _finite(vars(run.departure)),
                    "reason": run.reason,
                    "layers": [
                        {"layer": name, "class": run.kinds.get(name), **_finite(units)}
                        for name, units in run.units.items()
                    ],
                }
                for run in self.runs
            ],
        }

    def write(self, path: Path) -> None:
        """Write `json()` to a file."""
        path.write_text(json.dumps(self.json(), indent=1) + "\n")

    def draw(self, path: Path) -> None:
        """Draw each layer's differences on a logarithmic axis. Needs matplotlib."""
        from matplotlib.figure import Figure

        layers = list(self.layers())
        figure = Figure(figsize=(7.5, 1.3 + 0.2 * len(layers)), layout="constrained")
        axes = figure.subplots()
        markers = {ACTIVATIONS: ("blue", "o"), STATISTICS: ("vermillion", "s"), GRADIENTS: ("green", "^")}
        for quantity, (colour, marker) in markers.items():
            values = [units.get(quantity, 0.0) for _, _, units in layers]
            shown = [(row, min(value, 1e12)) for row, value in enumerate(values) if value > 0]
            axes.plot(
                [value for _, value in shown], [row for row, _ in shown], marker, color=COLOURS[colour], label=quantity
            )
        axes.axvline(1, color=COLOURS["black"], linewidth=1, label="tolerance")
        axes.set(xscale="log", ylim=(len(layers) - 0.5, -0.5))
        axes.set_xlabel("largest difference from one process, in units of the tolerance")
        axes.set_yticks(
            range(len(layers)), [f"{name} ({kind})" if kind else name for name, kind, _ in layers], fontsize=7
        )
        axes.set_title(f"{self.model}, {self.backend}: {'passed' if self.passed else 'departs'}", fontsize=9)
        axes.grid(axis="x", color="0.9")
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)


def _cell(units: dict[str, float], quantity: str) -> str:
    return f"{units[quantity]:.2g}" if quantity in units else ""


def _named(layer: str) -> str:
    return f"layer {layer}" if layer else "the model"


def _samples(run: Run, most: int | None = None) -> str:
    """Return the samples of the ranks in each step, as in "5+3, 2+6", or only of the first steps."""
    of_steps = ["+".join(map(str, samples)) for samples in run.samples]
    shown = of_steps[:most]
    return ", ".join([*shown, "..."] if len(shown) < len(of_steps) else shown)


def _where(run: Run) -> str:
    if run.departure is None:
        return "" if run.passed else "an error"
    return f"{_named(run.departure.layer)}: {run.departure.quantity}"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
