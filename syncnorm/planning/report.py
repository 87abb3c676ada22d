"""What `plan` predicts: as tables, as JSON and as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..bench.timing import Timing
from ..report import Table, listing
from .advice import advise
from .predict import Prediction, Step, Variant, variants

__all__ = ["Check", "Report"]

MOST_RANKS = 4096
SHOWN = (1, 2, 8, 64, 512, 4096)  # ranks in the table of efficiencies


class Check(NamedTuple):
    """A step that was measured, beside its prediction. Times are in seconds."""

    variant: str
    ranks: int
    predicted: float
    measured: Timing

    @property
    def error(self) -> float:
        """The predicted time over the median of the measured ones, minus 1."""
        return self.predicted / self.measured.median - 1

    def numbers(self) -> dict[str, Any]:
        """Return the check as it is written to JSON."""
        return {
            "variant": self.variant,
            "ranks": self.ranks,
            "predicted_ms": 1e3 * self.predicted,
            "measured_ms": 1e3 * self.measured.median,
            "error_percent": 100 * self.error,
            "noisy": self.measured.noisy,
        }


@dataclass(frozen=True)
class Report:
    """The predictions for a model.

    Attributes:
        model: its name.
        step: what they are computed from.
        ranks: of the cluster that they are for.
        sources: where the numbers are from, by name.
        checks: what was measured on this job, beside its prediction.
    """

    model: str
    step: Step
    ranks: int
    sources: Mapping[str, str]
    checks: Sequence[Check] = ()

    @property
    def predictions(self) -> list[Prediction]:
        """The step of each variant on all ranks of the cluster."""
        return [self.step.predict(variant, self.ranks) for variant in self._variants(self.ranks)]

    @property
    def curves(self) -> dict[str, list[Prediction]]:
        """The step of each variant, by its name, on 1, 2, 4, ... ranks."""
        ranks = [2**i for i in range(int(math.log2(MOST_RANKS)) + 1)]
        return {
            variant.name: [self.step.predict(variant, count) for count in ranks]
            for variant in self._variants(MOST_RANKS)
        }

    @property
    def recommendation(self) -> str:
        """Which ranks should share statistics, and why."""
        layers = len(self.step.trace.calls)
        return advise(layers, self.step.batch, self.step.costs.statistics.ranks_per_node, self.predictions)

    def show(self) -> None:
        """Print the tables and the recommendation. Needs rich."""
        print(listing({"model": self.model, **self._counts(), **self.sources}))
        self._of_cluster().show()
        self._of_curves().show()
        if self.checks:
            rows = [_cells_of(check) for check in self.checks]
            columns = ["variant", "ranks", "predicted ms", "measured ms", "error", "times"]
            Table("This job: predicted and measured", columns, [rows], names=1).show()
        print(self.recommendation)

    def json(self) -> dict[str, Any]:
        """Return everything as JSON has it. Times are in milliseconds."""
        step, costs = self.step, self.step.costs
        found = {
            "model": self.model,
            "sources": dict(self.sources),
            "layers": [{**call._asdict(), "message_bytes": call.messages()} for call in step.trace.calls],
            "other_norms": step.trace.local,
            "messages": len(step.trace.messages()),
            "message_bytes": sum(step.trace.messages()),
            "gradient_bytes": step.trace.gradient_bytes,
            "batch_per_rank": step.batch,
            "compute_ms": 1e3 * costs.compute,
            "compute_converted_ms": 1e3 * costs.converted,
            "noise_ms": {name: 1e3 * seconds for name, seconds in costs.noise._asdict().items()},
            "statistics_network": costs.statistics.numbers(),
            "gradients_network": costs.gradients.numbers(),
            "ranks": self.ranks,
            "predictions": [prediction.numbers() for prediction in self.predictions],
            "curves": [each.numbers() for curve in self.curves.values() for each in curve],
            "checks": [check.numbers() for check in self.checks],
            "recommendation": self.recommendation,
        }
        return _finite(found)  # type: ignore[no-any-return]

    def write(self, path: Path) -> None:
        """Write `json()` to a file. A number that is not finite is null."""
        path.write_text(json.dumps(self.json(), indent=1) + "\n")

    def draw(self, path: Path) -> None:
        """Draw the efficiency of each variant over the number of ranks. Needs matplotlib."""
        from .figure import draw

        draw(path, self.curves, f"{self.model}, {self.step.batch} samples per rank")

    def _variants(self, ranks: int) -> list[Variant]:
        return variants(ranks, self.step.costs.statistics.ranks_per_node)

    def _counts(self) -> dict[str, str]:
        trace, messages = self.step.trace, self.step.trace.messages()
        forward = sum(len(call._replace(backward=False).messages()) for call in trace.calls)
        return {
            "synchronized layers": _listed(trace.kinds()),
            "channels": f"{sum(call.channels for call in trace.calls):,}",
            "other norms": _listed(trace.local),
            "messages of a step": f"{forward} forward and {len(messages) - forward} backward, {sum(messages):,} bytes",
            "gradients": f"{trace.gradient_bytes:,} bytes",
        }

    def _of_cluster(self) -> Table:
        predictions = self.predictions
        unsynchronized = predictions[0].step
        columns = [
            "variant",
            "group",
            "samples",
            "computing",
            "messages",
            "waiting",
            "gradients",
            "step ms",
            "x BatchNorm",
        ]
        rows = [
            [each.variant, str(each.group), str(each.samples)]
            + [_digits(1e3 * s) for s in (each.compute, each.messages, each.waiting, each.gradients, each.step)]
            + [f"{each.step / unsynchronized:.2f}"]
            for each in predictions
        ]
        per_node = min(self.ranks, self.step.costs.statistics.ranks_per_node)
        title = f"A step on {self.ranks} ranks, {per_node} on each node, {self.step.batch} samples on each rank"
        return Table(title, columns, [rows], names=1)

    def _of_curves(self) -> Table:
        rows = [
            [name, *(f"{each.efficiency:.0%}" for each in curve if each.ranks in SHOWN)]
            for name, curve in self.curves.items()
        ]
        return Table("Efficiency by the number of ranks", ["variant", *map(str, SHOWN)], [rows], names=1)


def _cells_of(check: Check) -> list[str]:
    times = [_digits(1e3 * seconds) for seconds in (check.predicted, check.measured.median)]
    return [check.variant, str(check.ranks), *times, f"{check.error:+.1%}", "noisy" * check.measured.noisy]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
