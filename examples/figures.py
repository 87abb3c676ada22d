"""What the figures of reports share: a name, a colour and a marker for each norm, and how a figure is drawn.

A figure of other things than norms passes names and styles of its own, as dictionaries by curve.
"""

import io
import itertools

from common import write

from syncnorm.report import COLOURS

NAMES = {
    "bn": "BatchNorm",
    "sync_bn": "SyncBatchNorm",
    "gn": "GroupNorm",
    "ln": "LayerNorm",
    "rms": "RMSNorm",
    "none": "no norm",
}
STYLES = {  # colours and markers
    "bn": (COLOURS["vermillion"], "s"),
    "sync_bn": (COLOURS["blue"], "o"),
    "gn": (COLOURS["green"], "^"),
    "ln": (COLOURS["purple"], "D"),
    "rms": (COLOURS["grey"], "v"),
    "none": (COLOURS["black"], "x"),
}


def draw(path, drawing, *args):
    """Write the figure that drawing(plt, *args) returns as `path`.png and `path`.svg.

    The files of equal figures are equal, byte by byte.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    settings = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": path.name}
    with plt.rc_context(settings):
        figure = drawing(plt, *args)
        for suffix, metadata in ("png", None), ("svg", {"Date": None}):
            image = io.BytesIO()
            figure.savefig(image, format=suffix, dpi=180, metadata=metadata)
            write(path.with_name(f"{path.name}.{suffix}"), image.getbuffer())
        plt.close(figure)


def ink(colour):
    """Return a darker shade of a colour, to write in."""
    from matplotlib.colors import to_rgb

    return tuple(0.7 * part for part in to_rgb(colour))


def apart(heights, gap):
    """Return ascending heights moved up and down to at least `gap` from one another, the last to at most 1."""
    up = itertools.accumulate(heights, lambda below, height: max(height, below + gap))
    down = itertools.accumulate(reversed(heights), lambda above, height: min(height, above - gap))
    middle = [(one + other) / 2 for one, other in zip(up, reversed(list(down)), strict=True)]
    return [height - max(0, middle[-1] - 1) for height in middle]


def label_ends(axis, ends, gap, names=NAMES, styles=STYLES):
    """Write each curve's name beside its end, at least `gap` (of the axis's height) apart; {norm: (x, y)}."""
    places = {n: axis.transAxes.inverted().transform(axis.transData.transform(end)) for n, end in ends.items()}
    ordered = sorted(places, key=lambda n: places[n][1])
    for norm, height in zip(ordered, apart([places[n][1] for n in ordered], gap), strict=True):
        axis.annotate(
            names[norm],
            xy=places[norm],
            xytext=(1.05, height),
            xycoords="axes fraction",
            va="center",
            color=ink(styles[norm][0]),
            arrowprops={
                "arrowstyle": "-",
                "color": styles[norm][0],
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkB": 3,
            },
        )


def sizes_axis(axis, sizes, label="samples per rank (number)"):
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    if len(sizes) == 1:
        axis.set_xlim(sizes[0] / 4, sizes[0] * 4)  # or what little lies beside one another would fill the width
    axis.set_xlabel(label)


def log_ticks(low, high, steps):
    """Return round numbers, `steps` of each decade, from low to high, or from below to above if these are not two."""
    numbers = [step * 10**power for power in range(-4, 7) for step in steps]
    ticks = [number for number in numbers if low <= number <= high]
    if len(ticks) < 2:
        ticks = [max(n for n in numbers if n <= low), *ticks, min(n for n in numbers if n >= high)]
    return ticks


def curve(axis, norm, x, values, styles=STYLES, **options):
    """Draw the means of Values against x, with their spreads as bars."""
    colour, marker = styles[norm]
    mean, spread = [value.mean for value in values], [value.spread for value in values]
    axis.errorbar(
        x, mean, spread, color=colour, marker=marker, capsize=3, linewidth=1.8, elinewidth=1.2, markersize=5, **options
    )
