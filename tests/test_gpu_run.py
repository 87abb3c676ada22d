"""launch/gpu: what its run and its record promise. `launch/test` rehearses its real steps; the steps here are small."""

import importlib.util
import json
import os
import re
import signal
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest
from processes import run, started

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
PROGRAM = """
import sys
sys.path.insert(0, {launch!r})
import gpu
from gpu_steps import Step
from pathlib import Path

def python(code, **options):
    return Step(command=(sys.executable, "-c", code), **{{"limit": 30}} | options)

steps = [{steps}]
sys.exit(gpu.carry_out(steps, Path({folder!r}), {{"card": "a | card"}}, ["pytest"]))
"""
TESTS = """
import pytest

@pytest.mark.parametrize(("error", "bound"), [(2e-7, 1e-6), (3e-7, 1e-5), (1e-7, 1e-6)])
def test_passes(record_property, error, bound):
    record_property("error: y", error)
    record_property("bound: y", bound)

def test_has_no_bound(record_property):
    record_property("error: dx", 4e-3)

def test_fails():
    assert 1 == 2, "so | it is"

@pytest.mark.parametrize("case", range(2))
def test_is_skipped(case):
    pytest.skip("NOT TESTED: no moon")
"""


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))


def program(folder, steps):
    """Return the command that runs steps, which are Python."""
    return sys.executable, "-c", PROGRAM.format(launch=str(LAUNCH), steps=steps, folder=str(folder))


def pytest_step(folder, limit):
    """Return a step that runs the tests of a folder."""
    command = ["-m", "pytest", "-c", os.devnull, "-o", "junit_family=xunit1", "-p", "no:cacheprovider", str(folder)]
    return f"Step('tests', (sys.executable, *{command}, '--junitxml={{results}}.xml'), {limit}, 'tests', ('pytest',))"


