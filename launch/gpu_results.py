"""What the steps of `launch/gpu` found: JUnit's XML of the tests, and the JSON of the benchmarks, brought together."""

import json
import math
import statistics
from collections import Counter, defaultdict
from xml.etree import ElementTree

ERROR, BOUND = "error: ", "bound: "  # beginnings of the names of the properties that tests record


def tests(path):
    """Return what JUnit's XML tells about the tests of a step: counts, failures, skips by reason, errors by name."""
    root = ElementTree.parse(path)
    failures, skips, errors = [], Counter(), {}
    for case in root.iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        broken = [child for child in case if child.tag in ("failure", "error")]
        if broken:
            message = broken[0].get("message") or broken[0].text or ""
            failures.append({"test": name, "message": message.strip().split("\n")[0][:300]})
        skips.update(skip.get("message") or "no reason given" for skip in case.iter("skipped"))
        _worst(errors, list(_errors(case, name)))
    counts = Counter()
    for suite in root.iter("testsuite"):
        counts.update({kind: int(suite.get(kind, 0)) for kind in ("tests", "failures", "errors", "skipped")})
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],  # not the cases: one of them may have been interrupted
        "failed": failed,
        "skipped": counts["skipped"],
        "failures": failures,
        "skips": dict(skips),
        "errors": errors,
    }


def sum_of_tests(parts):
    """Return the tests of several steps as those of one."""
    total = {kind: sum(part[kind] for part in parts) for kind in ("passed", "failed", "skipped")}
    total["failures"] = [failure for part in parts for failure in part["failures"]]
    total["skips"] = dict(sum((Counter(part["skips"]) for part in parts), Counter()))
    total["errors"] = {}
    for part in parts:
        _worst(total["errors"], list(part["errors"].items()))
    return total


def _errors(case, test):
    """Yield name and {error, bound, share, test} of each error that a test recorded; `share` is that of the bound."""
    properties = {item.get("name"): item.get("value") for item in case.iter("property")}
    for name, value in properties.items():
        if name.startswith(ERROR):
            what = name.removeprefix(ERROR)
            error, bound = float(value), properties.get(BOUND + what)
            bound = None if bound is None else float(bound)
            yield what, {"error": error, "bound": bound, "share": error / bound if bound else None, "test": test}


def _worst(errors, found):
    """Keep of each name the error that is nearest to its bound, or the largest where there is no bound."""
    for what, entry in found:
        if what not in errors or _badness(entry) > _badness(errors[what]):
            errors[what] = entry


def _badness(entry):
    """Return a number that is greater for a worse error."""
    if math.isnan(entry["error"]):
        return math.inf
    return entry["error"] if entry["share"] is None else entry["share"]


def headlines(benchmark, numbers):
    """Yield the ratios to look at first in the JSON of a benchmark: {benchmark, what, value, limit, cases, met}.

    Of targets that is the value which is furthest from its limit, else the median over the cases.
    """
    by_target = defaultdict(list)
    for target in numbers.get("targets", []):
        by_target[target["target"]].append(target)
    for what, cases in by_target.items():
        worst = max(cases, key=lambda case: case["value"] / case["limit"])
        met = sum(case["met"] for case in cases)
        yield _headline(benchmark, what, worst["value"], worst["limit"], len(cases), met)
    if by_target:
        return
    by_name = defaultdict(list)
    for what, ratio in _ratios(numbers.get("rows", [])):
        by_name[what].append(ratio)
    for what, ratios in by_name.items():
        yield _headline(benchmark, what, statistics.median(ratios), None, len(ratios), None)


def _ratios(rows):
    """Yield what is compared with a baseline and the ratio to it, of rows of `bench kernels` and `bench train`."""
    memory = {row["images_per_rank"]: row["peak_memory_mb"] for row in rows if row.get("norm") == "BN"}
    for row in rows:
        if row.get("implementation") not in (None, "copy baseline", "reference"):
            yield f"{row['implementation']}, {row['kernel']} / copy", row["ratio"]
        if row.get("norm") not in (None, "BN"):
            what = f"{row['norm']} / BN, {row['images_per_rank']} images"
            yield f"{what}: time", row["ratio"]
            if row["peak_memory_mb"] and memory.get(row["images_per_rank"]):
                yield f"{what}: memory", row["peak_memory_mb"] / memory[row["images_per_rank"]]


def _headline(benchmark, what, value, limit, cases, met):
    return {"benchmark": benchmark, "what": what, "value": value, "limit": limit, "cases": cases, "met": met}


def of_step(name, results):
    """Return what a step wrote to the files `results`.*: its tests, or its benchmark, headlines and tables.

    Raises an error of any kind if a file is not what it should be. A step that was killed may leave such a file.
    """
    found = {}
    xml, numbers, tables = (results.with_suffix(suffix) for suffix in (".xml", ".json", ".md"))
    if xml.exists():
        found["tests"] = tests(xml)
    if numbers.exists():
        found["benchmark"] = json.loads(numbers.read_text())
        found["headlines"] = list(headlines(name, found["benchmark"]))
    if tables.exists():
        found["tables"] = tables.read_text()
    return found
