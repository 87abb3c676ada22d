"""The norms compared: over which values each takes its moments, as a figure."""

from experiments.panel import WIDTH
from figures import NAMES

from syncnorm.report import COLOURS

SAMPLES, CHANNELS, POSITIONS, RANKS, GROUPS = 4, 6, 4, 2, 2  # of the drawing
AXES = {  # norm: is the value of (sample, channel, position) among those of the first mean and variance?
    "bn": lambda n, c, p: c == 0 and n < SAMPLES // RANKS,
    "sync_bn": lambda n, c, p: c == 0,
    "gn": lambda n, c, p: n == 0 and c < CHANNELS // GROUPS,
    "ln": lambda n, c, p: n == 0 and p == 0,
    "rms": lambda n, c, p: n == 0 and p == 0,
}
NOTES = {"ln": "(of each position)", "rms": "(of each position,\nmean taken as 0)"}


def draw_axes(plt):
    """Draw a batch of samples on two ranks for each norm, with the values of its first mean and variance marked."""
    figure, axes = plt.subplots(1, len(AXES), figsize=(WIDTH, 2.1), layout="constrained")
    for axis, (norm, marked) in zip(axes, AXES.items(), strict=True):
        for sample in range(SAMPLES):
            top = -sample - 0.5 * (sample * RANKS // SAMPLES)  # a gap between the ranks
            for channel in range(CHANNELS):
                for position in range(POSITIONS):
                    _cell(plt, axis, channel, top - position / POSITIONS, marked(sample, channel, position))
                axis.add_patch(plt.Rectangle((channel, top - 1), 1, 1, fill=False, edgecolor="black", linewidth=0.8))
        for rank in range(RANKS):
            middle = -(rank + 0.5) * SAMPLES / RANKS - 0.5 * rank
            axis.text(-0.3, middle, f"rank {rank}", rotation=90, va="center", ha="right", size=9)
        axis.set(xlim=(-1.2, CHANNELS + 0.1), ylim=(-SAMPLES - 0.6, 0.1), aspect="equal")
        axis.axis("off")
        axis.set_title(NAMES[norm], size=10)
        axis.text(
            CHANNELS / 2, -SAMPLES - 0.9, f"channels\n{NOTES.get(norm, '')}".strip(), ha="center", va="top", size=9
        )
    return figure


def _cell(plt, axis, x, y, marked):
    height = 1 / POSITIONS
    colour = COLOURS["blue"] if marked else "#EEEEEE"
    axis.add_patch(plt.Rectangle((x, y - height), 1, height, facecolor=colour, edgecolor="white", linewidth=0.5))
