"""The report of examples/contrast.py: a table, figures, and below each what its numbers say and what to take when.

A *cell* is a model, a norm and a number of samples per rank; a value of it has one number a seed. Among many
comparisons of values some come out clear by chance, so few are made: a norm against SyncBatchNorm once, by the mean
over all sizes; BatchNorm against it from the fewest samples per rank on, up to the first size where the difference is
not clear.
"""

import csv
import io
import itertools

import numpy as np
from common import write
from contrast_figures import DRAWINGS, MODELS, TITLES
from figures import NAMES, draw
from spread import CLEAR, Value, chance
from words import listed, plural, spanned

from syncnorm.report import Table

DEAR = 1.5  # times as long
COMPARED = 8  # steps
ROUNDING = 1e-5  # of float32 losses after some steps; one that turns a ReLU about grows, in one process as well
SPREAD = "Values are mean ± standard deviation over seeds{of_error}. "
CLEARLY = (
    "A difference is called clear if it is more than {clear} times the joint standard deviation of the two{of_error}. "
    "With {seeds} seeds {chance:.0f} % of the pairs that do not differ would look so by chance, so each norm is "
    "compared with SyncBatchNorm once, by the mean over all sizes{alone}."
)
OF_ERROR = (  # where there are test errors, in SPREAD and in CLEARLY
    ", of the test error at least one test image",
    ": of the test error, even as a mean over sizes, more than {clear} images, since all runs share these images",
)
ALONE = (
    "; only BatchNorm is compared size by size, from the fewest samples per rank on, up to the first where the "
    "difference is not clear"
)
TIME = {  # is it dear?
    True: "take SyncBatchNorm only where its quality is worth that time",
    False: "time is no reason against SyncBatchNorm",
}
COLLECTIVES = {  # what takes the time that synchronization adds?
    "number": "what costs is the number of collectives, each with its latency and its waiting, not their bytes: to "
    "save time synchronize fewer layers or take a backend of lower latency, not one of more bandwidth",
    "bytes": "the collectives cost no more than their bytes: there is little to save",
    "compute": "most of the time that synchronization adds is no communication: to save it look at the layers' "
    "computation first",
    "nothing": "the collectives add nothing to the time of a step: there is nothing to save",
}
ONE_SEED = "With one seed no difference is clear: take no advice on quality from this report."
FIGURES = {"error": "cnn", "step-time": None, "collectives": None, "transformer": "transformer"}  # and what it needs


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

    def base(self, model):
        """Return the norm that the time of SyncBatchNorm is held against."""
        return "bn" if "bn" in self.norms(model) else "ln"

    def seeds(self):
        """Return how many numbers the values have."""
        return max(
            len(value.numbers) for _, cell in self.items() for value in cell.values() if isinstance(value, Value)
        )

    def values(self, model, norm, what):
        """Return the value of each number of samples per rank."""
        return [self[model, norm, samples][what] for samples in self.sizes(model)]

    def training_seconds(self, model, norm, samples):
        """Return how long a whole training takes on all ranks."""
        cell = self[model, norm, samples]
        return cell["steps"] * cell["step"].mean / 1000


def quality(model, records):
    """Return the qualities of a cell: error in percent, or bits per character."""
    if not records:
        return {}
    if model == "cnn":
        numbers = [100 * (1 - record["test_accuracy"]) for record in records]
        return {"error": Value(tuple(numbers), 100 / records[0]["test_images"])}
    bits = np.array([record["valid_bits_per_character"] for record in records])
    in_train_mode = np.array([record["valid_bits_per_character_in_train_mode"] for record in records])
    return {"bits": Value(tuple(bits)), "gap": Value(tuple(bits - in_train_mode)), "steps": records[0]["steps"]}


