"""What a claim about norms is: a sentence, an experiment, and how its numbers are judged and drawn.

An experiment is a list of cases. A case is a dictionary of settings, such as {"norm": "bn", "lr": 0.1}, which is run
with several seeds. Each run measures numbers by name, and curves, which are numbers by step.
"""

import csv
import functools
import inspect
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from spread import Value

from syncnorm.report import Table

HOLDS, FAILS = "holds here", "does not hold here"
DRAWING = ("figures", "spread", "words", "experiments", "experiments.claim", "experiments.dots", "experiments.panel")
EXAMPLES = Path(__file__).parents[1]
COLUMNS = ("seed", "metric", "step", "value")


class Verdict(NamedTuple):
    """What the numbers say.

    Args:
        held: HOLDS, FAILS, or `only_if(condition)`.
        finding: one to three sentences with the numbers that decide it.
        table: a Table of all numbers that count, if there are more than a sentence can hold.
    """

    held: str
    finding: str
    table: Table | None = None


def only_if(condition):
    """Return the verdict of a claim that holds under a condition, a clause such as "the batch is small"."""
    return f"holds only if {condition}"


class Published(NamedTuple):
    """A published number beside ours: what it is, what was published (with a link), and what differs here.

    `ours` is a function of the Data that returns the text of our number.
    """

    what: str
    published: str
    ours: Callable
    differs: str


class Claim(NamedTuple):
    """A claim and its experiment.

    Args:
        name: of --only and of the files.
        title: a heading of a few words.
        sentence: what texts say.
        source: who says it, as a link in Markdown.
        experiment: one line on what is run and measured.
        cases: quick -> [(settings, seconds)]: about what a run takes on one core.
        measure: (seed, **settings) -> {metric: number, or {step: number}}.
        judge: Data -> Verdict.
        draw: (plt, Data) -> figure.
        caption: the text in place of the figure for those who do not see it: Data -> sentence.
        published: numbers of others.
        undisturbed: whether the runs want the machine for themselves, since they measure time.
    """

    name: str
    title: str
    sentence: str
    source: str
    experiment: str
    cases: Callable
    measure: Callable
    judge: Callable
    draw: Callable
    caption: Callable
    published: tuple = ()
    undisturbed: bool = False

    @property
    def modules(self):
        """The modules of the examples by which it measures: its own, and what they import beside DRAWING."""
        found, open_ = {}, [inspect.getmodule(self.measure)]
        while open_:
            module = open_.pop()
            if module.__name__ not in {*found, *DRAWING} and EXAMPLES in Path(inspect.getfile(module)).parents:
                found[module.__name__] = module
                used = map(inspect.getmodule, vars(module).values())
                open_ += [other for other in used if hasattr(other, "__file__")]
        return found

    @property
    def version(self):
        """A checksum of what measures: records of another one are no records of this claim."""
        sources = (source for _, source in sorted((name, inspect.getsource(m)) for name, m in self.modules.items()))
        return f"{zlib.crc32(''.join(sources).encode()):08x}"


class Data:
    """The numbers of a claim, as its CSV holds them: settings, seed, metric, step (of a curve) and value."""

    def __init__(self, rows):
        self.rows = rows

    @functools.cached_property
    def by_metric(self):
        """The rows of each metric: most of what is asked for is of one, among thousands."""
        found = {}
        for row in self.rows:
            found.setdefault(row.get("metric"), []).append(row)
        return found

    @classmethod
    def of_records(cls, records):
        """Return the numbers of [(settings, seed, {metric: number or {step: number}})]."""
        rows = []
        for settings, seed, metrics in records:
            for metric, found in metrics.items():
                points = found if isinstance(found, dict) else {"": found}
                rows += [
                    settings | {"seed": seed, "metric": metric, "step": step, "value": value}
                    for step, value in points.items()
                ]
        return cls(rows)

    @classmethod
    def of_csv(cls, text):
        return cls(
            [{name: _parsed(word) for name, word in row.items() if word or name == "step"} for row in _reader(text)]
        )

    def csv(self):
        """Return the numbers as CSV, one a line, with 6 significant digits."""
        settings = dict.fromkeys(name for row in self.rows for name in row if name not in COLUMNS)
        text = io.StringIO()
        writer = csv.DictWriter(text, [*settings, *COLUMNS], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _written(value) for name, value in row.items()} for row in self.rows)
        return text.getvalue()

    def where(self, **settings):
        """Return the numbers with these settings alone, which may name `metric` and `seed`."""
        rows = self.by_metric.get(settings["metric"], []) if "metric" in settings else self.rows
        return Data([row for row in rows if settings.items() <= row.items()])

    def all(self, name):
        """Return the values of a setting, each once, in the order of the cases."""
        return list(dict.fromkeys(row[name] for row in self.rows if name in row))

    @property
    def seeds(self):
        return self.all("seed")

    def value(self, metric, resolution=0.0, **settings):
        """Return a number with these settings over the seeds.

        Raises:
            KeyError: the settings name no case, or several.
        """
        found = self.where(metric=metric, **settings)
        if not found.rows or len(found.rows) != len(found.seeds):
            raise KeyError(f"expected {metric} of one case, got {len(found.rows)} numbers with {settings}")
        return Value(tuple(row["value"] for row in found.rows), resolution)

    def curve(self, metric, **settings):
        """Return the steps of a curve and its values there over the seeds."""
        found = self.where(metric=metric, **settings)
        steps = sorted(found.all("step"))
        return steps, [found.value(metric, step=step) for step in steps]


def _reader(text):
    return csv.DictReader(io.StringIO(text))


def _written(value):
    return f"{value:.6g}" if isinstance(value, float) else value


def _parsed(word):
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def anchor(title):
    """Return the anchor of a heading, as GitHub and Sphinx make it."""
    return title.lower().replace(",", "").replace(" ", "-")
