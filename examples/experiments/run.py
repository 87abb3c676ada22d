"""A run of an experiment: one case with one seed, in a process of its own or on ranks, and its record."""

import functools
import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch

import syncnorm


class Run(NamedTuple):
    """One case of a claim with one seed; `seconds` is about what it takes on one core."""

    claim: str
    settings: tuple  # ((name, value), ...)
    seed: int
    seconds: float

    @property
    def ranks(self):
        """The number of ranks that it runs on."""
        return dict(self.settings).get("ranks", 1)

    @property
    def title(self):
        return f"{self.claim}: {', '.join(f'{name} {value}' for name, value in self.settings)}, seed {self.seed}"

    @property
    def path(self):
        words = [f"{name}={value}" for name, value in self.settings]
        return Path("records", self.claim, re.sub(r"[^\w.=+-]", "_", "-".join([*words, f"seed={self.seed}"])) + ".json")


def measured(runs):
    """Measure runs of one claim one after the other; return the metrics and seconds of each."""
    from experiments import CLAIMS

    torch.set_num_threads(1)
    results = []
    for run in runs:
        begin = time.perf_counter()
        metrics = CLAIMS[run.claim].measure(run.seed, **dict(run.settings))
        results.append((metrics, time.perf_counter() - begin))
    return results


@functools.cache
def version(claim):
    """Return what measures the claim: records of another version are no records of it."""
    return f"syncnorm {syncnorm.__version__}, experiment {claim.version}"


def read(directory, claim, run):
    """Return the record of a run, None if there is none; one of another version is returned as its version."""
    try:
        record = json.loads((directory / run.path).read_bytes())
    except (OSError, ValueError):
        return None
    if not (isinstance(record, dict) and isinstance(record.get("metrics"), dict)):
        return None
    return record if record.get("version") == version(claim) else str(record.get("version"))


def record_of(claim, run, metrics, seconds):
    """Return a record as bytes."""
    record = {"version": version(claim), "settings": dict(run.settings), "seed": run.seed, "seconds": seconds}
    return json.dumps(record | {"metrics": metrics}, indent=1).encode()