def costs(records):
    """Return what a step of a cell costs: milliseconds, collectives and kilobytes."""
    if not records:
        return {}
    total = [1000 * record["seconds_per_step"] for record in records]
    communication = [1000 * record["communication_seconds_per_step"] for record in records]
    result = {"step": Value(tuple(total)), "communication": Value(tuple(communication))}
    for what in "norm", "gradients":
        result[f"{what} collectives"] = records[0]["per_step"][what]["collectives"]
        result[f"{what} kB"] = records[0]["per_step"][what]["bytes"] / 1000
    return result


def advise(text, cases):
    """Return one bold sentence of advice: text[case], with the models of each case where there are several."""
    parts = [(f"in the {listed(models)} " if len(cases) > 1 else "") + text[case] for case, models in cases.items()]
    sentence = "; ".join(parts)
    return f"**{sentence[0].upper()}{sentence[1:]}.**"


def where(sizes):
    """Return at which numbers of samples per rank a mean over them was taken."""
    return "Over all sizes together" if len(sizes) > 1 else f"At {plural(sizes[0], 'sample')} per rank"


def without_advice(cells, model, what, digits, unit):
    """Return the mean of each norm over all sizes, of one seed, from which nothing follows."""
    means = (f"{NAMES[norm]} {Value.over(cells.values(model, norm, what)).text(digits)}" for norm in cells.norms(model))
    return f"{where(cells.sizes(model))}, in {unit}, by one seed: {listed(means)}."


def against_synchronized(cells, model, what, digits, unit):
    """Say how the norms that communicate nothing compare with SyncBatchNorm, and which to take then."""
    sizes = cells.sizes(model)
    mean = {norm: Value.over(cells.values(model, norm, what)) for norm in cells.norms(model) if norm != "bn"}
    synchronized = mean.pop("sync_bn")
    better = [norm for norm in mean if synchronized.clearly_above(mean[norm])]
    worse = [norm for norm in mean if mean[norm].clearly_above(synchronized)]
    equal = [norm for norm in mean if norm not in better + worse]
    verdicts = [
        listed(f"{NAMES[norm]} ({mean[norm].text(digits)})" for norm in norms) + verdict[len(norms) > 1]
        for norms, verdict in (
            (better, (" is clearly better", " are clearly better")),
            (worse, (" is clearly worse", " are clearly worse")),
            (equal, 2 * (" cannot be told from it",)),
        )
        if norms
    ]
    if better:
        take = listed((NAMES[norm] for norm in better), "or")
    elif equal:
        lowest = min(equal, key=lambda norm: mean[norm].mean)
        take = f"{NAMES[lowest]}, which is not clearly worse and needs no communication, or SyncBatchNorm"
    else:
        take = "SyncBatchNorm"
    return f"{where(sizes)} SyncBatchNorm comes to {synchronized.text(digits)} {unit}; {'; '.join(verdicts)}.", take


def advise_error(cells):
    """Say up to how many samples per rank synchronizing lowers the error, and what to take then."""
    if cells.seeds() == 1:
        return without_advice(cells, "cnn", "error", 1, "%")
    sizes = cells.sizes("cnn")
    alone, synchronized = (
        dict(zip(sizes, cells.values("cnn", norm, "error"), strict=True)) for norm in ("bn", "sync_bn")
    )
    helped = list(itertools.takewhile(lambda size: alone[size].clearly_above(synchronized[size]), sizes))
    rest = sizes[len(helped) :]
    comparison, take = against_synchronized(cells, "cnn", "error", 1, "%")

    def both(size):
        return f"({alone[size].text(1)} and {synchronized[size].text(1)} %)"

    if helped:
        up_to = f"{'up to ' if len(helped) > 1 else 'at '}{plural(helped[-1], 'sample')} per rank"
        finding = f"BatchNorm's error is clearly above SyncBatchNorm's {up_to} {both(helped[-1])}"
        finding += f", at {rest[0]} no longer {both(rest[0])}" if rest else ""
        more = "; with more, BatchNorm will do as far as these numbers tell" if rest else ""
        advice = f"{up_to[0].upper()}{up_to[1:]} take {take}{more}"
    else:
        few = f"{plural(sizes[0], 'sample')} per rank"
        finding = f"Even at {few} BatchNorm's error is not clearly above SyncBatchNorm's {both(sizes[0])}"
        advice = "Leave BatchNorm as it is: these numbers give no reason to synchronize it"
    return f"{finding}. {comparison} **{advice}.**"


