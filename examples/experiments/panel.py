"""One panel of a figure: curves with their spread over seeds, each named where it ends.

The curves differ in colour, marker and, for many points, line style, so that they can be told apart in grey too.
"""

import itertools
import math

from figures import NAMES, STYLES, curve, ink, label_ends, log_ticks

from syncnorm.report import COLOURS

WIDTH = 8.3  # inches of a figure, as wide as a README
FEW = 5  # bars that leave room for a number and its spread on one line
MANY = 12  # points, of which no markers are drawn
DASHES = dict(
    zip("soD^vxP*", ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (7, 3))), strict=True)
)
CHOICE = [
    (COLOURS[name], marker)
    for name, marker in zip(
        ("vermillion", "blue", "green", "purple", "black", "orange", "sky blue"), "so^DxvP", strict=True
    )
]


def styles_of(keys):
    """Return a colour and a marker for each key, for curves that are no norms."""
    return dict(zip(keys, itertools.cycle(CHOICE), strict=False))


def panel(
    axis,
    curves,
    *,
    xlabel,
    ylabel,
    title="",
    logx=False,
    logy=False,
    ticks=None,
    names=NAMES,
    styles=STYLES,
    labels=True,
):
    """Draw curves {key: (x, Values)}; numbers that are not finite are left out.

    Args:
        axis: to draw on.
        curves: {key: (x, Values)}, where x may be numbers or words.
        xlabel: with the unit.
        ylabel: with the unit.
        title: of the panel.
        logx: a logarithmic axis.
        logy: likewise.
        ticks: of the horizontal axis; None leaves it to the numbers.
        names: what is written at the end of each curve, by key.
        styles: colour and marker, by key.
        labels: whether to write the names.
    """
    ends, seen = {}, []
    axis.set_xscale("log" if logx else axis.get_xscale())
    axis.set_yscale("log" if logy else "linear")
    for key, (x, values) in curves.items():
        points = [(at, value) for at, value in zip(x, values, strict=True) if math.isfinite(value.mean)]
        if not points:
            continue
        x, values = zip(*points, strict=True)
        if len(x) > MANY:
            _band(axis, styles[key], x, values)
        else:
            curve(axis, key, x, values, styles=styles)
        ends[key] = axis.convert_xunits(x[-1]), values[-1].mean
        seen += [value.mean for value in values]
    if ticks:
        axis.set_xticks(ticks, [f"{tick:g}" if isinstance(tick, float | int) else tick for tick in ticks])
        axis.minorticks_off()
    if logy and seen and min(seen) > 0:
        _plain_numbers(axis, 0.8 * min(seen), 1.2 * max(seen))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, loc="left", size=10)
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    if labels:
        axis.figure.canvas.draw()
        label_ends(axis, ends, 0.07, names=names, styles=styles)


def bars(axis, heights, *, ylabel, title="", styles=STYLES, names=NAMES, digits=2):
    """Draw bars {key: Value} with their numbers on top."""
    for place, (key, value) in enumerate(heights.items()):
        axis.bar(place, value.mean, color=styles[key][0], yerr=value.spread, capsize=3)
        axis.annotate(
            value.text(digits).replace(" ±", "\n±" if len(heights) > FEW else " ±"),
            (place, value.mean + value.spread),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            size=8,
            color=ink(styles[key][0]),
        )
    axis.set_xticks(range(len(heights)), [names[key] for key in heights], rotation=20, ha="right")
    axis.margins(y=0.17)
    axis.set(ylabel=ylabel)
    axis.set_title(title, loc="left", size=10)


def grouped_bars(axis, groups, *, ylabel, styles, names, title="", digits=1):
    """Draw bars {group: {key: Value}}, the keys of a group beside one another, with their numbers on top.

    `styles` are {key: (colour, hatch)}, and `names` what a legend says. The legend is left to the caller.
    """
    width = 0.8 / len(styles)
    for number, (key, (colour, hatch)) in enumerate(styles.items()):
        values = [heights[key] for heights in groups.values()]
        places = [group + (number - (len(styles) - 1) / 2) * width for group in range(len(groups))]
        means, spreads = [value.mean for value in values], [value.spread or math.nan for value in values]
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": names[key]}
        axis.bar(places, means, width, yerr=spreads, capsize=2, **look)
        for place, value in zip(places, values, strict=True):
            axis.annotate(
                f"{value.mean:.{digits}f}",
                (place, value.mean + value.spread),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                size=7.5,
            )
    axis.set_xticks(range(len(groups)), list(groups), size=9)
    axis.margins(y=0.12)
    axis.set(ylabel=ylabel)
    axis.set_title(title, loc="left", size=10)


def _band(axis, style, x, values):
    colour, marker = style
    mean, spread = [value.mean for value in values], [value.spread for value in values]
    high = [m + s for m, s in zip(mean, spread, strict=True)]
    low = [m - s for m, s in zip(mean, spread, strict=True)]
    if axis.get_yscale() == "log":  # which has no place for what is not positive: as far below as above
        low = [below if below > 0 else m * m / above for below, m, above in zip(low, mean, high, strict=True)]
    axis.plot(x, mean, color=colour, linewidth=1.8, linestyle=DASHES[marker])
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _plain_numbers(axis, low, high):
    ticks = log_ticks(low, high, (1, 2, 5) if high / low < 100 else (1,))
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
