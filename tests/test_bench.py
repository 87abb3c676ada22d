"""`python -m syncnorm bench`: how candidates are timed, and each benchmark really run. Nothing asserts a speed."""

import json
import re

import pytest
import torch
from launchers import launch

import syncnorm
from syncnorm.bench import comm, timing
from syncnorm.bench.timing import Effort, Timing
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import run_ranks

BENCH = """
import runpy, sys
sys.argv = ["syncnorm", "bench", *sys.argv[1:]]
runpy.run_module("syncnorm", run_name="__main__")
"""


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


def time_candidates(clock, effort, group=None, **costs):
    candidates = {name: clock.candidate(name, cost) for name, cost in costs.items()}
    return timing.interleave(candidates, group or LocalCommunicator(), effort, clock)


def test_a_timing_is_the_median_and_the_quartiles():
    assert Timing.of([9.0, 1.0, 3.0, 2.0, 100.0]) == Timing(median=3.0, low=2.0, high=9.0)


def test_candidates_take_what_they_take():
    timings = time_candidates(Stopwatch(), Effort(rounds=5, block=0.0), quick=0.25, slow=3.0)
    assert timings == {"quick": Timing(0.25, 0.25, 0.25), "slow": Timing(3.0, 3.0, 3.0)}


def test_a_sample_is_as_many_calls_as_fill_a_block():
    clock = Stopwatch()
    timings = time_candidates(clock, Effort(rounds=2, block=8.0), quick=0.5)
    assert timings["quick"].median == 0.5
    assert len(clock.calls) == 1 + (1 + 2 + 4 + 8 + 16) + 2 * (16 + 16)  # warm up, double, measure
    clock = Stopwatch()
    time_candidates(clock, Effort(rounds=2, block=8.0), slow=16.0)
    assert len(clock.calls) == 1 + 1 + 2 * (1 + 1)


def test_the_spread_is_that_of_the_rounds():
    costs = iter([1.0, 1.0, *(cost for sample in (5.0, 1.0, 2.0, 4.0, 3.0) for cost in (0.0, sample))])
    timings = time_candidates(Stopwatch(), Effort(rounds=5, block=0.0), only=lambda _: next(costs))
    assert timings["only"] == Timing(median=3.0, low=2.0, high=4.0)


def test_every_round_times_every_candidate_in_an_order_of_its_own():
    clock = Stopwatch()
    time_candidates(clock, Effort(rounds=20, block=0.0), a=1.0, b=1.0, c=1.0)
    timed = clock.calls[-2 * 3 * 20 :: 2]
    rounds = ["".join(timed[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}


def slower_on_each_rank():
    clock, group = Stopwatch(), syncnorm.communicator()
    timings = time_candidates(clock, Effort(rounds=3, block=4.0), group, a=1.0 + group.rank, b=0.5)
    return timings, clock.calls


def test_the_slowest_rank_counts_and_all_call_in_lockstep():
    results = run_ranks(slower_on_each_rank, 2)
    assert results[0] == results[1]
    assert results[0][0] == {"a": Timing(2.0, 2.0, 2.0), "b": Timing(0.5, 0.5, 0.5)}


@pytest.mark.parametrize(
    ("path", "micros", "met", "cell"),
    [
        (comm.COMMUNICATOR, 13.0, True, "met"),
        (comm.COMMUNICATOR, 13.1, False, "MISSED"),
        (comm.MPI4PY, 34.9, True, "met"),
        (comm.MPI4PY, 35.1, False, "MISSED"),
        (comm.GLOO, 1000.0, None, ""),
    ],
)
def test_a_row_holds_its_target(path, micros, met, cell):
    def timing_of(median):
        return Timing(median * 1e-6, median * 1e-6, median * 1e-6)

    row = comm.Row(comm.MESSAGES[0], path, timing_of(micros), timing_of(10.0))
    assert row.numbers()["met"] is met
    assert row.cells()[-1] == cell
    row = row._replace(raw=row.raw._replace(high=1.6e-5))
    assert row.numbers()["met"] is met
    assert row.numbers()["noisy"] is True
    assert row.cells()[-1] == (f"{cell}, noisy" if cell else "")


def test_a_path_that_does_not_sum_is_not_timed():
    with pytest.raises(RuntimeError, match=r"expected nothing to sum ones over 2 ranks, got tensor\(\[1., 1.\]\)"):
        comm.check("nothing", lambda: None, torch.zeros(2), 2)


@pytest.fixture
def bench(tmp_path):
    """Return what runs a benchmark under a launcher."""
    script = tmp_path / "bench.py"
    script.write_text(BENCH)
    return lambda launcher, ranks, *arguments: launch(launcher, ranks, script, *arguments)


RAW_OF = {"mpirun": "raw mpi4py", "torchrun": comm.GLOO}
PATHS_OF = {
    "mpirun": ["raw mpi4py", comm.COMMUNICATOR, comm.MPI4PY, comm.GLOO],
    "torchrun": [comm.GLOO, comm.COMMUNICATOR],
}


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_comm(bench, tmp_path, launcher):
    out = tmp_path / "comm.json"
    job = bench(launcher, 2, "comm", "--quick", "--json", out)
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    assert job.stdout.count("all-reduce on 2 ranks") == 1
    record = json.loads(out.read_text())
    assert record["header"].keys() >= {"date", "machine", "torch", "mpi4py", "mpi", "hosts"}
    for name, value in record["header"].items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(value)}$", job.stdout, re.MULTILINE)
    rows = record["rows"]
    assert [(r["message"], r["path"]) for r in rows] == [(m.name, p) for m in comm.MESSAGES for p in PATHS_OF[launcher]]
    raw = {r["message"]: r["median_us"] for r in rows if r["path"] == RAW_OF[launcher]}
    for row in rows:
        low, high = row["quartiles_us"]
        assert 0 < low <= row["median_us"] <= high
        assert row["ratio"] == pytest.approx(row["median_us"] / raw[row["message"]])
        assert row["extra_us"] == pytest.approx(row["median_us"] - raw[row["message"]])
        if row["target"] is None:
            assert row["met"] is None
        else:
            assert row["met"] is (row[row["target"]["quantity"]] <= row["target"]["limit"])
    assert [r["elements"] for r in rows if r["path"] == comm.COMMUNICATOR] == [129, 513, 2049, 4097, 6553600]


def test_targets_of_comm():
    ratio, extra = comm.Target("ratio", 1.3), comm.Target("extra_us", 25)
    assert [m.targets for m in comm.MESSAGES[:-1]] == [{comm.COMMUNICATOR: ratio, comm.MPI4PY: extra}] * 4
    assert comm.MESSAGES[-1].targets == {comm.MPI4PY: comm.Target("ratio", 1.2)}
    assert (str(ratio), str(extra)) == ("<= 1.3 x raw", "<= raw + 25 µs")


def test_comm_alone_says_how_to_launch(bench):
    job = bench("alone", 1, "comm")
    assert job.returncode == 1
    assert "RuntimeError: expected a group of several ranks, got this process alone: mpirun -n 2" in job.stderr


def test_rich_is_asked_for(tmp_path):
    script = tmp_path / "no_rich.py"
    script.write_text("import sys\nsys.modules['rich'] = None\n" + "import syncnorm.bench.comm")
    job = launch("alone", 1, script)
    assert job.returncode == 1
    assert "RuntimeError: python -m syncnorm bench draws its tables with rich" in job.stderr
    assert "pip install 'syncnorm[bench]'" in job.stderr
