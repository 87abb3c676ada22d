"""examples/claims.py: the command run for real on one claim, and every verdict of the docs recomputed from its CSV."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launchers import launch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import claims_report
import comparison
from claims import CLAIMS, runs_of, stages
from experiments.claim import FAILS, HOLDS, Data
from experiments.run import Run, version

CLAIMS_PY = Path(claims_report.__file__).with_name("claims.py")
DOCS = Path(__file__).parent.parent / "docs"
PUBLISHED = DOCS / "claims"
CHEAP = "mixed-features"  # the claim that the command is tried with
TINY = ["--quick", "--seeds", 2, "--only", CHEAP]


def measure(directory, *options, status=0):
    job = launch("alone", 1, CLAIMS_PY, *TINY, "--out", directory, *options, timeout=110, NO_COLOR="1")
    assert job.returncode == status, job.stderr
    return job


def records(directory):
    return sorted((directory / "records" / CHEAP).iterdir())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return the folder of a report on one claim."""
    path = tmp_path_factory.mktemp("claims")
    job = measure(path)
    assert re.search(rf"^{CHEAP}: (holds here|holds only if .+|does not hold here)$", job.stdout, re.MULTILINE)
    assert f"report: {path}/report.md" in job.stdout
    return path


def test_the_report_has_the_claim_its_figure_and_its_verdict(directory):
    text = (directory / "report.md").read_text()
    claim = CLAIMS[CHEAP]
    data = Data.of_csv((directory / f"{CHEAP}.csv").read_text())
    verdict = claim.judge(data)
    assert claim.sentence in text
    assert claim.source in text
    assert f"**It {verdict.held}.** {verdict.finding}" in text
    assert f"({CHEAP}.png)" in text
    assert "2 seeds" in text
    assert (directory / f"{CHEAP}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (directory / f"{CHEAP}.svg").read_text()


def test_the_data_are_those_of_the_records(directory):
    rows = list(csv.DictReader((directory / f"{CHEAP}.csv").read_text().splitlines()))
    runs = runs_of(CLAIMS[CHEAP], True, 2)
    assert len(records(directory)) == len(runs)
    for run in runs:
        record = json.loads((directory / run.path).read_text())
        assert record["settings"] == dict(run.settings)
        mine = [row for row in rows if {**dict(run.settings), "seed": run.seed}.items() <= numbers(row).items()]
        for metric, value in record["metrics"].items():
            found = {row["step"]: float(row["value"]) for row in mine if row["metric"] == metric}
            expected = value if isinstance(value, dict) else {"": value}
            assert found == pytest.approx(
                {str(step): number for step, number in expected.items()}, rel=1e-5, nan_ok=True
            )


def numbers(row):
    return Data.of_csv("\n".join(",".join(line) for line in (row, row.values()))).rows[0]


def test_only_what_is_missing_or_of_another_version_is_measured(directory):
    before = {path: path.stat().st_mtime_ns for path in records(directory)}
    report = (directory / "report.md").read_text()
    missing, old, *_ = before
    metrics = json.loads(missing.read_text())["metrics"]
    missing.unlink()
    record = json.loads(old.read_text())
    old.write_text(json.dumps(record | {"version": "syncnorm 0.0.1"}))
    job = measure(directory)
    assert f"{directory}: 1 record of another version (syncnorm 0.0.1), measured again" in job.stdout
    after = {path: path.stat().st_mtime_ns for path in records(directory)}
    assert {path for path in after if after[path] != before[path]} == {missing, old}
    assert json.loads(missing.read_text())["metrics"] == metrics
    assert json.loads(old.read_text())["version"] == version(CLAIMS[CHEAP]) == record["version"]
    assert (directory / "report.md").read_text() == report


def test_redrawing_gives_the_same_report_from_the_csv(directory):
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    job = launch("alone", 1, CLAIMS_PY, "--redraw", "--out", directory)
    assert job.returncode == 0, job.stderr
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before
    csv_file = directory / f"{CHEAP}.csv"
    exchanged = {"rms": "bn", "bn": "rms"}
    csv_file.write_text(re.sub("^(rms|bn),", lambda m: f"{exchanged[m[1]]},", csv_file.read_text(), flags=re.MULTILINE))
    job = launch("alone", 1, CLAIMS_PY, "--redraw", "--out", directory)
    assert job.returncode == 0, job.stderr
    assert (directory / "report.md").read_bytes() != before["report.md"]
    csv_file.write_bytes(before[csv_file.name])


def test_an_interrupted_command_goes_on_from_there(tmp_path):
    command = [sys.executable, CLAIMS_PY, *map(str, TINY), "--out", tmp_path, "--jobs", "1"]
    environment = os.environ | {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=40)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted: the same command goes on from here"
    assert "Traceback" not in errors
    done = len(list(tmp_path.rglob("*.json")))
    assert 0 < done < len(runs_of(CLAIMS[CHEAP], True, 2))
    wait_until_gone(process.pid)


def wait_until_gone(group):
    """Wait for the processes of a group to end, which is a matter of a moment."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes of the command are left")


def test_an_unknown_name_lists_the_names(tmp_path):
    job = launch("alone", 1, CLAIMS_PY, "--only", "batchnorm", "--out", tmp_path)
    assert job.returncode == 2
    assert f"expected --only of {', '.join(CLAIMS)}, got batchnorm" in " ".join(job.stderr.split())


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    job = launch("alone", 1, CLAIMS_PY, "--only", CHEAP, "--out", file)
    assert job.returncode == 1
    assert job.stderr.startswith("--out: cannot write ")
    assert "Traceback" not in job.stderr


def test_runs_have_names_of_their_own_and_fit_into_the_time():
    for quick, minutes in (True, 6), (False, 60):
        runs = [run for claim in CLAIMS.values() for run in runs_of(claim, quick, 3)]
        assert len({run.path for run in runs}) == len(runs)
        (_, undisturbed), (_, on_ranks), (cores, alone) = stages(runs, 2)
        one_at_a_time = sum(run.seconds for batches in (undisturbed, on_ranks) for batch in batches for run in batch)
        seconds = one_at_a_time + sum(run.seconds for [run] in alone) / cores
        assert seconds < 60 * minutes, seconds


def test_what_measures_time_runs_alone_and_first():
    timed = Run("cost", (), 0, 1)
    ranks = [Run("batch-size", (("ranks", 4),), seed, 1) for seed in (0, 1)]
    quick, slow = (Run("convergence", (), 0, seconds) for seconds in (1, 2))
    assert stages([quick, *ranks, slow, timed], 2) == [(1, [[timed]]), (1, [ranks]), (2, [[slow], [quick]])]


# the report in the docs


def published(name):
    return Data.of_csv((PUBLISHED / f"{name}.csv").read_text())


def test_the_docs_have_a_whole_run():
    text = (PUBLISHED / "report.md").read_text()
    assert "--quick" not in text.split("##")[0]
    for name, claim in CLAIMS.items():
        data = published(name)
        assert len(data.seeds) >= 3
        cases = [settings for settings, _ in claim.cases(False)]
        assert all(data.where(**settings).rows for settings in cases)
        for suffix in "png", "svg":
            assert (PUBLISHED / f"{name}.{suffix}").exists()


@pytest.mark.parametrize("name", CLAIMS)
def test_every_verdict_of_the_docs_follows_from_its_csv(name):
    text = (PUBLISHED / "report.md").read_text()
    data = published(name)
    assert claims_report.section(CLAIMS[name], data, CLAIMS[name].judge(data)) in text


def test_the_summary_and_the_table_of_norms_follow_from_the_csv():
    data = {name: published(name) for name in CLAIMS}
    text = (PUBLISHED / "report.md").read_text()
    assert claims_report.summary(claims_report.judge(data)).markdown() in text
    table = comparison.table(data).markdown()
    assert table in text
    assert comparison.table(data, page="claims/report.md").markdown() in (DOCS / "which-norm.md").read_text()


OTHERWISE = {  # numbers with these settings, multiplied by a factor, say something else
    "convergence": ({"norm": "bn", "metric": "steps to the loss"}, 10),
    "covariate-shift": ({"noise": 1, "metric": "steps to the loss"}, 10),
    "smoothness": ({"norm": "bn"}, 1000),
    "saturation": ({"norm": "bn", "metric": "share"}, 0.1),
    "regularization": ({"norm": "bn", "metric": "gap at the target"}, 0.1),
    "batch-size": ({"norm": "bn", "metric": "error"}, 0.01),
    "train-eval": ({"norm": "bn"}, 0),
    "recurrent": ({"norm": "ln", "metric": "bits"}, 2),
    "cnn-layer-norm": ({"norm": "bn", "metric": "test error"}, 10),
    "mixed-features": ({"norm": "ln", "metric": "test error"}, 0.01),
    "cost": ({"metric": "rms/ours/features/both"}, 0.1),
    "rms-norm": ({"norm": "rms", "metric": "bits"}, 1.2),
}


def test_the_table_of_norms_has_an_empty_cell_where_a_quick_run_has_no_number():
    data = {name: published(name) for name in CLAIMS}
    quick = {settings["norm"] for settings, _ in CLAIMS["cnn-layer-norm"].cases(True)}
    assert "gn" not in quick
    data["cnn-layer-norm"] = Data([row for row in data["cnn-layer-norm"].rows if row["norm"] in quick])
    [row] = [line for line in comparison.table(data).markdown().splitlines() if line.startswith("| GroupNorm")]
    assert row.endswith("|  |")


@pytest.mark.parametrize("name", CLAIMS)
def test_other_numbers_give_another_verdict(name):
    """The negative control: a verdict that no numbers can change says nothing."""
    settings, factor = OTHERWISE[name]
    rows = [
        row | {"value": row["value"] * (factor if settings.items() <= row.items() else 1)}
        for row in published(name).rows
    ]
    assert CLAIMS[name].judge(Data(rows)).held != CLAIMS[name].judge(published(name)).held


def test_data_survive_a_csv():
    found = [
        ({"norm": "bn", "lr": 0.1}, 0, {"loss": {0: 2.5, 10: float("nan")}, "error": 1 / 3, "steps": float("inf")})
    ]
    data = Data.of_records(found)
    again = Data.of_csv(data.csv())
    assert again.csv() == data.csv()
    assert [row["step"] for row in again.rows] == [0, 10, "", ""]
    assert again.value("error", norm="bn").numbers == (0.333333,)
    assert again.curve("loss", lr=0.1)[0] == [0, 10]


def test_a_number_of_several_cases_is_refused():
    records = [({"norm": norm}, seed, {"error": 1.0}) for norm in ("bn", "ln") for seed in (0, 1)]
    data = Data.of_records(records)
    assert data.value("error", norm="bn").numbers == (1, 1)
    for settings in {}, {"norm": "gn"}:
        with pytest.raises(KeyError, match="expected error of one case"):
            data.value("error", **settings)


def test_a_record_is_of_the_program_that_measured_it():
    """Its version covers all files by which its claim is measured, and not those by which it is drawn."""
    modules = CLAIMS["batch-size"].modules
    assert modules.keys() >= {"experiments.batch_size", "experiments.on_ranks", "experiments.loop", "cnn", "training"}
    assert not modules.keys() & {"figures", "experiments.panel", "experiments.claim", "experiments.convergence"}
    assert len({claim.version for claim in CLAIMS.values()}) == len(CLAIMS)


def test_experiments_train_by_the_loop_that_the_examples_share():
    steps = {path.name for path in CLAIMS_PY.parent.rglob("*.py") if ".step()" in path.read_text()}
    assert steps == {"training.py", "minimal_ddp.py", "minimal_mpi.py", "uneven.py"}


def test_verdicts_are_of_three_kinds():
    kinds = re.compile(f"{HOLDS}|holds only if .+|{FAILS}")
    assert all(kinds.fullmatch(claim.judge(published(name)).held) for name, claim in CLAIMS.items())
