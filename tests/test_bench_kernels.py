"""bench/kernels.py: the passes of each implementation, really timed. Nothing asserts a speed."""

import sys

import pytest
import torch
from benchmarks import JOBS, bench, read

import syncnorm
from syncnorm.bench import cases, copy_baseline, job, kernels, timing
from syncnorm.communicators import LocalCommunicator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_kernels_are_found_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "syncnorm.kernels.cpu", syncnorm.kernels.reference)
    assert list(kernels.available(CPU)) == ["reference", "cpu"]
    monkeypatch.setitem(sys.modules, "syncnorm.kernels.cpu", None)
    assert list(kernels.available(CPU)) == ["reference"]

    def not_compiled(name):
        raise OSError(f"{name}: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(kernels.importlib, "import_module", not_compiled)
        assert list(kernels.available(CPU)) == list(kernels.available(CUDA)) == ["reference"]
    monkeypatch.setitem(sys.modules, "syncnorm.kernels.triton", syncnorm.kernels.reference)
    assert list(kernels.available(CUDA)) == ["reference", "triton"]
    monkeypatch.setenv("SYNCNORM_KERNELS", "triton")  # in its interpreter
    assert list(kernels.available(CPU)) == ["reference", "triton"]


def test_cases_that_there_is_no_time_for_are_left():
    alone = job.Job(LocalCommunicator(), CPU)
    listed = cases.cases(CPU, quick=True)[:3]
    budget = timing.Budget(60.0, alone.group)
    left = iter([2.0, 1.0, 0.0])
    budget.left = lambda: next(left)
    sections = list(kernels.measure(alone, listed, True, budget, []))
    assert [section[0].case for section in sections] == listed[:2]


def test_a_pass_that_fails_is_told_and_the_others_are_timed(monkeypatch):
    first, *others = copy_baseline.PASSES
    passes = kernels.passes

    def fail():
        raise ValueError("no [/such] thing\nat all")

    def with_failure(implementation, x, dy):
        made = passes(syncnorm.kernels.reference, x, dy)
        return made if implementation == "reference" else {**made, first: fail}

    monkeypatch.setattr(kernels, "available", lambda _: {"reference": "reference", "broken": "broken"})
    monkeypatch.setattr(kernels, "passes", with_failure)
    alone, failures = job.Job(LocalCommunicator(), CPU), []
    [rows] = kernels.measure(alone, cases.cases(CPU, True)[:1], True, timing.Budget(60.0, alone.group), failures)
    assert [row.kernel for row in rows if row.implementation == "broken"] == others
    assert failures == [kernels.Failure(rows[0].case.name, first, "broken", "ValueError: no [/such] thing at all")]


def test_a_kernel_that_computes_something_else_is_not_timed():
    one = torch.ones(3)
    kernels.check("it", (one, None), (one + 5e-5, None))
    with pytest.raises(RuntimeError, match=r"expected it to agree with the reference to 0\.0001, got 0\.01"):
        kernels.check("it", (1.01 * one,), (one,))
    with pytest.raises(RuntimeError, match="expected it to return None, got tensor"):
        kernels.check("it", (one,), (None,))


@pytest.mark.parametrize(("launcher", "ranks"), [JOBS[0], JOBS[2]])
def test_kernels(tmp_path, launcher, ranks):
    out = tmp_path / "kernels.json"
    done = bench(
        launcher, ranks, "kernels", "--quick", "--only", "28x28", "--json", out, "--markdown", tmp_path / "k.md"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    record = read(out, done.stdout)
    rows = record["rows"]
    assert record["failures"] == []
    device = CUDA if torch.cuda.is_available() else CPU
    listed = [case.name for case in cases.cases(device, quick=True, only="28x28")]
    made = ["copy baseline", *kernels.available(device)]
    named = [(row["case"], row["kernel"], row["implementation"]) for row in rows]
    assert named == [(case, kernel, name) for case in listed for kernel in copy_baseline.PASSES for name in made]
    for row in rows:
        low, high = row["quartiles_us"]
        assert 0 < low <= row["median_us"] <= high
        assert row["ratio"] == pytest.approx(row["median_us"] / row["copy_us"])
        assert row["copy_us"] > 0
        assert row["implementation"] != "copy baseline" or row["ratio"] == 1
    quiet = [row for row in rows if row["kernel"] == "moments" and not row["noisy"]]
    written = (tmp_path / "k.md").read_text()
    for name in made:
        assert written.count(f"| moments | {name} |") == sum(row["implementation"] == name for row in quiet)
    disturbed = sum(row["noisy"] for row in rows)
    assert (f"Left out as disturbed: {disturbed} of {len(rows)} (" in written) is (disturbed > 0)
