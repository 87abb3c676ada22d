"""The report of examples/contrast.py: a table, figures, and below each what its numbers say.

A *cell* is a model, a norm and a number of samples per rank. A value of it is the mean over seeds with its spread, the
standard deviation. Two values differ clearly if they are further apart than CLEAR times their joint spread; no sentence
of the report calls one better than the other else.
"""

import csv
import io
import math
from typing import NamedTuple

import numpy as np
from common import write

CLEAR = 2
COMPARED = 8  # steps
ROUNDING = 1e-5  # of float32 losses after some steps; one that turns a ReLU about grows, in one process as well
NAMES = {"bn": "BatchNorm", "sync_bn": "SyncBatchNorm", "gn": "GroupNorm", "ln": "LayerNorm", "rms": "RMSNorm"}
STYLES = {  # colours that the colour-blind tell apart (Okabe and Ito), and markers
    "bn": ("#D55E00", "s"),
    "sync_bn": ("#0072B2", "o"),
    "gn": ("#009E73", "^"),
    "ln": ("#CC79A7", "D"),
    "rms": ("#666666", "v"),
}
COMPUTE, COMMUNICATION = "#9AA5B1", "#E69F00"
MODELS = {"cnn": "CNN", "transformer": "Transformer"}
GAPS = {  # of eval mode against train mode, and what makes one of either sign
    "worse": ", as where statistics over time tell of the future of the sequence, which a text to be written has not",
    "better": ", as where the running statistics are less noisy than those of a small batch",
}
FIGURES = {"error": "cnn", "step-time": None, "collectives": None, "transformer": "transformer"}  # and what it needs


class Value(NamedTuple):
    """The mean over seeds and its spread."""

    mean: float
    spread: float

    @classmethod
    def of(cls, numbers, resolution=0.0):
        """Take numbers, one a seed; `resolution` is the smallest spread that can be meant."""
        spread = np.std(numbers, ddof=1) if len(numbers) > 1 else 0.0
        return cls(float(np.mean(numbers)), max(float(spread), resolution))

    def clearly_above(self, other):
        return self.mean - other.mean > CLEAR * math.sqrt((self.spread**2 + other.spread**2) / 2)

    def text(self, digits, unit=""):
        return f"{self.mean:.{digits}f} ± {self.spread:.{digits}f}{unit}"


class Cells(dict):
    """{(model, norm, samples): {what: Value}} of records by run."""

    def __init__(self, records):
        super().__init__()
        groups = {}
        for run, record in records.items():
            groups.setdefault((run.model, run.norm, run.samples), {}).setdefault(run.kind, []).append(record)
        for cell, kinds in groups.items():
            self[cell] = quality(cell[0], kinds.get("quality", [])) | costs(kinds.get("time", []))

    def models(self):
        return list(dict.fromkeys(model for model, _, _ in self))

    def norms(self, model):
        return list(dict.fromkeys(norm for m, norm, _ in self if m == model))

    def sizes(self, model):
        return sorted({samples for m, _, samples in self if m == model})

    def values(self, model, norm, what):
        """Return the value of each number of samples per rank."""
        return [self[model, norm, samples][what] for samples in self.sizes(model)]


def quality(model, records):
    """Return the qualities of a cell: error in percent, or bits per character."""
    if not records:
        return {}
    if model == "cnn":
        numbers = [100 * (1 - record["test_accuracy"]) for record in records]
        return {"error": Value.of(numbers, 100 / records[0]["test_images"])}
    bits = np.array([record["valid_bits_per_character"] for record in records])
    in_train_mode = np.array([record["valid_bits_per_character_in_train_mode"] for record in records])
    return {"bits": Value.of(bits), "gap": Value.of(bits - in_train_mode), "steps": records[0]["steps"]}


def costs(records):
    """Return what a step of a cell costs: milliseconds, collectives and kilobytes."""
    if not records:
        return {}
    total = [1000 * record["seconds_per_step"] for record in records]
    communication = [1000 * record["communication_seconds_per_step"] for record in records]
    result = {"step": Value.of(total), "communication": Value.of(communication)}
    for what in "norm", "gradients":
        result[f"{what} collectives"] = records[0]["per_step"][what]["collectives"]
        result[f"{what} kB"] = records[0]["per_step"][what]["bytes"] / 1000
    return result


