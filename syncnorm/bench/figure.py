"""The figure of `bench layer`: a row for each shape, and in it each candidate at its time over the copy baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import COLOURS
from . import memory
from .targets import ALL, ALONE, AUTOGRAD, COMPILED, GRAPH, OVER_COPY, TORCH, TORCH_SYNC
from .timing import HOST, left_out

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator
except ImportError as error:
    raise RuntimeError(
        "--figure draws with matplotlib, which cannot be imported: pip install 'syncnorm[bench]'"
    ) from error

__all__ = ["check", "draw"]

STYLES = {  # colour and marker. Candidates that are not here are not drawn: activations, and all-reduces alone
    ALONE: (COLOURS["sky blue"], "o"),
    GRAPH: (COLOURS["blue"], "P"),
    COMPILED: (COLOURS["purple"], "v"),
    ALL: (COLOURS["blue"], "o"),
    TORCH: (COLOURS["orange"], "s"),
    TORCH_SYNC: (COLOURS["vermillion"], "s"),
    "fairscale": (COLOURS["green"], "^"),
    "composed of all-reduces": (COLOURS["purple"], "D"),
    "torch.compile": (COLOURS["yellow"], "v"),
    AUTOGRAD: (COLOURS["grey"], "x"),
}
SETTINGS: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}
TICKS = (0.5, 0.7, 1, 1.4, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)


def check(path: Path) -> None:
    """Raise RuntimeError unless matplotlib can draw a file of that name."""
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:] not in known:
        raise RuntimeError(f"expected a figure named .{', .'.join(known)}, got {path.name}")


def draw(path: Path, rows: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the results of `bench layer` on memory as it is by default, without those on the host's time alone.

    Args:
        path: the file to write.
        rows: the candidates as they are written to JSON. Disturbed ones are left out, and counted below.
        targets: the verdicts as they are written to JSON.
        title: what was measured.
    """
    comparable = [row for row in rows if row["memory"] != memory.KEPT and row["clock"] != HOST]
    shown = [row for row in comparable if row["candidate"] in STYLES]
    quiet = [row for row in shown if not row["noisy"]]
    cases = list(dict.fromkeys(row["case"] for row in shown))
    candidates = [name for name in STYLES if any(row["candidate"] == name for row in quiet)]
    limits = {of["case"]: of["limit"] for of in targets if of["target"] == OVER_COPY and of["memory"] != memory.KEPT}
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8.3, 2.1 + 0.3 * len(cases)), dpi=150, layout="constrained")
        axis = figure.subplots()
        for place in range(1, len(cases), 2):
            axis.axhspan(place - 0.5, place + 0.5, color="#F3F3F3", zorder=0)
        for i, candidate in enumerate(candidates):
            aside = 0.5 * (i / max(1, len(candidates) - 1) - 0.5)  # so that no error bar hides another
            of_it = [row for row in quiet if row["candidate"] == candidate]
            _draw_dots(axis, candidate, of_it, [cases.index(row["case"]) + aside for row in of_it])
        _draw_lines(axis, cases, limits)
        _scale(axis, quiet)
        axis.set_yticks(range(len(cases)), cases)
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(cases) - 0.5, -0.5)
        note = left_out(len(shown), len(quiet))
        axis.set_xlabel("time / copy baseline (logarithmic; median and quartiles)" + f"\n{note}" * bool(note))
        figure.suptitle(title, fontsize=10)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path)


def _draw_dots(axis: Axes, candidate: str, rows: Sequence[Mapping[str, Any]], places: Sequence[float]) -> None:
    colour, marker = STYLES[candidate]
    ratios = [row["ratio"] for row in rows]
    spans = [[bound / row["median_us"] * row["ratio"] for bound in row["quartiles_us"]] for row in rows]
    below = [ratio - low for ratio, (low, _) in zip(ratios, spans, strict=True)]
    above = [high - ratio for ratio, (_, high) in zip(ratios, spans, strict=True)]
    axis.errorbar(
        ratios, places, xerr=[below, above], fmt=marker, color=colour, label=candidate, markersize=5, elinewidth=1.2
    )


def _draw_lines(axis: Axes, cases: Sequence[str], limits: Mapping[str, float]) -> None:
    axis.axvline(1, color=COLOURS["black"], linewidth=0.9, zorder=1, label="copy baseline")
    limited = [place for place, case in enumerate(cases) if case in limits]
    if limited:
        axis.vlines(
            [limits[cases[place]] for place in limited],
            [place - 0.5 for place in limited],
            [place + 0.5 for place in limited],
            colors=COLOURS["black"],
            linestyles="dotted",
            linewidth=1.2,
            label=f"target of {ALONE}",
        )


def _scale(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    ratios = [row["ratio"] for row in rows] or [1.0]
    axis.set_xscale("log")
    axis.set_xlim(0.85 * min(1.0, *ratios), 1.2 * max(1.5, *ratios))
    low, high = axis.get_xlim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{tick:g}" for tick in ticks])
