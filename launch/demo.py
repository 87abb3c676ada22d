"""Run the matrix of the demo, print its table, draw its figure. Called by `launch/demo`, in the environment it made."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from syncnorm.report import COLOURS, Table

GLOBAL_BATCH = 16
COMPARED = 20  # steps in which float32 runs are compared with one rank: later on rounding errors have grown
SMOOTHING = 12  # steps in a running mean of the drawn losses
TIMEOUT = 170  # seconds for one run
SMALLEST = 1e-17  # difference that is drawn
NORMS = {"sync_bn": "synchronized", "bn": "per rank"}
SETTINGS = {"NO_COLOR": "1"} if not sys.stderr.isatty() else {}


class Run(NamedTuple):
    """One training: norm, dtype, launcher and number of ranks."""

    norm: str
    dtype: str
    launcher: str
    ranks: int

    def command(self, steps, record):
        """Return the command line, as a user would type it."""
        start = {
            "torchrun": ["torchrun", "--standalone", "--nproc-per-node", str(self.ranks)],
            "mpirun": ["mpirun", "-n", str(self.ranks), "python"],
        }[self.launcher]
        options = f"--norm {self.norm} --batch-per-rank {GLOBAL_BATCH // self.ranks} --steps {steps} --lr 0.02"
        return [*start, "examples/cnn.py", *options.split(), "--dtype", self.dtype, "--out", str(record)]

    @property
    def record(self):
        """Name the file of the record."""
        return f"{self.norm}-{self.dtype}-{self.launcher}-{self.ranks}.json"

    @property
    def on_one_rank(self):
        """Return the same training on one rank."""
        return self._replace(launcher="torchrun", ranks=1)

    @property
    def label(self):
        """Name the run in the figure."""
        return f"{self.ranks} rank{'s' * (self.ranks > 1)} x {GLOBAL_BATCH // self.ranks} samples, {self.launcher}"


STYLES = {  # launcher, ranks -> colour, line width, dashes
    ("torchrun", 1): (COLOURS["grey"], 7.0, "solid"),
    ("torchrun", 2): (COLOURS["sky blue"], 4.0, "solid"),
    ("mpirun", 2): (COLOURS["vermillion"], 2.0, "solid"),
    ("torchrun", 4): (COLOURS["black"], 1.2, (0, (4, 3))),
}
IN_FLOAT64 = [("torchrun", 1), ("mpirun", 2), ("mpirun", 4)]
SECTIONS = {  # of the table, and curves of the differences: colour, and whether the label is above
    ("bn", "float32"): (COLOURS["purple"], True),
    ("sync_bn", "float32"): (COLOURS["blue"], False),
    ("sync_bn", "float64"): (COLOURS["green"], True),
}
RUNS = [Run(*section, *who) for section in SECTIONS for who in (STYLES if section[1] == "float32" else IN_FLOAT64)]


def train(run, steps, directory):
    """Run one training and return its record."""
    record = directory / run.record
    record.unlink(missing_ok=True)
    try:
        subprocess.run(run.command(steps, record), check=True, timeout=TIMEOUT, env=os.environ | SETTINGS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        sys.exit(f"{error}")
    return json.loads(record.read_text())


def difference(records, run):
    """Return |loss - loss on one rank| of every step."""
    return np.abs(np.subtract(records[run]["loss"], records[run.on_one_rank]["loss"]))


def largest(records, norm, dtype):
    """Return the largest difference of all runs of that kind, at every step."""
    return np.max([difference(records, r) for r in records if r[:2] == (norm, dtype) and r.ranks > 1], axis=0)


def table(records):
    """Return the results, one run a row."""
    columns = ["statistics", "dtype", "launcher", "ranks"]
    columns += [f"difference, first {COMPARED} steps", "difference, all steps", "test accuracy"]
    columns += ["norm calls per step", "their kB", "samples/s"]
    sections = [[cells(records, run) for run in records if run[:2] == section] for section in SECTIONS]
    title = f"CNN on 8x8 digits, global batch {GLOBAL_BATCH}; largest difference of the loss to that on 1 rank"
    return Table(title, columns, sections, names=4)


def cells(records, run):
    """Return a row of the table."""
    record = records[run]
    norm = record["per_step"]["norm"]
    apart = difference(records, run)
    return [
        NORMS[run.norm],
        run.dtype,
        run.launcher,
        str(run.ranks),
        f"{apart[:COMPARED].max():.1e}" if run.ranks > 1 else "-",
        f"{apart.max():.1e}" if run.ranks > 1 else "-",
        f"{record['test_accuracy']:.3f}",
        f"{norm['collectives']:.0f}",
        f"{norm['bytes'] / 1000:.1f}",
        f"{record['samples_per_second']:,.0f}",
    ]


def proof(records):
    """Say how far apart the losses of all ranks are."""
    steps = len(next(iter(records.values()))["loss"])
    whole, first, alone = (
        largest(records, "sync_bn", "float64").max(),
        largest(records, "sync_bn", "float32")[:COMPARED].max(),
        largest(records, "bn", "float32")[:COMPARED].max(),
    )
    return (
        f"synchronized, float64: all runs within {whole:.1e} of one rank over all {steps} steps\n"
        f"synchronized, float32: all runs within {first:.1e} of one rank over the first {COMPARED} steps\n"
        f"per rank, float32:     up to {alone:.1e} from one rank over the first {COMPARED} steps"
    )


def draw(records, path):
    """Draw the losses of both norms in float32, and how far each kind of run is from that on one rank."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(14.5, 4.6), layout="constrained", width_ratios=[1, 1, 1.1])
    axes[1].sharey(axes[0])
    for axis, norm in zip(axes, NORMS, strict=False):
        draw_losses(axis, {run: record for run, record in records.items() if run[:2] == (norm, "float32")})
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
    for (norm, dtype), (colour, above) in SECTIONS.items():
        apart = np.maximum.accumulate(largest(records, norm, dtype)).clip(min=SMALLEST)
        axis.plot(np.arange(1, len(apart) + 1), apart, color=colour, linewidth=2)
        axis.annotate(
            f"{NORMS[norm]} statistics, {dtype}",
            (2, apart[min(COMPARED, len(apart)) - 1]),
            xytext=(0, 5 if above else -5),
            textcoords="offset points",
            va="bottom" if above else "top",
            color=colour,
        )
    axis.set(
        yscale="log", xlabel="training step", ylabel="|loss - loss on 1 rank|, largest so far", ylim=(SMALLEST, 1e2)
    )
    axis.set_title("how far from 1 rank")


def main():
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="training steps of each run (default: 120)")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="for the figure and the records")
    parser.add_argument("--redraw", action="store_true", help="draw the records that are there, train nothing")
    args = parser.parse_args()
    directory = args.out / "demo"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if args.redraw:
            records = {run: json.loads((directory / run.record).read_text()) for run in RUNS}
    except OSError as error:
        sys.exit(f"{'--redraw' if args.redraw else '--out'}: {error}")
    if not args.redraw:
        records = {run: train(run, args.steps, directory) for run in RUNS}
    table(records).show()
    print(proof(records))
    draw(records, args.out / "demo.png")
    print(f"figure: {args.out / 'demo.png'}")


if __name__ == "__main__":
    main()
