"""The tests of other packages: what they ran goes into a table of the documentation."""

import os
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "RAY_USAGE_STATS_ENABLED": "0", "NO_COLOR": "1"}

HEAD = "| package | version | what was run | verdict |\n|---|---|---|---|\n"


def pytest_addoption(parser):
    """Say where the table goes."""
    parser.addoption("--table", type=Path, help="write a Markdown table of what was run to this file")


@pytest.fixture
def ran(record_property):
    """Return a function that says what a test runs: a package, what of it, and later how many norms were fused."""
    return lambda package, what, fused=(0, 0): record_property("ran", (package, what, fused))


class Row:
    """What became of the tests of a row."""

    def __init__(self):
        self.passed, self.failed, self.norms, self.fused = 0, [], 0, 0

    def __str__(self):
        words = [f"{self.passed} of {self.passed + len(self.failed)} passed"]
        words += [f"failed: {', '.join(self.failed)}"] if self.failed else []
        words += [f"{self.fused:,} of {self.norms:,} norms fused"] if self.norms else []
        return "; ".join(words)


class Table:
    """The rows of the table, by package and what was run."""

    def __init__(self, path):
        self.path, self.rows = path, defaultdict(Row)

    def pytest_deselected(self, items):
        """Refuse a part of the tests, whose table would lack the rows of the others."""
        raise pytest.UsageError(f"expected all tests for --table, got a selection without {len(items)} of them")

    def pytest_runtest_logreport(self, report):
        """Count a test."""
        for package, what, (norms, fused) in (value for name, value in report.user_properties if name == "ran"):
            if report.when == "call":
                row = self.rows[package, what]
                row.norms += norms
                row.fused += fused
                if report.passed:
                    row.passed += 1
                else:
                    row.failed.append(report.nodeid.split("::")[-1].partition("[")[-1].rstrip("]"))

    def pytest_sessionfinish(self):
        """Write the table."""
        order = sorted(self.rows, key=lambda key: (key[0].lower(), key[1]))
        lines = [
            f"| {package.replace('_', '-')} | {version(package)} | {what} | {self.rows[package, what]} |"
            for package, what in order
        ]
        self.path.write_text(HEAD + "\n".join(lines) + "\n")


def pytest_configure(config):
    """Keep the rows where the table is asked for, and leave it to other packages what they warn of."""
    config.addinivalue_line("filterwarnings", "ignore")
    if config.getoption("--table"):
        config.pluginmanager.register(Table(config.getoption("--table")))