def listed(words):
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def names(norms):
    return listed(NAMES[norm] for norm in norms)


def plural(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"


def at(sizes):
    return listed(map(str, sizes)) + " sample" + "s" * (list(sizes) != [1])


def advise_error(cells):
    """Say for whom the CNN's error depends on the samples per rank, and what to take then."""
    sizes, norms = cells.sizes("cnn"), cells.norms("cnn")
    error = {norm: dict(zip(sizes, cells.values("cnn", norm, "error"), strict=True)) for norm in norms}
    few, many = sizes[0], sizes[-1]
    sentences = []
    rising = [n for n in norms if error[n][few].clearly_above(error[n][many])]
    falling = [n for n in norms if error[n][many].clearly_above(error[n][few])]
    level = [n for n in norms if n not in rising + falling]
    for norm in rising:
        sentences.append(
            f"With {NAMES[norm]} the error rises from {error[norm][many].text(1, ' %')} at "
            f"{plural(many, 'sample')} per rank to {error[norm][few].text(1, ' %')} at {few}."
        )
    if level:
        sentences.append(f"With {names(level)} the error does not depend on it beyond the spread over seeds.")
    if falling:
        sentences.append(
            f"With {names(falling)} the error is clearly lower at {few} than at {many}: for equally many "
            "samples, a smaller batch makes more steps."
        )
    if "bn" in norms and "sync_bn" in norms:
        helps = [s for s in sizes if error["bn"][s].clearly_above(error["sync_bn"][s])]
        if helps:
            rest = [str(s) for s in sizes if s not in helps]
            sentences.append(
                f"**Synchronizing BatchNorm lowers the error at {at(helps)} per rank"
                + (f"; at {listed(rest)} it makes no clear difference.**" if rest else ", so at all sizes tried.**")
            )
        elif all(error["sync_bn"][s].clearly_above(error["bn"][s]) for s in sizes):
            sentences.append("**Synchronizing BatchNorm raises the error at all of these sizes.**")
        else:
            sentences.append("**Synchronizing BatchNorm lowers the error at none of these sizes.**")
    if "sync_bn" in norms:
        for norm in [n for n in norms if n not in ("bn", "sync_bn")]:
            better = [s for s in sizes if error["sync_bn"][s].clearly_above(error[norm][s])]
            worse = [s for s in sizes if error[norm][s].clearly_above(error["sync_bn"][s])]
            verdict = [f"better than SyncBatchNorm at {at(better)} per rank"] if better else []
            verdict += [f"worse than SyncBatchNorm at {at(worse)} per rank"] if worse else []
            end = "; the quality comes without communication" if better and not worse else ""
            if not verdict:
                verdict, end = ["not to be told from SyncBatchNorm at any size"], ", and communicates nothing"
            sentences.append(f"{NAMES[norm]} is {' and '.join(verdict)}{end}.")
    return " ".join(sentences)


def advise_time(cells):
    """Say what synchronization adds to a step."""
    sentences = []
    for model in cells.models():
        sizes, norms = cells.sizes(model), cells.norms(model)
        base = "bn" if "bn" in norms else "ln"
        if not {base, "sync_bn"} <= set(norms):
            continue
        parts = []
        for size in sorted({sizes[0], sizes[-1]}):
            one, other = cells[model, "sync_bn", size], cells[model, base, size]
            share = 100 * one["communication"].mean / one["step"].mean
            if one["step"].clearly_above(other["step"]):
                how = f"{one['step'].mean / other['step'].mean:.1f} times as long as"
            elif other["step"].clearly_above(one["step"]):
                how = f"{one['step'].mean / other['step'].mean:.2f} times as long as"
            else:
                how = "not clearly longer than"
            parts.append(
                f"at {plural(size, 'sample')} per rank {how} one with {NAMES[base]} ({one['step'].text(1)} and "
                f"{other['step'].text(1)} ms), {share:.0f} % of it in communication"
            )
        sentences.append(f"{MODELS[model]}: a step with SyncBatchNorm takes, {'; '.join(parts)}.")
        ratio = cells[model, "sync_bn", sizes[-1]]["step"].mean / cells[model, base, sizes[-1]]["step"].mean
        if ratio > 1.5:
            sentences.append(
                "**On this machine that is a price to weigh against the quality**; a faster network, or a norm without "
                "communication, saves it."
            )
        else:
            sentences.append(f"**At {sizes[-1]} samples per rank it costs little.**")
    return " ".join(sentences)


def advise_collectives(cells):
    """Say whether what synchronization costs is the number of its collectives or their bytes."""
    sentences = []
    for model in cells.models():
        if "sync_bn" not in cells.norms(model):
            continue
        cell = cells[model, "sync_bn", cells.sizes(model)[0]]
        share = cell["norm kB"] / cell["gradients kB"]
        sentences.append(
            f"{MODELS[model]}: the SyncBatchNorm layers of a step make {cell['norm collectives']:.0f} collectives of "
            f"{1000 * cell['norm kB'] / cell['norm collectives']:.0f} bytes on average, in all {100 * share:.1f} % of "
            f"the bytes of the gradients, which take {cell['gradients collectives']:.0f}."
        )
        others = [n for n in cells.norms(model) if n != "sync_bn"]
        free = min(cells[model, n, cells.sizes(model)[0]]["communication"].mean for n in others) if others else None
        if free and cell["communication"].mean / free > 1 + 2 * share:
            sentences.append(
                f"They take {cell['communication'].mean - free:.1f} ms more than the gradients alone, "
                f"{(cell['communication'].mean - free) / free:.1f} times as long for {100 * share:.1f} % of the bytes: "
                "**what counts is the latency of a collective, not the bandwidth.**"
            )
    return " ".join(sentences)


def advise_transformer(cells):
    """Say which norm predicts best in the Transformer, in what time, and whether train and eval agree."""
    sizes, norms = cells.sizes("transformer"), cells.norms("transformer")
    few, many = sizes[0], sizes[-1]
    sentences = []
    for size in sorted({few, many}):
        bits = {n: cells["transformer", n, size]["bits"] for n in norms}
        ordered = sorted(norms, key=lambda n: bits[n].mean)
        equal = [n for n in ordered if not bits[n].clearly_above(bits[ordered[0]])]
        rest = [n for n in ordered if n not in equal]
        numbers = ", ".join(f"{NAMES[n]} {bits[n].text(3)}" for n in ordered)
        verdict = f"{names(equal)} predicts best" if len(equal) == 1 else f"{names(equal)} cannot be told apart"
        sentences.append(
            f"At {plural(size, 'sample')} per rank {verdict}"
            + (f"; {names(rest)} {'is' if len(rest) == 1 else 'are'} clearly worse" if rest else "")
            + f" (bits per character: {numbers})."
        )
    for norm in norms:
        gap = {size: cells["transformer", norm, size]["gap"] for size in sizes}
        clear = [size for size in sizes if abs(gap[size].mean) > max(CLEAR * gap[size].spread, 1e-6)]
        for side, why in GAPS.items():
            there = [size for size in clear if (gap[size].mean > 0) == (side == "worse")]
            if there:
                widest = max((gap[size] for size in there), key=lambda value: abs(value.mean))
                sentences.append(
                    f"{NAMES[norm]} predicts {side} in eval than in train mode at {at(there)} per rank, by up to "
                    f"{Value(abs(widest.mean), widest.spread).text(3)} bits{why}."
                )
    if "sync_bn" in norms:
        others = [n for n in norms if n != "sync_bn"]
        loses = [
            s
            for s in sizes
            if any(
                cells["transformer", "sync_bn", s]["bits"].clearly_above(cells["transformer", n, s]["bits"])
                for n in others
            )
        ]
        wins = [
            s
            for s in sizes
            if all(
                cells["transformer", n, s]["bits"].clearly_above(cells["transformer", "sync_bn", s]["bits"])
                for n in others
            )
        ]
        if wins and not loses:
            sentences.append(
                f"**Here SyncBatchNorm earns its communication at {listed(map(str, wins))} samples per rank.**"
            )
        elif loses and not wins:
            sentences.append(f"**A Transformer like this one does not need SyncBatchNorm: take {names(others)}.**")
        elif not wins:
            sentences.append(f"**{names(others)} give the same without communication.**")
        else:
            sentences.append("**Which norm is better depends on the samples per rank.**")
    return " ".join(sentences)


ADVICE = {
    "error": advise_error,
    "step-time": advise_time,
    "collectives": advise_collectives,
    "transformer": advise_transformer,
}
TITLES = {
    "error": "Test error of the CNN against samples per rank",
    "step-time": "Time of a step: compute and communication",
    "collectives": "Collectives and bytes of a step",
    "transformer": "The Transformer: quality against time, and what eval mode loses",
}


def agreement(records):
    """Return, by run, by how much the losses of one process differ from those of the ranks that it stood for.

    Of the first steps: later on rounding errors grow.
    """
    differences = []
    for run, record in records.items():
        whole = records.get(run._replace(kind="quality", steps=run.decay))
        if run.kind == "time" and whole and whole["ranks"] == 1:
            compared = min(len(record["loss"]), COMPARED)
            differences.append(np.abs(np.subtract(record["loss"][:compared], whole["loss"][:compared])).max())
    return differences


def table(cells):
    """Return the cells as a table in Markdown."""
    head = ["model", "norm", "samples per rank", "test error, %", "bits per character", "eval - train, bits"]
    head += ["step, ms", "of it communication, ms", "norm collectives", "norm kB"]
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|---:" * (len(head) - 2) + "|"]
    for (model, norm, samples), cell in cells.items():
        row = [MODELS[model], NAMES[norm], str(samples)]
        for what, digits in ("error", 1), ("bits", 3), ("gap", 3), ("step", 1), ("communication", 1):
            row.append(cell[what].text(digits) if what in cell else "")
        row += [f"{cell['norm collectives']:.0f}", f"{cell['norm kB']:.1f}"] if "norm kB" in cell else ["", ""]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def rows(records):
    """Return the records as CSV, one run a line."""
    per_step = [(what, unit) for what in ("norm", "gradients") for unit in ("collectives", "bytes")]
    plain = ["steps", "lr", "test_accuracy", "valid_bits_per_character", "valid_bits_per_character_in_train_mode"]
    plain += ["seconds_per_step", "communication_seconds_per_step"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["kind", "model", "norm", "ranks", "samples_per_rank", "seed", "processes"]
    writer.writerow([*head, *plain, *(f"{what}_{unit}_per_step" for what, unit in per_step)])
    for run, record in records.items():
        writer.writerow(
            [run.kind, run.model, run.norm, run.ranks, run.samples, run.seed, record["ranks"]]
            + [record.get(name, "") for name in plain]
            + [record["per_step"][what][unit] for what, unit in per_step]
        )
    return text.getvalue()


def write_report(directory, records):
    """Write report.md, data.csv and the figures."""
    cells = Cells(records)
    seeds = len({run.seed for run in records})
    ranks = next(iter(records)).ranks
    record = next(iter(records.values()))
    parts = ["# Do I need SyncBatchNorm?"]
    seen = {run.model: run.decay * run.ranks * run.samples for run in records}
    parts.append(
        f"{plural(ranks, 'rank')} on {plural(record['cores'], 'core')} ({record['device']}), {plural(seeds, 'seed')}; "
        "each training sees about "
        + listed(f"{count} samples ({MODELS[model]})" for model, count in seen.items())
        + f". Values are mean ± standard deviation over seeds. What the text calls clear is a difference of more than "
        f"{CLEAR} times the joint standard deviation of the two."
    )
    differences = agreement(records)
    if differences:
        close = sum(difference < ROUNDING for difference in differences)
        parts.append(
            "All but BatchNorm, which depends on how the batch is split, trained in one process with the global batch. "
            f"That it stands for {ranks} ranks is checked: the first steps, up to {COMPARED}, of {len(differences)} "
            f"trainings ran on the ranks too. In {close} of them no loss differs by more than {ROUNDING:.0e}; the "
            f"largest difference is {max(differences):.0e}."
        )
    for name, needed in FIGURES.items():
        if needed and needed not in cells.models():
            continue
        draw(name, cells, directory)
        parts += [f"## {TITLES[name]}", f"![{TITLES[name]}]({name}.png)", ADVICE[name](cells)]
    parts += [
        "## All numbers",
        table(cells),
        f"torch {record['torch']}; each run: [data.csv](data.csv)",
    ]
    write(directory / "data.csv", rows(records).encode())
    write(directory / "report.md", ("\n\n".join(parts) + "\n").encode())
    print(f"report: {directory / 'report.md'}")


def draw(name, cells, directory):
    """Draw a figure as PNG and SVG, 830 pixels wide at 100 dots per inch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    settings = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "contrast"}
    with plt.rc_context(settings):
        figure = DRAWINGS[name](plt, cells)
        for suffix in "png", "svg":
            figure.savefig(directory / f"{name}.{suffix}", dpi=200)
        plt.close(figure)


def label_ends(axis, ends, gap):
    """Write each curve's name beside its end, moved apart to at least `gap` (of the axis's height); {norm: (x, y)}."""
    places = {n: axis.transAxes.inverted().transform(axis.transData.transform(end)) for n, end in ends.items()}
    ordered = sorted(places, key=lambda n: places[n][1])
    heights, highest = [], 1 - gap * (len(ordered) - 1)  # of the first, so that the last is within the axis
    for norm in ordered:
        heights.append(max(min(places[norm][1], highest), heights[-1] + gap if heights else -math.inf))
        highest += gap
    for norm, height in zip(ordered, heights, strict=True):
        axis.annotate(
            NAMES[norm],
            xy=places[norm],
            xytext=(1.05, height),
            xycoords="axes fraction",
            va="center",
            color=STYLES[norm][0],
            arrowprops={
                "arrowstyle": "-",
                "color": STYLES[norm][0],
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkB": 3,
            },
        )


def sizes_axis(axis, sizes):
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("samples per rank (number)")


def curve(axis, norm, x, values, **options):
    colour, marker = STYLES[norm]
    mean, spread = zip(*values, strict=True)
    axis.errorbar(x, mean, spread, color=colour, marker=marker, capsize=3, linewidth=1.8, markersize=5, **options)


def draw_error(plt, cells):
    figure, axis = plt.subplots(figsize=(8.3, 4.4), layout="constrained")
    sizes = cells.sizes("cnn")
    ends, values = {}, []
    for place, norm in enumerate(cells.norms("cnn")):
        aside = 2 ** (0.04 * (place - 2))  # so that bars of equal height do not hide one another
        errors = cells.values("cnn", norm, "error")
        curve(axis, norm, [size * aside for size in sizes], errors)
        ends[norm] = sizes[-1] * aside, max(errors[-1].mean, 0.1)
        values += errors
    low, high = 0.5 * max(0.2, min(v.mean for v in values)), 1.2 * max(v.mean + v.spread for v in values)
    axis.set_yscale("log", nonpositive="clip")
    axis.set_ylim(low, high)
    sizes_axis(axis, sizes)
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_ylabel("test error (%, logarithmic)")
    label_ends(axis, ends, 0.065)
    axis.set_title("CNN: mean and standard deviation over seeds", loc="left")
    return figure


def draw_step_time(plt, cells):
    models = cells.models()
    figure, axes = plt.subplots(
        len(models), figsize=(8.3, 0.3 + 3.1 * len(models)), layout="constrained", squeeze=False
    )
    for axis, model in zip(axes[:, 0], models, strict=True):
        place, ticks, top = 0, [], max(c["step"].mean + c["step"].spread for k, c in cells.items() if k[0] == model)
        for norm in cells.norms(model):
            start = place
            for samples in cells.sizes(model):
                cell = cells[model, norm, samples]
                step, communication = cell["step"], cell["communication"].mean
                axis.bar(place, step.mean - communication, color=COMPUTE)
                axis.bar(place, communication, bottom=step.mean - communication, color=COMMUNICATION)
                axis.errorbar(place, step.mean, step.spread, color="black", capsize=2, linewidth=1)
                ticks.append((place, samples))
                place += 1
            middle = (start + place - 1) / 2
            axis.text(middle, 1, NAMES[norm], ha="center", va="top", transform=axis.get_xaxis_transform())
            place += 0.8
        axis.set_xticks(*zip(*ticks, strict=True))
        axis.tick_params(axis="x", length=0)
        axis.set(xlabel="samples per rank (number)", ylabel="time of a step (ms)", ylim=(0, 1.2 * top))
        axis.set_title(MODELS[model], loc="left")
        for x, text, colour in (0.62, "compute", "#5F6B78"), (0.98, "communication, with waiting", "#A66F00"):
            axis.text(x, 1.04, f"■ {text}", color=colour, ha="right", transform=axis.transAxes, weight="bold")
    return figure


def draw_collectives(plt, cells):
    models = cells.models()
    count = sum(len(cells.norms(model)) for model in models)
    figure, axes = plt.subplots(1, 2, figsize=(8.3, 1.2 + 0.33 * count), layout="constrained", sharey=True)
    labels, place = [], 0
    for model in models:
        for norm in cells.norms(model):
            cell = cells[model, norm, cells.sizes(model)[0]]
            for axis, unit, digits in (axes[0], "collectives", 0), (axes[1], "kB", 1):
                gradients, norms = cell[f"gradients {unit}"], cell[f"norm {unit}"]
                axis.barh(place, gradients, color=COMPUTE)
                axis.barh(place, norms, left=gradients, color=COMMUNICATION)
                text = f" {gradients:.{digits}f} + {norms:.{digits}f}" if norms else f" {gradients:.{digits}f}"
                axis.text(gradients + norms, place, text, va="center")
            labels.append((place, f"{MODELS[model]}, {NAMES[norm]}"))
            place += 1
        place += 0.6
    axes[0].set_yticks(*zip(*labels, strict=True))
    axes[0].invert_yaxis()
    axes[0].set_xlabel("collectives per step (number)")
    axes[1].set_xlabel("given by each rank per step (kB)")
    for axis in axes:
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(0, 1.4 * axis.get_xlim()[1])
        for x, text, colour in (0, "gradients", "#5F6B78"), (0.4, "+ norms", "#A66F00"):
            axis.text(x, 1.03, f"■ {text}", size=9, color=colour, weight="bold", transform=axis.transAxes)
    return figure


def draw_transformer(plt, cells):
    figure, axes = plt.subplots(1, 2, figsize=(8.3, 4.0), layout="constrained", width_ratios=[1.15, 1])
    sizes, norms = cells.sizes("transformer"), cells.norms("transformer")
    for norm in norms:
        here = [cells["transformer", norm, size] for size in sizes]
        seconds = [cell["steps"] * cell["step"].mean / 1000 for cell in here]
        curve(axes[0], norm, seconds, [cell["bits"] for cell in here])
        for size, second, cell in zip(sizes, seconds, here, strict=True):
            steps = [cells["transformer", n, size]["step"].mean for n in ("ln", "rms") if n in norms]
            above = norm != "sync_bn" and cell["step"].mean == max(steps)  # these two curves lie near each other
            axes[0].annotate(
                f"{NAMES[norm]}, {size}" if size == sizes[0] else str(size),
                (second, cell["bits"].mean),
                xytext=(5, 5) if above else (-5, -5),
                textcoords="offset points",
                ha="left" if above else "right",
                va="bottom" if above else "top",
                color=STYLES[norm][0],
                size=9,
            )
        curve(axes[1], norm, sizes, [cell["gap"] for cell in here])
    axes[0].margins(0.12, 0.16)
    axes[0].set_xscale("log")
    low, high = axes[0].get_xlim()
    ticks = [t * 10**power for power in range(-3, 6) for t in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].minorticks_off()
    axes[0].set_xlabel("training on all ranks (s, logarithmic)")
    axes[0].set_ylabel("validation, eval mode (bits per character)")
    axes[0].set_title("quality against time, by samples per rank", loc="left", size=10)
    sizes_axis(axes[1], sizes)
    axes[1].axhline(0, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes[1].set_ylabel("eval - train mode (bits per character)")
    axes[1].set_title("what eval mode loses", loc="left", size=10)
    label_ends(axes[1], {n: (sizes[-1], cells["transformer", n, sizes[-1]]["gap"].mean) for n in norms}, 0.075)
    return figure


DRAWINGS = {
    "error": draw_error,
    "step-time": draw_step_time,
    "collectives": draw_collectives,
    "transformer": draw_transformer,
}
