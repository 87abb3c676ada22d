"""What the tests of benchmarks share: benchmarks under real launchers, what they wrote, and a clock that tests move."""

import json
import re

from launchers import launch

JOBS = [("alone", 1), ("torchrun", 2), ("mpirun", 2)]


def bench(launcher, ranks, *arguments):
    """Run `python -m syncnorm bench` under a launcher."""
    return launch(launcher, ranks, "-m", "syncnorm", "bench", *arguments)


def read(path, stdout):
    """Return what a benchmark wrote as JSON, after comparing the header with what it printed."""
    record = json.loads(path.read_text())
    for name, value in record["header"].items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(value)}$", stdout, re.MULTILINE), name
    return record


class Stopwatch:
    """A clock that stands still but for the candidates, which cost what they are made with."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def candidate(self, name, cost):
        def run():
            self.calls.append(name)
            self.now += cost(len(self.calls)) if callable(cost) else cost

        return run
