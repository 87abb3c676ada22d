"""The record of `launch/gpu` as Markdown."""

KINDS = ("passed", "failed", "skipped")
WIDTH = 60  # of the cells of a table that is cut short


def summary(record, most=None):
    """Return the outcome, the steps, the tests and the headlines of the benchmarks.

    Args:
        record: of the run.
        most: how many failures, and how many of the worst errors, to list; all unless given.
    """
    rehearsal = "# Rehearsal on the CPU, in Triton's interpreter"
    title = rehearsal if record["rehearsal"] else f"# Run on {record['machine'].get('card', 'a GPU')}"
    parts = [title, outcome(record), "## Steps", _steps(record["steps"])]
    if any("tests" in step for step in record["steps"]):
        parts += ["## Tests", *_tests(record["tests"], most)]
    if record["headlines"]:
        parts += ["## Benchmarks", _headlines(record["headlines"])]
    return "\n\n".join(parts) + "\n"


def whole(record):
    """Return the summary, where it ran, the tables of the benchmarks and the commands."""
    parts = [summary(record), "## Machine\n", _table(("what", "value"), record["machine"].items())]
    for step in record["steps"]:
        if "tables" in step:
            parts += [f"\n## {step['name'].capitalize()}\n", step["tables"].strip()]
    commands = [step["command"] for step in record["steps"]]
    return "\n".join([*parts, "\n## Commands\n", "```sh", *commands, "```"]) + "\n"


def outcome(record):
    """Return a sentence: whether all went well."""
    names = {"failed": "failed", "over its limit": "over their limits", "skipped": "skipped"}
    by_verdict = {verdict: [s["name"] for s in record["steps"] if s["verdict"] == verdict] for verdict in names}
    said = "; ".join(f"{names[verdict]}: {', '.join(steps)}" for verdict, steps in by_verdict.items() if steps)
    status = "Failed" if record["status"] else "Passed"
    if not record["finished"]:
        status = "Unfinished"
    return f"**{status}**{' (' + said + ')' if said else ''}, {record['seconds']:.0f} s."


def result(step):
    """Return in a few words what a step found."""
    if "tests" in step:
        counts = ", ".join(f"{step['tests'][kind]} {kind}" for kind in KINDS if step["tests"][kind])
        return "; ".join(filter(None, [counts, step["reason"]]))
    left = step.get("benchmark", {}).get("header", {}).get("no time for", "")
    return "; ".join(filter(None, [step["reason"], left and f"no time for {left}"]))


def _steps(steps):
    rows = [(s["name"], s["verdict"], f"{s['seconds']:.0f}", f"{s['limit']:.0f}", result(s)) for s in steps]
    return _table(("step", "verdict", "seconds", "limit", "result"), rows)


def _tests(tests, most):
    """Yield the parts of the section on tests. The errors that are nearest to their bounds come first."""
    yield ", ".join(f"{tests[kind]} {kind}" for kind in KINDS) + "."
    if tests["failures"]:
        rows = [(f["test"], f["message"]) for f in tests["failures"]]
        yield _part(("failed", "message"), rows, most)
    if tests["skips"]:
        yield _table(("skipped", "reason"), [(str(count), reason) for reason, count in sorted(tests["skips"].items())])
    if tests["errors"]:
        errors = sorted(tests["errors"].items(), key=lambda item: -(item[1]["share"] or 0))
        rows = [(what, f"{e['error']:.2g}", _number(e["bound"], ".2g"), e["test"]) for what, e in errors]
        yield _part(("worst error of", "error", "bound", "test"), rows, most)


def _part(columns, rows, most):
    """Return a table of the first rows, with a line on those that are left out."""
    if most is None or len(rows) <= most:
        return _table(columns, rows)
    short = [tuple(cell if len(cell) <= WIDTH else cell[: WIDTH - 3] + "..." for cell in row) for row in rows[:most]]
    return f"{_table(columns, short)}\n\n{len(rows) - most} more are in the record."


def _headlines(headlines):
    rows = [
        (
            h["benchmark"],
            h["what"],
            f"{h['value']:.2f}",
            _number(h["limit"], ".2f"),
            str(h["cases"]) if h["met"] is None else f"{h['met']} of {h['cases']}",
        )
        for h in headlines
    ]
    return _table(("benchmark", "ratio", "value", "at most", "met by, of cases"), rows)


def _number(value, form):
    return "" if value is None else format(value, form)


def _table(columns, rows):
    """Return a table whose columns are also straight on a terminal."""
    cells = [columns, *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
