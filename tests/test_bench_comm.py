"""bench/comm.py: all-reduces really run under launchers, and targets that follow the times. Nothing asserts a speed."""

import pytest
import torch
from benchmarks import bench, read
from launchers import launch

from syncnorm.bench import comm
from syncnorm.bench.timing import Timing

C64, BUCKET = comm.MESSAGES[0], comm.MESSAGES[-1]
RAW = "raw"


def timing_of(micros):
    return Timing(micros * 1e-6, micros * 1e-6, micros * 1e-6)


def row_of(message, path, micros, **others):
    """Return a row beside a raw call of 10 µs and other paths."""
    timings = {RAW: 10.0, **{getattr(comm, name.upper()): other for name, other in others.items()}, path: micros}
    return comm.Row(message, path, {name: timing_of(time) for name, time in timings.items()})


@pytest.mark.parametrize(
    ("message", "path", "micros", "met", "cell"),
    [
        (C64, comm.COMMUNICATOR, 13.0, True, "met"),
        (C64, comm.COMMUNICATOR, 13.1, False, "MISSED"),
        (C64, comm.MPI4PY, 34.9, True, "met"),
        (C64, comm.MPI4PY, 35.1, False, "MISSED"),
        (C64, comm.GLOO, 1000.0, None, ""),
        (BUCKET, comm.MPI4PY, 11.9, True, "met"),
        (BUCKET, comm.MPI4PY, 12.1, False, "MISSED"),
        (BUCKET, comm.COMMUNICATOR, 1000.0, None, ""),
    ],
)
def test_a_row_is_judged_by_the_time_of_the_raw_call(message, path, micros, met, cell):
    row = row_of(message, path, micros)
    assert row.numbers()["met"] is met
    assert row.cells()[-1] == cell
    row = row._replace(timings=row.timings | {RAW: row.timings[RAW]._replace(high=1.6e-5)})
    assert row.numbers()["met"] is met
    assert row.numbers()["noisy"] is True
    assert row.cells()[-1] == (f"{cell}, noisy" if cell else "")


@pytest.mark.parametrize(("micros", "met"), [(25.9, True), (26.1, False)])
def test_shared_memory_is_judged_by_the_time_of_the_mpi_communicator(micros, met):
    row = row_of(C64, comm.SHARED, micros, communicator=20.0)
    numbers = row.numbers()
    assert numbers["ratio"] == pytest.approx(micros / 10)  # over the raw call, as in every row
    assert numbers["target"] == {
        "quantity": "ratio",
        "limit": 1.3,
        "path": comm.COMMUNICATOR,
        "value": pytest.approx(micros / 20),
    }
    assert numbers["met"] is met
    assert row.cells()[-2:] == ["<= 1.3 x Communicator", "met" if met else "MISSED"]
    disturbed = row.timings[comm.COMMUNICATOR]._replace(high=1.0)
    assert row._replace(timings=row.timings | {comm.COMMUNICATOR: disturbed}).noisy
    assert not row.noisy


@pytest.mark.parametrize("message", comm.MESSAGES, ids=lambda message: message.name)
def test_every_message_has_a_target_that_a_slow_path_misses(message):
    for path, target in message.targets.items():
        slow, quick = (row_of(message, path, micros, communicator=10.0) for micros in (1000.0, 10.0))
        assert (slow.numbers()["met"], quick.numbers()["met"]) == (False, True)
        assert slow.cells()[-2] == str(target)
    assert message.targets


def test_a_path_that_does_not_sum_is_not_timed():
    with pytest.raises(RuntimeError, match=r"expected nothing to sum ones over 2 ranks, got tensor\(\[1., 1.\]\)"):
        comm.check("nothing", lambda: None, torch.zeros(2), 2)


PATHS_OF = {  # the raw one first
    "mpirun": [comm.RAW_MPI, comm.COMMUNICATOR, comm.MPI4PY, comm.SHARED, comm.GLOO],
    "torchrun": [comm.GLOO, comm.COMMUNICATOR],
}
ROUTES = {
    "mpirun": {"sums of cpu tensors": "by MPI", "sums on a gloo group": "in shared memory"},
    "torchrun": {"sums of cpu tensors": "in shared memory"},
}


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_comm(tmp_path, launcher):
    out = tmp_path / "comm.json"
    job = bench(launcher, 2, "comm", "--quick", "--json", out)
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    assert job.stdout.count("all-reduce on 2 ranks") == 1
    record = read(out, job.stdout)
    assert record["header"].keys() >= {"date", "machine", "torch", "mpi4py", "mpi", "hosts"}
    assert {name: route for name, route in record["header"].items() if "sums" in name} == ROUTES[launcher]
    rows, paths = record["rows"], PATHS_OF[launcher]
    assert [(row["message"], row["path"]) for row in rows] == [
        (message.name, path)
        for message in comm.MESSAGES
        for path in paths
        if path != comm.SHARED or path in message.targets
    ]
    medians = {(row["message"], row["path"]): row["median_us"] for row in rows}
    for row in rows:
        low, high = row["quartiles_us"]
        assert 0 < low <= row["median_us"] <= high
        raw = medians[row["message"], paths[0]]
        assert row["ratio"] == pytest.approx(row["median_us"] / raw)
        assert row["extra_us"] == pytest.approx(row["median_us"] - raw)
        target = row["target"]
        if target is None:
            assert row["met"] is None
            continue
        other = medians[row["message"], target["path"]]
        over = {"ratio": row["median_us"] / other, "extra_us": row["median_us"] - other}
        assert target["path"] == (comm.COMMUNICATOR if row["path"] == comm.SHARED else paths[0])
        assert target["value"] == pytest.approx(over[target["quantity"]])
        assert row["met"] is (target["value"] <= target["limit"])
    assert [r["elements"] for r in rows if r["path"] == comm.COMMUNICATOR] == [131, 515, 2051, 4099, 6553600]


def test_shared_memory_that_is_switched_off_is_not_timed(tmp_path):
    out = tmp_path / "comm.json"
    job = launch("mpirun", 2, "-m", "syncnorm", "bench", "comm", "--quick", "--json", out, SYNCNORM_SHARED_MEMORY="0")
    assert job.returncode == 0, job.stderr
    record = read(out, job.stdout)
    assert record["header"]["sums on a gloo group"] == "over gloo (SYNCNORM_SHARED_MEMORY=0)"
    assert comm.SHARED not in {row["path"] for row in record["rows"]}


def test_comm_alone_says_how_to_launch():
    job = bench("alone", 1, "comm")
    assert job.returncode == 1
    assert "RuntimeError: expected a group of several ranks, got this process alone: mpirun -n 2" in job.stderr
