"""examples/contrast.py, run for real on a tiny matrix; and its advice, which follows from the numbers."""

import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from launchers import launch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import contrast_report
from contrast_report import Cells, Value

CONTRAST = Path(contrast_report.__file__).with_name("contrast.py")
TINY = ["--quick", "--ranks", 2, "--sizes", 2, 4, "--seeds", 2, "--cnn-samples", 40, "--timed-steps", 2]
TINY += ["--transformer-samples", 16]
RUNS = 2 * (5 + 3) * 2 * 2  # kinds, norms of both models, sizes, seeds


def contrast(directory, *options):
    job = launch("alone", 1, CONTRAST, *TINY, "--out", directory, *options, timeout=60, NO_COLOR="1")
    assert job.returncode == 0, job.stderr
    return job


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return the folder of a report."""
    path = tmp_path_factory.mktemp("contrast")
    assert f"report: {path}" in contrast(path).stdout
    return path


def test_report_is_there(directory):
    report = (directory / "report.md").read_text()
    for name in contrast_report.FIGURES:
        assert f"({name}.png)" in report
        assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (directory / f"{name}.svg").read_text()
    assert len(list((directory / "records").iterdir())) == RUNS
    assert "of 28 trainings ran on the ranks too. In 28 of them no loss differs by more than 1e-05" in " ".join(
        report.split()
    )


def test_data_is_that_of_the_records(directory):
    rows = list(csv.DictReader((directory / "data.csv").read_text().splitlines()))
    assert len(rows) == RUNS
    for row in rows:
        name = "{kind}-{model}-{norm}-{ranks}x{samples_per_rank}-seed{seed}.json".format(**row)
        record = json.loads((directory / "records" / name).read_text())
        assert int(row["processes"]) == record["ranks"] == (2 if row["kind"] == "time" or row["norm"] == "bn" else 1)
        assert int(row["steps"]) == record["steps"] == len(record["loss"])
        assert record["ranks"] * record["batch_per_rank"] == 2 * int(row["samples_per_rank"])
        assert float(row["seconds_per_step"]) == record["seconds_per_step"]
        assert 0 <= record["communication_seconds_per_step"] <= record["seconds_per_step"]
        assert (float(row["communication_seconds_per_step"]) > 0) == (record["ranks"] > 1)
        assert float(row["norm_bytes_per_step"]) == record["per_step"]["norm"]["bytes"]
        assert (row["test_accuracy"] != "") == (row["kind"] == "quality" and row["model"] == "cnn")
    steps = {
        row["samples_per_rank"]: int(row["steps"]) for row in rows if row["kind"] == "quality" and "cnn" in row.values()
    }
    assert steps == {"2": 10, "4": 5}  # equally many samples


def test_one_process_stands_for_the_ranks(directory):
    for path in (directory / "records").glob("time-*.json"):
        alone = json.loads(path.with_name(path.name.replace("time", "quality")).read_text())
        if alone["ranks"] == 1:
            assert json.loads(path.read_text())["loss"] == pytest.approx(alone["loss"][:2], abs=1e-4)


def test_only_what_is_missing_is_run(directory):
    before = {path: path.stat().st_mtime_ns for path in (directory / "records").iterdir()}
    report = (directory / "report.md").read_text()
    missing = directory / "records" / "quality-cnn-gn-2x4-seed1.json"
    loss = json.loads(missing.read_text())["loss"]
    missing.unlink()
    contrast(directory)
    after = {path: path.stat().st_mtime_ns for path in (directory / "records").iterdir()}
    assert [path for path in after if after[path] != before[path]] == [missing]
    assert json.loads(missing.read_text())["loss"] == loss
    assert (directory / "report.md").read_text() == report
    contrast(directory)
    assert {path: path.stat().st_mtime_ns for path in (directory / "records").iterdir()} == after


class Run(NamedTuple):
    kind: str
    model: str
    norm: str
    samples: int
    seed: int


def cells(errors=None, bits=None, milliseconds=None, gap=0.0):
    """Return the Cells of made-up records: {norm: [value at 1 sample per rank, at 16]}, in percent, bits and ms."""
    records = {}
    for model, values in ("cnn", errors or {}), ("transformer", bits or {}):
        for norm, pair in values.items():
            for samples, value in zip((1, 16), pair, strict=True):
                for seed, aside in enumerate((-0.1, 0.0, 0.1)):  # a spread of 0.1
                    record = {"steps": 10, "test_accuracy": 1 - (value + aside) / 100, "test_images": 10_000}
                    record["valid_bits_per_character"] = value + aside
                    in_train_mode = value + aside - (gap + aside / 100 if norm == "sync_bn" else 0)
                    record["valid_bits_per_character_in_train_mode"] = in_train_mode
                    records[Run("quality", model, norm, samples, seed)] = record
                    total = (milliseconds or {}).get(norm, 10) + aside
                    synchronized = norm == "sync_bn"
                    records[Run("time", model, norm, samples, seed)] = {
                        "seconds_per_step": total / 1000,
                        "communication_seconds_per_step": (total - 8) / 1000,
                        "per_step": {
                            "norm": {"collectives": 18 * synchronized, "bytes": 10_000 * synchronized},
                            "gradients": {"collectives": 1, "bytes": 300_000},
                        },
                    }
    return Cells(records)


def test_values():
    value = Value.of([1.0, 2.0, 3.0])
    assert value == (2.0, 1.0)
    assert value.text(1, " %") == "2.0 ± 1.0 %"
    assert Value(4.1, 1.0).clearly_above(value)
    assert not Value(3.9, 1.0).clearly_above(value)
    assert Value.of([5.0, 5.0], resolution=0.3).spread == 0.3


WU_AND_HE = {"bn": [30, 5], "sync_bn": [5, 5], "gn": [5, 5]}


def test_advice_on_errors_follows_the_numbers():
    text = contrast_report.advise_error(cells(WU_AND_HE))
    assert "With BatchNorm the error rises from 5.0 ± 0.1 % at 16 samples per rank to 30.0 ± 0.1 % at 1." in text
    assert "With SyncBatchNorm and GroupNorm the error does not depend on it" in text
    assert (
        "**Synchronizing BatchNorm lowers the error at 1 sample per rank; at 16 it makes no clear difference.**" in text
    )
    assert "GroupNorm is not to be told from SyncBatchNorm at any size, and communicates nothing." in text


@pytest.mark.parametrize(
    ("gn", "text"),
    [
        ([4, 4], "GroupNorm is better than SyncBatchNorm at 1 and 16 samples per rank; the quality comes without"),
        ([5, 6], "GroupNorm is worse than SyncBatchNorm at 16 samples per rank."),
        (
            [4, 6],
            "GroupNorm is better than SyncBatchNorm at 1 sample per rank and worse than SyncBatchNorm at 16 samples",
        ),
        ([5.1, 4.9], "GroupNorm is not to be told from SyncBatchNorm at any size"),
    ],
)
def test_advice_on_group_norm_follows_the_numbers(gn, text):
    assert text in contrast_report.advise_error(cells(WU_AND_HE | {"gn": gn}))


@pytest.mark.parametrize(
    ("bn", "text"),
    [
        ([5, 5], "**Synchronizing BatchNorm lowers the error at none of these sizes.**"),
        ([9, 9], "**Synchronizing BatchNorm lowers the error at 1 and 16 samples per rank, so at all sizes tried.**"),
        ([1, 1], "**Synchronizing BatchNorm raises the error at all of these sizes.**"),
    ],
)
def test_advice_to_synchronize_follows_the_numbers(bn, text):
    assert text in contrast_report.advise_error(cells(WU_AND_HE | {"bn": bn}))


@pytest.mark.parametrize(
    ("sync_bn", "text"),
    [
        (40, "4.0 times as long as one with BatchNorm (40.0 ± 0.1 and 10.0 ± 0.1 ms), 80 % of it in communication"),
        (40, "a price to weigh against the quality"),
        (10.1, "not clearly longer than one with BatchNorm"),
        (10.1, "**At 16 samples per rank it costs little.**"),
    ],
)
def test_advice_on_time_follows_the_numbers(sync_bn, text):
    assert text in contrast_report.advise_time(cells(WU_AND_HE, milliseconds={"sync_bn": sync_bn}))


@pytest.mark.parametrize(("sync_bn", "latency"), [(40, True), (10.05, False)])
def test_advice_on_collectives_follows_the_numbers(sync_bn, latency):
    text = contrast_report.advise_collectives(cells(WU_AND_HE, milliseconds={"sync_bn": sync_bn}))
    assert "18 collectives of 556 bytes on average, in all 3.3 % of the bytes of the gradients, which take 1." in text
    assert ("what counts is the latency" in text) == latency


@pytest.mark.parametrize(
    ("sync_bn", "gap", "texts"),
    [
        ([3, 3], 0.5, ["SyncBatchNorm is clearly worse", "predicts worse in eval than in train mode at 1 and 16"]),
        ([3, 3], 0.5, ["**A Transformer like this one does not need SyncBatchNorm: take LayerNorm and RMSNorm.**"]),
        ([3, 3], -0.5, ["predicts better in eval than in train mode at 1 and 16 samples per rank, by up to 0.500"]),
        ([1, 1], 0.0, ["SyncBatchNorm predicts best", "earns its communication at 1 and 16 samples per rank"]),
        ([2, 2], 0.0, ["cannot be told apart", "**LayerNorm and RMSNorm give the same without communication.**"]),
        ([1, 3], 0.0, ["**Which norm is better depends on the samples per rank.**"]),
    ],
)
def test_advice_on_the_transformer_follows_the_numbers(sync_bn, gap, texts):
    advice = contrast_report.advise_transformer(cells(bits={"ln": [2, 2], "rms": [2, 2], "sync_bn": sync_bn}, gap=gap))
    assert all(text in advice for text in texts), advice
    assert ("in eval than in train mode" in advice) == (gap != 0)


def test_another_number_of_ranks_is_refused(tmp_path):
    job = launch("torchrun", 2, CONTRAST, "--ranks", 4, "--out", tmp_path, timeout=60)
    assert job.returncode != 0
    assert "expected 4 ranks, got 2" in job.stderr
