"""The figure of `bench layer`: a panel for each case, in it a bar for each candidate: its time over the floor.

Panels side by side are one shape in its layouts, on one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from . import memory
from .targets import ALL, ALONE, AUTOGRAD, ON_CPU, TORCH, TORCH_SYNC

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise RuntimeError(
        "python -m syncnorm bench layer --figure draws with matplotlib, which cannot be imported: "
        "pip install 'syncnorm[bench]'"
    ) from error

__all__ = ["check", "draw"]

COLOURS = {  # that the colour-blind tell apart (Okabe and Ito)
    AUTOGRAD: "#999999",
    ALL: "#0072B2",
    ALONE: "#56B4E9",
    TORCH: "#E69F00",
    TORCH_SYNC: "#D55E00",
    "fairscale": "#F0E442",
    "composed of all-reduces": "#CC79A7",
    "torch.compile": "#009E73",
}
SETTINGS: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}

Panel: TypeAlias = "dict[str, Mapping[str, Any]]"


def check(path: Path) -> None:
    """Raise RuntimeError unless matplotlib can draw a file of that name."""
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:] not in known:
        raise RuntimeError(f"expected a figure named .{', .'.join(known)}, got {path.name}")


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the rows of `bench layer`, as they are written to JSON, on memory as it is by default.

    Activations, all-reduces alone and the layer that is all overhead are left out: what is drawn computes the same.
    """
    shown = [row for row in rows if row["memory"] != memory.KEPT and row["candidate"] in COLOURS]
    lines: dict[tuple[str, str], dict[str, Panel]] = {}  # by shape and dtype, then by layout: candidates' rows
    for row in shown:
        if row["kind"] in ON_CPU:
            shape, dtype, layout = row["case"].split()
            lines.setdefault((shape, dtype), {}).setdefault(layout, {})[row["candidate"]] = row
    candidates = [name for name in COLOURS if any(row["candidate"] == name for row in shown)]
    height = 0.9 + max(1, len(lines)) * (0.6 + 0.19 * len(candidates))
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8.3, height), dpi=200, layout="constrained")
        axes = figure.subplots(max(1, len(lines)), 2, squeeze=False, sharex="row", sharey=True)
        for axis in axes.flat:
            axis.set_axis_off()
        for beside, panels in zip(axes, lines.values(), strict=False):
            limit = max(row["ratio"] for panel in panels.values() for row in panel.values())
            for axis, panel in zip(beside, panels.values(), strict=False):
                axis.set_axis_on()
                _draw_panel(axis, panel, candidates, limit)
        figure.suptitle(f"{title}\n(black line: the floor, the time of the memory traffic alone)", fontsize=10)
        figure.savefig(path)


def _draw_panel(axis: Axes, panel: Panel, candidates: Sequence[str], limit: float) -> None:
    first = next(iter(panel.values()))
    axis.set_title(f"{first['case']} ({first['kind']})", fontsize=9, loc="left")
    for place, candidate in enumerate(candidates):
        if candidate in panel:
            ratio = panel[candidate]["ratio"]
            axis.barh(place, ratio, height=0.75, color=COLOURS[candidate])
            axis.text(max(ratio, 1.0) + 0.02 * limit, place, f"{ratio:.2f}", va="center", fontsize=8.5)
    axis.axvline(1, color="#000000", linewidth=0.8, zorder=3)
    axis.set_xlim(0, 1.15 * limit)
    axis.set_xlabel("time / floor", loc="right", fontsize=8.5, labelpad=1)
    axis.set_yticks(range(len(candidates)), candidates)
    axis.set_ylim(len(candidates) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
