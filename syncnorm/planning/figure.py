"""The figure of `plan`: the predicted efficiency of each variant over the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import COLOURS
from .predict import BN, GLOBAL, LOCAL, NODE, TORCH, TWO_LEVELS, Prediction

__all__ = ["draw"]

STYLES: dict[str, tuple[str, str, str]] = {  # colour, marker and line
    BN: ("black", "o", "-"),
    NODE: ("green", "s", "-"),
    GLOBAL: ("blue", "^", "-"),
    TWO_LEVELS: ("sky blue", "v", "--"),
    TORCH: ("vermillion", "x", ":"),
}
OF_BLOCKS = ("orange", "Pdph*", "-.")  # lines of groups differ in their markers
LABELS = {BN: "BatchNorm, or GroupNorm, LayerNorm, RMSNorm"}


def draw(path: Path, curves: Mapping[str, Sequence[Prediction]], title: str) -> None:
    """Draw the efficiencies. The norms that do not communicate are one line.

    Args:
        path: the file to write.
        curves: predictions by variant, in the order of ranks.
        title: above the axes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    axes = figure.subplots()
    markers = iter(OF_BLOCKS[1])
    for name, curve in curves.items():
        if name == LOCAL:
            continue
        colour, marker, line = STYLES.get(name) or (OF_BLOCKS[0], next(markers), OF_BLOCKS[2])
        look: Any = {"color": COLOURS[colour], "marker": marker, "linestyle": line, "markersize": 5, "linewidth": 1.3}
        values = [each.efficiency for each in curve]
        axes.plot([each.ranks for each in curve], values, label=LABELS.get(name, name), **look)
    ranks = [each.ranks for each in next(iter(curves.values()))]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks")
    axes.set_ylabel("predicted efficiency")
    axes.set_title(f"Computing time with BatchNorm / time of a step: {title}", fontsize=9)
    axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
