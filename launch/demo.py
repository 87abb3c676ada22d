"""Run the matrix of the demo, print its table, draw its figure. Called by `launch/demo`, in the environment it made."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

GLOBAL_BATCH = 16
COMPARED = 20  # steps in which synchronized runs are held against one rank
SMOOTHING = 12  # steps in a running mean of the drawn losses
TIMEOUT = 170  # seconds for one run
NORMS = {"sync_bn": "synchronized", "bn": "per rank"}
SETTINGS = {"NO_COLOR": "1"} if not sys.stderr.isatty() else {}


class Run(NamedTuple):
    """One training: norm, launcher and number of ranks."""

    norm: str
    launcher: str
    ranks: int

    def command(self, steps, record):
        """Return the command line, as a user would type it."""
        start = {
            "torchrun": ["torchrun", "--standalone", "--nproc-per-node", str(self.ranks)],
            "mpirun": ["mpirun", "-n", str(self.ranks), "python"],
        }[self.launcher]
        options = f"--norm {self.norm} --batch-per-rank {GLOBAL_BATCH // self.ranks} --steps {steps} --lr 0.02"
        return [*start, "examples/cnn.py", *options.split(), "--out", str(record)]

    @property
    def label(self):
        """Name the run in the figure."""
        return f"{self.ranks} rank{'s' * (self.ranks > 1)} x {GLOBAL_BATCH // self.ranks} samples, {self.launcher}"


STYLES = {  # launcher, ranks -> colour (told apart by the colour-blind), line width, dashes
    ("torchrun", 1): ("#8C8C8C", 7.0, "solid"),
    ("torchrun", 2): ("#56B4E9", 4.0, "solid"),
    ("mpirun", 2): ("#D55E00", 2.0, "solid"),
    ("torchrun", 4): ("#000000", 1.2, (0, (4, 3))),
}
RUNS = [Run(norm, *who) for norm in NORMS for who in STYLES]


def train(run, steps, directory):
    """Run one training and return its record."""
    record = directory / f"{run.norm}-{run.launcher}-{run.ranks}.json"
    record.unlink(missing_ok=True)
    try:
        subprocess.run(run.command(steps, record), check=True, timeout=TIMEOUT, env=os.environ | SETTINGS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        sys.exit(f"{error}")
    return json.loads(record.read_text())


def difference(records, run):
    """Return |loss - loss on one rank| of every step."""
    return np.abs(np.subtract(records[run]["loss"], records[run._replace(launcher="torchrun", ranks=1)]["loss"]))


def table(records):
    """Return the results, one run a row."""
    from rich.table import Table

    result = Table(title=f"CNN on 8x8 digits, global batch {GLOBAL_BATCH}")
    for title in ("statistics", "launcher", "ranks", "samples per rank"):
        result.add_column(title)
    for title in (
        f"largest loss difference to 1 rank, first {COMPARED} steps",
        "test accuracy",
        "norm collectives per step",
        "bytes each rank gives",
        "samples/s",
    ):
        result.add_column(title, justify="right")
    for run, record in records.items():
        norm = record["per_step"]["norm"]
        result.add_row(
            NORMS[run.norm],
            run.launcher,
            str(run.ranks),
            str(GLOBAL_BATCH // run.ranks),
            f"{difference(records, run)[:COMPARED].max():.1e}" if run.ranks > 1 else "-",
            f"{record['test_accuracy']:.3f}",
            f"{norm['collectives']:.0f}",
            f"{norm['bytes']:,.0f}",
            f"{record['samples_per_second']:,.0f}",
            end_section=run == RUNS[len(STYLES) - 1],
        )
    return result


def draw(records, path):
    """Draw the losses of both norms, and how far each run is from that on one rank."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(14.5, 4.6), layout="constrained", width_ratios=[1, 1, 1.1])
    axes[1].sharey(axes[0])
    for axis, norm in zip(axes, NORMS, strict=False):
        draw_losses(axis, {run: record for run, record in records.items() if run.norm == norm})
        axis.set_title(f"BatchNorm, {NORMS[norm]} statistics")
    axes[0].set_ylabel(f"training loss, mean of {SMOOTHING} steps")
    draw_differences(axes[2], records)
    figure.savefig(path, dpi=110)


def draw_losses(axis, records):
    """Draw the losses, each curve with its name in the free upper right, the highest curve's at the top."""
    curves = {}
    for run, record in records.items():
        colour, width, dashes = STYLES[run.launcher, run.ranks]
        loss = np.convolve(record["loss"], np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")
        curves[run] = np.arange(SMOOTHING, SMOOTHING + len(loss)), loss
        axis.plot(*curves[run], color=colour, linewidth=width, linestyle=dashes)
    axis.set(xlabel="training step", ylim=(0, None))
    for place, run in enumerate(sorted(curves, key=lambda run: -curves[run][1][len(loss) // 4])):
        steps, loss = curves[run]
        at = len(loss) * (1 + place) // 12
        axis.annotate(
            run.label,
            xy=(steps[at], loss[at]),
            xytext=(0.39, 0.94 - 0.1 * place),
            textcoords="axes fraction",
            ha="left",
            va="center",
            color=STYLES[run.launcher, run.ranks][0],
            arrowprops={"arrowstyle": "-", "color": STYLES[run.launcher, run.ranks][0], "relpos": (0, 0.5)},
        )


def draw_differences(axis, records):
    """Draw on a logarithmic axis how far apart curves are that seem to lie on each other."""
    for norm, colour in zip(NORMS, ("#0072B2", "#CC79A7"), strict=True):
        runs = [run for run in records if run.norm == norm and run.ranks > 1]
        largest = np.max([difference(records, run) for run in runs], axis=0).clip(min=1e-9)
        axis.plot(np.arange(1, len(largest) + 1), largest, color=colour, linewidth=2)
        axis.text(len(largest), largest.max() * 3, NORMS[norm], color=colour, ha="right", va="bottom")
    axis.set(
        yscale="log", xlabel="training step", ylabel="|loss - loss on 1 rank|, largest of the runs", ylim=(1e-9, 50)
    )
    axis.set_title("how far from 1 rank")


def main():
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="training steps of each run")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="for the figure and the records")
    parser.add_argument("--redraw", action="store_true", help="draw the records that are there, train nothing")
    args = parser.parse_args()
    directory = args.out / "demo"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if args.redraw:
            records = {r: json.loads((directory / f"{r.norm}-{r.launcher}-{r.ranks}.json").read_text()) for r in RUNS}
    except OSError as error:
        sys.exit(f"{'--redraw' if args.redraw else '--out'}: {error}")
    if not args.redraw:
        records = {run: train(run, args.steps, directory) for run in RUNS}
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 130).print(table(records))
    largest = max(difference(records, run)[:COMPARED].max() for run in RUNS if run.norm == "sync_bn")
    print(f"synchronized: all runs within {largest:.1e} of one rank over the first {COMPARED} steps")
    draw(records, args.out / "demo.png")
    print(f"figure: {args.out / 'demo.png'}")


if __name__ == "__main__":
    main()
