"""A panel of a figure that shows numbers as points, in a line for each thing that is compared."""

from figures import ink


def dots(axis, rows, series, *, xlabel, title="", names, styles):
    """Draw {row: {series: Value}}, the first row at the top, with spreads as bars.

    Args:
        axis: to draw on.
        rows: the numbers; a row may lack some of the series.
        series: {key: (name, marker)}, explained in a legend if there are several.
        xlabel: with the unit.
        title: of the panel.
        names: what is written beside each row, by key.
        styles: colour and marker of each row, by key; the marker is that of the series.
    """
    apart = 0.5 / len(series)
    for place, (row, values) in enumerate(reversed(rows.items())):
        for key, value in values.items():
            height = place + apart * ((len(series) - 1) / 2 - list(series).index(key))
            axis.errorbar(
                value.mean,
                height,
                xerr=value.spread,
                color=styles[row][0],
                marker=series[key][1],
                markersize=6,
                markerfacecolor="white" if key != next(iter(series)) else None,
                linestyle="",
                capsize=3,
            )
    axis.set_yticks(range(len(rows)), [names[row] for row in reversed(rows)])
    for label, row in zip(axis.get_yticklabels(), reversed(rows), strict=False):
        label.set_color(ink(styles[row][0]))
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="both", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_xlabel(xlabel)
    axis.set_title(title, loc="left", size=10)


def legend(figure, series):
    """Explain the markers of the series below all panels."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color="#555555", marker=marker, linestyle="", markerfacecolor=None if first else "white")
        for first, (_, marker) in zip([True, *[False] * len(series)], series.values(), strict=False)
    ]
    figure.legend(
        marks, [name for name, _ in series.values()], loc="outside lower center", ncols=len(series), frameon=False
    )