def carry_out(folder, steps):
    """Run steps to their end; return the exit status, what was printed, and both records."""
    done = run(*program(folder, steps), timeout=60)
    assert (folder / "record.json").exists(), done.stdout
    record = json.loads((folder / "record.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["log.txt", "record.json", "record.md"]
    return done.returncode, done.stdout, record, (folder / "record.md").read_text()


def rows(markdown, head):
    """Return the cells of the table whose first column is `head`, by the first of each row."""
    table = re.search(rf"^\| {head} .*?\n((?:\|.*\n)*)", markdown, re.MULTILINE)[1]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[1:]]
    return {first: others for first, *others in cells}


def is_running(pid):
    """Tell whether there is a process that has not ended."""
    stat = Path("/proc", str(pid), "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_it_refuses_to_run_without_a_gpu(tmp_path):
    done = run(
        LAUNCH / "gpu",
        "--out",
        tmp_path / "out",
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"launch/gpu: expected a CUDA device, found none with torch \S+; ./launch/gpu --rehearse needs none\n",
        done.stdout,
    )
    assert list(tmp_path.iterdir()) == []


def test_it_refuses_a_python_without_torch(tmp_path):
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare/bin/python"
    done = run(LAUNCH / "gpu", "--rehearse", env=os.environ | {"PYTHON": str(python)}, cwd=tmp_path, timeout=60)
    assert done.stdout == f"launch/gpu: expected {python} to have torch, found none; PYTHON chooses another\n"
    assert done.returncode == 2


CHILDREN = """
import pathlib, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
pathlib.Path({path!r}).write_text(" ".join(str(child.pid) for child in children))
print("they have begun", flush=True)
{then}
"""


DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)"


@pytest.mark.parametrize("then", ["time.sleep(100)", DEAF], ids=["ends-if-interrupted", "does-not"])
def test_a_step_over_its_limit_is_killed_with_its_children_and_the_others_go_on(tmp_path, then):
    pids = tmp_path / "pids"
    (tmp_path / "out").mkdir()
    slow = CHILDREN.format(path=str(pids), then=then)
    steps = f"python({slow!r}, name='slow', limit=2), python('print(5)', name='next')"
    status, printed, record, markdown = carry_out(tmp_path / "out", steps)
    assert status == 1
    assert [step["verdict"] for step in record["steps"]] == ["over its limit", "passed"]
    assert record["steps"][0]["seconds"] < 6
    assert "they have begun" in record["steps"][0]["tail"]
    assert re.search(r"over its limit +slow +\d s +killed after 2 s\n +they have begun", printed)
    assert rows(markdown, "step")["slow"][0] == "over its limit"
    assert rows(markdown, "step")["slow"][-1] == "killed after 2 s"
    assert not any(map(is_running, pids.read_text().split()))


def test_what_a_step_leaves_behind_is_killed_before_the_next_one(tmp_path):
    pids = tmp_path / "pids"
    (tmp_path / "out").mkdir()
    steps = f"python({CHILDREN.format(path=str(pids), then='')!r}, name='leaves')"
    status, *_ = carry_out(tmp_path / "out", steps)
    assert status == 0
    assert not any(map(is_running, pids.read_text().split()))


def test_a_step_may_use_the_time_that_others_left(tmp_path):
    steps = "python('', name='short', limit=30), python('import time; time.sleep(2)', name='long', limit=1)"
    status, _, record, _ = carry_out(tmp_path, steps)
    assert status == 0
    assert 20 < record["steps"][1]["limit"] < 31


def test_a_failed_step_is_in_both_records_and_in_the_status(tmp_path):
    steps = "python('print(1 / 0)', name='bad'), python('', name='good'), python('', name='no', needs=('nothing',))"
    status, printed, record, markdown = carry_out(tmp_path, steps)
    assert status == record["status"] == 1
    assert record["finished"]
    assert [(step["name"], step["verdict"]) for step in record["steps"]] == [
        ("bad", "failed"), ("good", "passed"), ("no", "skipped")
    ]  # fmt: skip
    assert record["steps"][0]["tail"][-1] == "ZeroDivisionError: division by zero"
    assert re.search(r" failed +bad .*exit status 1\n(    .*\n)*    ZeroDivisionError: division by zero\n", printed)
    assert "**Failed** (failed: bad; skipped: no)" in markdown
    assert rows(markdown, "step")["no"][-1].startswith("nothing is missing")
    assert "ZeroDivisionError" in (tmp_path / "log.txt").read_text()


def test_both_records_tell_the_same_of_tests(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "test_it.py").write_text(TESTS)
    command = ["-m", "pytest", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "--junitxml"]
    steps = (
        f"Step('tests', (sys.executable, *{command}, '{{results}}.xml', {str(tmp_path)!r}), 40, 'tests', ('pytest',))"
    )
    status, printed, record, markdown = carry_out(tmp_path / "out", steps.replace("{{", "{").replace("}}", "}"))
    assert status == 1
    tests = record["tests"]
    assert (tests["passed"], tests["failed"], tests["skipped"]) == (4, 1, 2)
    assert rows(markdown, "step")["tests"][-1] == "4 passed, 1 failed, 2 skipped; exit status 1"
    assert tests["skips"] == {"NOT TESTED: no moon": 2}
    assert rows(markdown, "skipped")["2"] == ["NOT TESTED: no moon"]
    (failure,) = tests["failures"]
    assert failure["test"] == "test_it::test_fails"
    assert rows(markdown, "failed")["test_it::test_fails"] == [failure["message"].replace("|", "\\|")]
    assert tests["errors"]["y"]["share"] == pytest.approx(0.2)
    assert tests["errors"]["y"]["test"] == "test_it::test_passes[2e-07-1e-06]"
    assert rows(markdown, "worst error of") == {
        name: [f"{e['error']:g}", f"{e['bound']:g}" if e["bound"] else "", e["test"]]
        for name, e in tests["errors"].items()
    }
    assert "4 passed, 1 failed, 2 skipped." in printed
    assert "a \\| card" in markdown


def test_tests_that_are_all_skipped_are_a_skipped_step(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_a(): pytest.skip('NOT TESTED')")
    status, _, record, _ = carry_out(tmp_path / "out", pytest_step(tmp_path, 40))
    assert (status, record["steps"][0]["verdict"], record["steps"][0]["reason"]) == (
        0,
        "skipped",
        "all tests were skipped",
    )


def test_no_test_at_all_is_a_failure(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "test_it.py").write_text("")
    status, _, record, _ = carry_out(tmp_path / "out", pytest_step(tmp_path, 40))
    assert (status, record["steps"][0]["verdict"]) == (1, "failed")


def test_results_that_cannot_be_read_fail_their_step_and_no_other(tmp_path):
    write = "import sys, pathlib; pathlib.Path(sys.argv[1] + '.json').write_text('{')"
    steps = f"Step('bad', (sys.executable, '-c', {write!r}, '{{results}}'), 30), python('', name='good')"
    status, _, record, _ = carry_out(tmp_path, steps)
    assert (status, [step["verdict"] for step in record["steps"]]) == (1, ["failed", "passed"])
    assert record["steps"][0]["reason"].startswith("its results cannot be read: JSONDecodeError(")


def test_an_interrupted_pytest_still_tells_what_it_found(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "test_it.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(100)")
    status, _, record, _ = carry_out(tmp_path / "out", pytest_step(tmp_path, 10))
    assert (status, record["steps"][0]["verdict"]) == (1, "over its limit")
    assert record["tests"]["passed"] == 1


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=lambda ending: ending.name)
def test_an_ended_run_leaves_its_record_and_no_process(tmp_path, ending):
    pids = tmp_path / "pids"
    (tmp_path / "out").mkdir()
    endless = CHILDREN.format(path=str(pids), then="time.sleep(100)")
    steps = f"python('', name='first'), python({endless!r}, name='second')"
    with started(*program(tmp_path / "out", steps)) as process:
        deadline = time.monotonic() + 30
        while not pids.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(ending)
        process.communicate(timeout=30)
    assert not any(map(is_running, pids.read_text().split()))
    assert "**Unfinished**" in (tmp_path / "out" / "record.md").read_text()
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [step["name"] for step in record["steps"]] == ["first"]


@pytest.mark.parametrize("modules", [["pytest", "xdist"], ["pytest"]])
def test_a_run_takes_eight_minutes_at_most(modules):
    """A rehearsal may take longer: its machine may have few cores."""
    import gpu
    import gpu_steps

    steps, rehearsed = (gpu_steps.steps(rehearse, modules, 16) for rehearse in (False, True))
    assert gpu.BEFORE + sum(step.limit for step in steps) <= 8 * 60
    assert [step.limit * gpu_steps.REHEARSED for step in steps] == [step.limit for step in rehearsed]
    assert all(("-n" in step.command) == ("xdist" in modules) for step in steps if step.name == "tests")


def test_the_page_lists_the_steps_with_their_limits():
    import gpu_steps

    page = rows((ROOT / "docs" / "gpu.md").read_text(), "step")
    assert {name: cells[1] for name, cells in page.items()} == {
        step.name: f"{step.limit} s" for step in gpu_steps.steps(False, ["xdist"], 16)
    }


def test_only_selects_the_steps_of_a_kind():
    import gpu
    import gpu_steps

    steps = gpu_steps.steps(True, ["xdist"], 2)
    kinds = {only: [step.kind for step in gpu.selected(steps, only)] for only in (None, "tests", "bench")}
    assert kinds[None] == [step.kind for step in steps] == ["", "", *["tests"] * 4, *["bench"] * 3]
    assert kinds["tests"] == ["", "", *["tests"] * 4]
    assert kinds["bench"] == ["", "", *["bench"] * 3]
    assert [step.name for step in gpu.selected(steps, "bench")][-3:] == ["bench kernels", "bench layer", "bench train"]


def test_headlines_are_the_targets_furthest_from_their_limits_else_medians():
    import gpu_results

    targets = [("t", 1.0, 1.25), ("t", 2.0, 1.25), ("t", 1.1, 0.5)]
    numbers = {"targets": [{"target": t, "value": v, "limit": limit, "met": v <= limit} for t, v, limit in targets]}
    assert list(gpu_results.headlines("layer", numbers)) == [
        {"benchmark": "layer", "what": "t", "value": 1.1, "limit": 0.5, "cases": 3, "met": 1}
    ]
    ratios = [("copy baseline", 1.0), ("reference", 9.0), *(("triton", ratio) for ratio in (1.0, 5.0, 2.0))]
    numbers = {"rows": [{"kernel": "moments", "implementation": name, "ratio": ratio} for name, ratio in ratios]}
    (headline,) = gpu_results.headlines("kernels", numbers)
    assert (headline["what"], headline["value"], headline["cases"]) == ("triton, moments / copy", 2.0, 3)
    rows = [("BN", 2, 1.0, 100), ("fused", 2, 1.1, 80), ("BN", 4, 1.0, 200), ("fused", 4, 1.2, 120)]
    keys = ("norm", "images_per_rank", "ratio", "peak_memory_mb")
    trained = gpu_results.headlines("train", {"rows": [dict(zip(keys, row, strict=True)) for row in rows]})
    assert {headline["what"]: headline["value"] for headline in trained} == {
        "fused / BN, 2 images: time": 1.1,
        "fused / BN, 2 images: memory": 0.8,
        "fused / BN, 4 images: time": 1.2,
        "fused / BN, 4 images: memory": 0.6,
    }


def test_wheels_are_found_by_python_and_on_the_path(tmp_path):
    import gpu_machine

    name, wheels, prefix = "carried-1.0", tmp_path / "wheels", tmp_path / "prefix"
    files = {
        "carried.py": "WEIGHT = 5",
        f"{name}.data/scripts/carriedrun": "#!/bin/sh\necho launched",
        f"{name}.data/data/lib/libcarried.so": "a library, which stays where the scripts look for it",
        f"{name}.dist-info/METADATA": "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{name}.dist-info/RECORD"] = "".join(f"{path},,\n" for path in files)
    wheels.mkdir()
    with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = 0o100755 << 16
            archive.writestr(entry, text)
    variables = gpu_machine.install(wheels, prefix)
    path = variables["PATH"] + os.pathsep + os.environ["PATH"]
    code = "import carried, subprocess; print(carried.WEIGHT, subprocess.check_output('carriedrun', text=True))"
    done = run(sys.executable, "-c", code, env=os.environ | variables | {"PATH": path}, timeout=30)
    assert done.stdout == "5 launched\n\n"
    assert (prefix / "lib/libcarried.so").exists()


def test_a_folder_without_wheels_is_refused(tmp_path):
    done = run(LAUNCH / "gpu", "--rehearse", "--wheels", tmp_path, timeout=30)
    assert done.returncode == 2
    assert done.stdout == f"launch/gpu: --wheels: expected a folder with wheels, got {tmp_path}\n"


def test_pytest_alone_collects_the_tests_of_a_gpu():
    plugins = [word for plugin in ("pytest_mpi", "timeout", "xdist") for word in ("-p", f"no:{plugin}")]
    command = [sys.executable, "-m", "pytest", *plugins, "-p", "no:cacheprovider", "--collect-only", "-q"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    files = ["tests/test_triton_kernels.py", "tests/test_mpi_backend.py"]  # the second has tests for mpirun
    done = run(*command, *files, env=environment, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "test_triton_kernels.py::test_moments" in done.stdout


def test_what_the_launcher_imports_is_the_standard_library():
    for path in LAUNCH.glob("gpu*.py"):
        for name in re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE):
            assert name in sys.stdlib_module_names or (LAUNCH / f"{name}.py").exists(), (path, name)
            assert importlib.util.find_spec(name)
