"""bench/comm.py: all-reduces really run under launchers, and targets that follow the times. Nothing asserts a speed."""

import pytest
import torch
from benchmarks import bench, read

from syncnorm.bench import comm
from syncnorm.bench.timing import Timing
from syncnorm.communicators.segment import MOST_BYTES

C64, BUCKET = comm.MESSAGES[0], comm.MESSAGES[-1]


def timing_of(micros):
    return Timing(micros * 1e-6, micros * 1e-6, micros * 1e-6)


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
        (C64, comm.SHARED, 1000.0, None, ""),  # there is no communicator of MPI to compare with
    ],
)
def test_a_row_is_judged_by_the_time_of_the_raw_call(message, path, micros, met, cell):
    row = comm.Row(message, path, timing_of(micros), timing_of(10.0))
    assert row.numbers()["met"] is met
    assert row.cells()[-1] == cell
    row = row._replace(raw=row.raw._replace(high=1.6e-5))
    assert row.numbers()["met"] is met
    assert row.numbers()["noisy"] is True
    assert row.cells()[-1] == (f"{cell}, noisy" if cell else "")


def test_shared_memory_is_judged_by_the_communicator_of_mpi():
    for micros, met, cell in [(6.5, True, "met"), (6.6, False, "MISSED")]:
        row = comm.Row(C64, comm.SHARED, timing_of(micros), timing_of(1.0), timing_of(5.0))
        assert row.numbers()["met"] is met
        assert row.cells()[-2:] == ["<= 1.3 x Communicator", cell]


@pytest.mark.parametrize("message", comm.MESSAGES, ids=lambda message: message.name)
def test_every_message_has_a_target_that_a_slow_path_misses(message):
    for path, target in message.targets.items():
        raw = timing_of(10.0)
        slow, quick = (comm.Row(message, path, timing_of(micros), raw, raw) for micros in (1000.0, 10.0))
        assert (slow.numbers()["met"], quick.numbers()["met"]) == (False, True)
        assert slow.cells()[-2] == str(target)
    assert message.targets


def test_a_path_that_does_not_sum_is_not_timed():
    with pytest.raises(RuntimeError, match=r"expected nothing to sum ones over 2 ranks, got tensor\(\[1., 1.\]\)"):
        comm.check("nothing", lambda: None, torch.zeros(2), 2)


RAW_OF = {"mpirun": "raw mpi4py", "torchrun": comm.GLOO}
PATHS_OF = {
    "mpirun": ["raw mpi4py", comm.COMMUNICATOR, comm.MPI4PY, comm.SHARED, comm.GLOO],
    "torchrun": [comm.GLOO, comm.COMMUNICATOR],
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
    rows = record["rows"]
    assert [(r["message"], r["path"]) for r in rows] == [
        (m.name, p)
        for m in comm.MESSAGES
        for p in PATHS_OF[launcher]
        if p != comm.SHARED or m.elements * m.dtype.itemsize <= MOST_BYTES
    ]
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
    assert [r["elements"] for r in rows if r["path"] == comm.COMMUNICATOR] == [131, 515, 2051, 4099, 6553600]


def test_comm_alone_says_how_to_launch():
    job = bench("alone", 1, "comm")
    assert job.returncode == 1
    assert "RuntimeError: expected a group of several ranks, got this process alone: mpirun -n 2" in job.stderr
