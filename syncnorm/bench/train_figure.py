"""The figure of `bench train`: the time of a step, and on a GPU its peak memory, over the images of a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ..report import COLOURS
from .timing import left_out

__all__ = ["draw"]

MARKERS = "osD^vPX"


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the results of `bench train`.

    Args:
        path: the file to write.
        rows: as they are written to JSON. The times of disturbed ones are left out, and counted below.
        title: what was measured.
    """
    quiet = [row for row in rows if not row["noisy"]]
    measured = [row for row in rows if row["peak_memory_mb"] is not None]
    figure = Figure(figsize=(9.0, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    _draw_lines(axes[0], norms, quiet, "median_ms", "step, ms (median and quartiles)")
    if measured:
        _draw_lines(axes[1], norms, measured, "peak_memory_mb", "peak memory, MB")
    note = left_out(len(rows), len(quiet))
    figure.suptitle(title + f"\n{note}" * bool(note), fontsize=9)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def _draw_lines(axis: Axes, norms: Sequence[str], rows: Sequence[Mapping[str, Any]], quantity: str, label: str) -> None:
    colours = [COLOURS[name] for name in ("black", "blue", "sky blue", "vermillion", "orange", "green", "purple")]
    for i, norm in enumerate(norms):
        of_it = sorted((row for row in rows if row["norm"] == norm), key=lambda row: row["images_per_rank"])
        values = [row[quantity] for row in of_it]
        bounds = [row["quartiles_ms"] if quantity == "median_ms" else (row[quantity],) * 2 for row in of_it]
        below = [value - low for value, (low, _) in zip(values, bounds, strict=True)]
        above = [high - value for value, (_, high) in zip(values, bounds, strict=True)]
        look: Any = {"color": colours[i], "marker": MARKERS[i], "markersize": 5, "linewidth": 1.2, "label": norm}
        axis.errorbar([row["images_per_rank"] for row in of_it], values, yerr=[below, above], **look)
    axis.set_xscale("log", base=2)
    batches = sorted({row["images_per_rank"] for row in rows})
    axis.xaxis.set_major_locator(FixedLocator(batches))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([str(batch) for batch in batches])
    axis.set_xlabel("images per rank")
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