def advise_time(cells):
    """Say what synchronization adds to a step."""
    parts, dear, shares = [], {}, []
    for model in cells.models():
        base = cells.base(model)
        sizes = sorted({cells.sizes(model)[0], cells.sizes(model)[-1]})
        times, ratios = [], []
        for size in sizes:
            one, other = cells[model, "sync_bn", size], cells[model, base, size]["step"]
            ratios.append(one["step"].mean / other.mean)
            shares.append(100 * one["communication"].mean / one["step"].mean)
            times.append(f"{ratios[-1]:.1f} times as long at {size} ({one['step'].text(1)} and {other.text(1)} ms)")
        dear.setdefault(max(ratios) > DEAR, []).append(MODELS[model])
        parts.append(f"against {NAMES[base]} in the {MODELS[model]}, {listed(times)}")
    return (
        f"By samples per rank, a step with SyncBatchNorm takes, {'; '.join(parts)}. Communication, with waiting, is "
        f"{spanned(f'{share:.0f}' for share in sorted(shares))} % of its time. {advise(TIME, dear)}"
    )


def advise_collectives(cells):
    """Say whether what synchronization costs is the number of its collectives, their bytes, or no communication."""
    parts, costly = [], {}
    for model in cells.models():
        few = cells.sizes(model)[0]
        cell = cells[model, "sync_bn", few]
        others = min(cells[model, n, few]["communication"].mean for n in cells.norms(model) if n != "sync_bn")
        added, share = cell["communication"].mean - others, cell["norm kB"] / cell["gradients kB"]
        base = cells.base(model)
        longer = cell["step"].mean - cells[model, base, few]["step"].mean
        parts.append(
            f"In the {MODELS[model]}, SyncBatchNorm's layers make {cell['norm collectives']:.0f} collectives a step, "
            f"of {1000 * cell['norm kB'] / cell['norm collectives']:.0f} bytes on average. They add {100 * share:.1f} "
            f"% to the bytes of the gradients and, at {plural(few, 'sample')} per rank, {added:.1f} ms to their "
            f"{others:.1f} ms; the whole step takes {abs(longer):.1f} ms {'more' if longer > 0 else 'less'} than with "
            f"{NAMES[base]}."
        )
        if added <= 2 * share * others:
            what = "bytes"
        elif longer <= 0:
            what = "nothing"
        else:
            what = "number" if added > longer / 2 else "compute"
        costly.setdefault(what, []).append(MODELS[model])
    return " ".join([*parts, advise(COLLECTIVES, costly)])


def advise_transformer(cells):
    """Say which norm predicts best in the Transformer, in what time, and whether train and eval agree."""
    sizes, norms = cells.sizes("transformer"), cells.norms("transformer")
    gaps = sorted((cells["transformer", "sync_bn", size]["gap"].mean, size) for size in sizes)
    gaps = [f"{cells['transformer', 'sync_bn', size]['gap'].text(3)} (at {size})" for _, size in gaps]
    gap = (
        "In train mode SyncBatchNorm's statistics hold the text that is to be predicted, in eval mode they do not: its "
        f"bits in eval mode less those in train mode are {spanned(gaps)}, above 0 where eval mode is worse. The other "
        "norms have no such gap."
    )
    if cells.seeds() == 1:
        return f"{without_advice(cells, 'transformer', 'bits', 3, 'bits per character')} {gap}"
    comparison, take = against_synchronized(cells, "transformer", "bits", 3, "bits per character")
    ends = []
    for norm in norms:
        bits = dict(zip(sizes, cells.values("transformer", norm, "bits"), strict=True))
        size = min(sizes, key=lambda size: bits[size].mean)
        seconds = cells.training_seconds("transformer", norm, size)
        ends.append(f"{NAMES[norm]} {bits[size].text(3)} in {seconds:.0f} s (at {size})")
    return (
        f"{comparison} At the number of samples per rank that suits each best, the trainings end at: {listed(ends)}. "
        f"{gap} **In a Transformer like this one take {take}.**"
    )


