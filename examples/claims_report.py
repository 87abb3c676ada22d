"""The report of examples/claims.py: what each claim's numbers say, their figures, and the norms compared by them."""

import os
from datetime import datetime, timezone

import comparison
import torch
from common import write
from experiments import CLAIMS
from experiments.claim import Data, anchor
from figures import draw
from spread import CLEAR, chance
from words import plural

import syncnorm
from syncnorm.info import processor
from syncnorm.report import Table

INTRODUCTION = """\
Values are mean ± standard deviation over {seeds} seeds. The standard deviation of a test error is at least one test
image. Two values differ *clearly* if their means are further apart than {clear} √((s₁² + s₂²) / 2), where s₁ and s₂ are
their standard deviations. Two equal values do so by chance in {chance:.0f} % of cases. Every verdict is computed from
the numbers in the CSV file beside its figure.

The models and data are small, so the verdicts say what holds *here*. *Digits* are 1797 images of 8 x 8 pixels, which
come with scikit-learn: 1500 for training and 297 for testing, if nothing else is said. The *text* is Python's
documentation. Digits are learned by stochastic gradient descent with momentum, text by Adam."""


def write_data(directory, records):
    """Write the numbers of {name of a claim: [(run, record)]} as CSV; return them as {name: Data}."""
    data = {}
    for name, found in records.items():
        text = Data.of_records([(dict(run.settings), run.seed, record["metrics"]) for run, record in found]).csv()
        write(directory / f"{name}.csv", text.encode())
        data[name] = Data.of_csv(text)
    return data


def write_report(directory, data, header):
    """Write the report and its figures; return the verdicts by claim.

    Args:
        directory: of the files.
        data: {name of a claim: Data}.
        header: a paragraph that says when, where and how they were measured.
    """
    verdicts = judge(data)
    for name, of_claim in data.items():
        draw(directory / name, CLAIMS[name].draw, of_claim)
    draw(directory / "moments", comparison.draw_moments)
    write(directory / "report.md", report(data, verdicts, header).encode())
    return verdicts


def judge(data):
    """Return the verdict of each claim."""
    return {name: CLAIMS[name].judge(of_claim) for name, of_claim in data.items()}


def read_report(directory):
    """Return the Data of the claims in a report, from the CSV files beside it, and its header."""
    text = (directory / "report.md").read_text()
    names = [name for name in CLAIMS if f"({name}.csv)" in text]
    data = {name: Data.of_csv((directory / f"{name}.csv").read_text()) for name in names}
    return data, text.split("\n\n")[1]


def header(quick, seeds):
    """Return when, where and how the records were measured."""
    shortened = ", with `--quick`" if quick else ""
    return (
        f"Measured on {datetime.now(timezone.utc):%Y-%m-%d} by `python examples/claims.py`{shortened}: "
        f"{plural(seeds, 'seed')}, {plural(len(os.sched_getaffinity(0)), 'core')} of {processor()}, syncnorm "
        f"{syncnorm.__version__}, PyTorch {torch.__version__}."
    )


def report(data, verdicts, header):
    """Return the report in Markdown."""
    seeds = max(len(of_claim.seeds) for of_claim in data.values())
    introduction = INTRODUCTION.format(seeds=seeds, clear=CLEAR, chance=100 * chance(seeds) if seeds > 1 else 0)
    parts = ["# Claims about norms, measured", header, introduction, summary(verdicts).markdown()]
    if data.keys() >= {*comparison.NEEDED}:
        parts += [f"## {comparison.TITLE}", figure("moments", comparison.TITLE, comparison.CAPTION)]
        parts.append(comparison.table(data).markdown())
    parts += [section(CLAIMS[name], of_claim, verdicts[name]) for name, of_claim in data.items()]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def summary(verdicts):
    """Return the table of all claims and verdicts."""
    rows = [
        [f"[{CLAIMS[name].sentence}](#{anchor(CLAIMS[name].title)})", verdict.held]
        for name, verdict in verdicts.items()
    ]
    return Table("", ["claim", "verdict"], [rows])


def figure(name, title, caption):
    """Return a figure with its caption below."""
    return f"![{title}]({name}.png)\n\n*{caption}*"


def section(claim, data, verdict):
    """Return a claim, its figure and its verdict in Markdown."""
    parts = [
        f"## {claim.title}",
        f"> {claim.sentence} ({claim.source})",
        f"{claim.experiment} {plural(len(data.seeds), 'seed')}; data: [{claim.name}.csv]({claim.name}.csv).",
        figure(claim.name, claim.title, claim.caption(data)),
        f"**It {verdict.held}.** {verdict.finding}",
    ]
    if verdict.table:
        parts.append(verdict.table.markdown().rstrip())
    if claim.published:
        rows = [[p.what, p.published, p.ours(data), p.differs] for p in claim.published]
        parts.append(Table("", ["", "published", "here", "what differs"], [rows], names=4).markdown().rstrip())
    return "\n\n".join(parts)