ADVICE = {
    "error": advise_error,
    "step-time": advise_time,
    "collectives": advise_collectives,
    "transformer": advise_transformer,
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
    lines = []
    for (model, norm, samples), cell in cells.items():
        row = [MODELS[model], NAMES[norm], str(samples)]
        for what, digits in ("error", 1), ("bits", 3), ("gap", 3), ("step", 1), ("communication", 1):
            row.append(cell[what].text(digits) if what in cell else "")
        row += [f"{cell['norm collectives']:.0f}", f"{cell['norm kB']:.1f}"] if "norm kB" in cell else ["", ""]
        lines.append(row)
    filled = [any(column) for column in zip(*lines, strict=True)]  # a report on one model has no column for the other
    columns, *rows = (list(itertools.compress(row, filled)) for row in [head, *lines])
    return Table("", columns, [rows]).markdown()


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


def rule(cells):
    """Say what the numbers are, and when two of them differ clearly."""
    seeds = cells.seeds()
    if seeds == 1:
        return ONE_SEED
    errors = "cnn" in cells.models()
    spread, clear = (text.format(clear=CLEAR) if errors else "" for text in OF_ERROR)
    clearly = CLEARLY.format(
        clear=CLEAR, of_error=clear, seeds=seeds, chance=100 * chance(seeds), alone=ALONE if errors else ""
    )
    return SPREAD.format(of_error=spread) + clearly


def write_report(directory, records):
    """Write report.md, data.csv and the figures."""
    cells = Cells(records)
    seeds = cells.seeds()
    ranks = next(iter(records)).ranks
    record = next(iter(records.values()))
    seen = {run.model: run.decay * run.ranks * run.samples for run in records}
    parts = [
        "# Do I need SyncBatchNorm?",
        f"{plural(ranks, 'rank')} on {plural(record['cores'], 'core')} ({record['device']}), {plural(seeds, 'seed')}. "
        "Each training sees about "
        + listed((f"{count} samples ({MODELS[model]})" for model, count in seen.items()), "or")
        + ", so the fewer samples per rank, the more steps. "
        + rule(cells),
    ]
    differences = agreement(records)
    if differences:
        close = sum(difference < ROUNDING for difference in differences)
        alone = "bn" in {norm for _, norm, _ in cells}
        parts.append(
            f"All{' but BatchNorm, which depends on how the batch is split,' * alone} trained in one process with the "
            "global batch. "
            f"That one process stands for {ranks} ranks is checked: the first steps, up to {COMPARED}, of "
            f"{len(differences)} trainings ran on the ranks too. In {close} of them no loss differs by more than "
            f"{ROUNDING:.0e}; the largest difference is {max(differences):.0e}."
        )
    for name, needed in FIGURES.items():
        if needed and needed not in cells.models():
            continue
        draw(directory / name, DRAWINGS[name], cells)
        parts += [f"## {TITLES[name]}", f"![{TITLES[name]}]({name}.png)", ADVICE[name](cells)]
    parts += [
        "## All numbers",
        table(cells).rstrip(),
        f"torch {record['torch']}; each run: [data.csv](data.csv)",
    ]
    write(directory / "data.csv", rows(records).encode())
    write(directory / "report.md", ("\n\n".join(parts) + "\n").encode())
    print(f"report: {directory / 'report.md'}")
