"""examples/contrast.py, run for real on a tiny matrix; and its advice, which follows from the numbers."""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from launchers import launch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import contrast as contrast_example
import contrast_figures
import contrast_report
import figures
import spread
from contrast_report import Cells
from spread import Value

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


def cells(errors=None, bits=None, milliseconds=None, gap=0.0, communication=None, sizes=(1, 16), seeds=3):
    """Return the Cells of made-up records: {norm: [value at 1 sample per rank, at 16]}, in percent, bits and ms."""
    records = {}
    for model, values in ("cnn", errors or {}), ("transformer", bits or {}):
        for norm, pair in values.items():
            for samples, value in zip(sizes, pair, strict=True):
                for seed, aside in enumerate((-0.1, 0.0, 0.1)[:seeds]):  # a spread of 0.1
                    record = {"steps": 10, "test_accuracy": 1 - (value + aside) / 100, "test_images": 10_000}
                    record["valid_bits_per_character"] = value + aside
                    in_train_mode = value + aside - (gap + aside / 100 if norm == "sync_bn" else 0)
                    record["valid_bits_per_character_in_train_mode"] = in_train_mode
                    records[Run("quality", model, norm, samples, seed)] = record
                    total = (milliseconds or {}).get(norm, 10) + aside
                    synchronized = norm == "sync_bn"
                    records[Run("time", model, norm, samples, seed)] = {
                        "seconds_per_step": total / 1000,
                        "communication_seconds_per_step": (communication or {}).get(norm, total - 8) / 1000,
                        "per_step": {
                            "norm": {"collectives": 18 * synchronized, "bytes": 10_000 * synchronized},
                            "gradients": {"collectives": 1, "bytes": 300_000},
                        },
                    }
    return Cells(records)


def test_values():
    value = Value((1.0, 2.0, 3.0))
    assert (value.mean, value.spread) == (2.0, 1.0)
    assert value.text(1, " %") == "2.0 ± 1.0 %"
    assert Value((3.1, 4.1, 5.1)).clearly_above(value)
    assert not Value((2.9, 3.9, 4.9)).clearly_above(value)
    assert Value((5.0, 5.0), resolution=0.3).spread == 0.3


def test_a_mean_over_sizes_is_taken_seed_by_seed():
    mean = Value.over([Value((1.0, 2.0), 0.1), Value((4.0, 3.0), 0.1)])
    assert (mean.numbers, mean.spread) == ((2.5, 2.5), 0.1)


def test_a_mean_over_sizes_resolves_no_more_than_an_image():
    low, high = (Value.over(5 * [Value((error, error, error), 0.3)]) for error in (1.0, 1.5))
    assert not high.clearly_above(low)
    assert not low.clearly_above(high)


def test_one_seed_tells_no_difference():
    assert not Value((9.0,)).clearly_above(Value((1.0,)))
    assert Value((9.0,), resolution=0.3).text(1, " %") == "9.0 %"


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_chance_is_that_of_equal_values(seeds):
    """Told by drawing pairs."""
    first, second = np.random.default_rng(0).standard_normal((2, 100_000, seeds))
    joint = np.sqrt((first.var(1, ddof=1) + second.var(1, ddof=1)) / 2)
    differ = np.abs(first.mean(1) - second.mean(1)) > spread.CLEAR * joint
    assert spread.chance(seeds) == pytest.approx(differ.mean(), abs=0.005)


def test_labels_are_moved_apart():
    assert figures.apart([0.1, 0.5, 0.5], 0.1) == pytest.approx([0.1, 0.45, 0.55])
    assert figures.apart([0.97, 0.97], 0.1) == pytest.approx([0.9, 1.0])


WU_AND_HE = {"bn": [30, 5], "sync_bn": [5, 5], "gn": [5, 5]}


SYNCHRONIZE = "**At 1 sample per rank take "


@pytest.mark.parametrize(
    ("gn", "texts"),
    [
        (
            [5, 5],
            ["GroupNorm (5.0 ± 0.1) cannot be told from it.", SYNCHRONIZE + "GroupNorm, which is not clearly worse"],
        ),
        ([5.3, 4.7], ["GroupNorm (5.0 ± 0.1) cannot be told from it."]),  # either alone would be clear
        ([4, 4], ["GroupNorm (4.0 ± 0.1) is clearly better.", SYNCHRONIZE + "GroupNorm; with more"]),
        ([5, 6], ["GroupNorm (5.5 ± 0.1) is clearly worse.", SYNCHRONIZE + "SyncBatchNorm; with more"]),
    ],
)
def test_advice_on_group_norm_follows_the_mean_over_sizes(gn, texts):
    advice = contrast_report.advise_error(cells(WU_AND_HE | {"gn": gn}))
    for text in ["Over all sizes together SyncBatchNorm comes to 5.0 ± 0.1 %; ", *texts]:
        assert text in advice, advice


def test_of_norms_that_cannot_be_told_apart_the_lowest_is_advised():
    advice = contrast_report.advise_error(cells(WU_AND_HE | {"gn": [5.05, 5.05], "ln": [4.95, 4.95], "rms": [5, 5]}))
    assert SYNCHRONIZE + "LayerNorm, which is not clearly worse" in advice


def test_norms_of_one_verdict_share_a_sentence():
    advice = contrast_report.advise_error(cells(WU_AND_HE | {"gn": [4, 6], "ln": [9, 9], "rms": [5, 5]}))
    assert "; LayerNorm (9.0 ± 0.1) is clearly worse; GroupNorm (5.0 ± 0.1) and RMSNorm (5.0 ± 0.1) cannot" in advice


@pytest.mark.parametrize(
    ("bn", "texts"),
    [
        (
            [30, 5],
            [
                "BatchNorm's error is clearly above SyncBatchNorm's at 1 sample per rank (30.0 ± 0.1 and 5.0 ± 0.1 %), "
                "at 16 no longer (5.0 ± 0.1 and 5.0 ± 0.1 %).",
                "**At 1 sample per rank take GroupNorm",
                "or SyncBatchNorm; with more, BatchNorm will do as far as these numbers tell.**",
            ],
        ),
        (
            [9, 9],
            [
                "clearly above SyncBatchNorm's up to 16 samples per rank (9.0 ± 0.1 and 5.0 ± 0.1 %).",
                "**Up to 16 samples per rank take GroupNorm, which is not clearly worse and needs no communication, or "
                "SyncBatchNorm.**",
            ],
        ),
        ([5, 5], ["Even at 1 sample per rank BatchNorm's error is not clearly above", "**Leave BatchNorm as it is: "]),
        ([5, 9], ["Even at 1 sample per rank BatchNorm's error is not clearly above", "**Leave BatchNorm as it is: "]),
    ],
)
def test_advice_to_synchronize_follows_the_numbers(bn, texts):
    advice = contrast_report.advise_error(cells(WU_AND_HE | {"bn": bn}))
    assert all(text in advice for text in texts), advice


@pytest.mark.parametrize(
    ("sync_bn", "texts"),
    [
        (40, ["takes, against BatchNorm in the CNN, 4.0 times as long at 1 (40.0 ± 0.1 and 10.0 ± 0.1 ms) and 4.0 "]),
        (40, ["is 80 % of its time. **Take SyncBatchNorm only where its quality is worth that time.**"]),
        (10.1, ["1.0 times as long at 16 (10.1 ± 0.1 and", "**Time is no reason against SyncBatchNorm.**"]),
    ],
)
def test_advice_on_time_follows_the_numbers(sync_bn, texts):
    advice = contrast_report.advise_time(cells(WU_AND_HE, milliseconds={"sync_bn": sync_bn}))
    assert all(text in advice for text in texts), advice


@pytest.mark.parametrize(("sync_bn", "latency"), [(40, True), (10.05, False)])
def test_advice_on_collectives_follows_the_numbers(sync_bn, latency):
    text = contrast_report.advise_collectives(cells(WU_AND_HE, milliseconds={"sync_bn": sync_bn}))
    assert (
        "18 collectives a step, of 556 bytes on average. They add 3.3 % to the bytes of the gradients and, at 1" in text
    )
    assert ("**What costs is the number of collectives" in text) == latency
    assert ("**The collectives cost no more than their bytes" in text) == (not latency)


@pytest.mark.parametrize(
    ("step", "communication", "texts"),
    [
        (40, 18, ["16.0 ms to their 2.0 ms; the whole step takes 30.0 ms more than with BatchNorm.", "**What costs"]),
        (40, 16, ["14.0 ms to their 2.0 ms; the whole step takes 30.0 ms more", "is no communication: to save it"]),
        (9, 8, ["6.0 ms to their 2.0 ms; the whole step takes 1.0 ms less than", "**The collectives add nothing to"]),
    ],
)
def test_the_number_of_collectives_costs_only_where_communication_is_most_of_the_difference(step, communication, texts):
    made_up = cells(
        WU_AND_HE, milliseconds={"sync_bn": step}, communication={"bn": 2, "gn": 2, "sync_bn": communication}
    )
    advice = contrast_report.advise_collectives(made_up)
    assert all(text in advice for text in texts), advice
    assert ("number of collectives" in advice) == (communication == 18)


BOTH = {"errors": WU_AND_HE, "bits": {"ln": [2, 2], "rms": [2, 2], "sync_bn": [2, 2]}}


@pytest.mark.parametrize("advise", [contrast_report.advise_time, contrast_report.advise_collectives])
def test_advice_that_holds_for_both_models_is_given_once(advise):
    advice = advise(cells(**BOTH, milliseconds={"sync_bn": 40}))
    assert advice.count("**") == 2
    assert advice.index("CNN") < advice.rindex("Transformer") < advice.index("**")


def test_advice_that_holds_for_one_model_names_it():
    advice = contrast_report.advise_time(cells(**BOTH, milliseconds={"sync_bn": 40, "ln": 40}))
    assert advice.endswith(
        "**In the CNN take SyncBatchNorm only where its quality is worth that time; in the Transformer time is no "
        "reason against SyncBatchNorm.**"
    )


@pytest.mark.parametrize(
    ("sync_bn", "gap", "texts"),
    [
        ([3, 3], 0.5, ["LayerNorm (2.000 ± 0.100) and RMSNorm (2.000 ± 0.100) are clearly better."]),
        ([3, 3], 0.5, ["are 0.500 ± 0.001 (at 1) to 0.500 ± 0.001 (at 16), above 0"]),
        ([3, 3], -0.5, ["**In a Transformer like this one take LayerNorm or RMSNorm.**"]),
        ([1, 1], 0.0, ["are clearly worse.", "**In a Transformer like this one take SyncBatchNorm.**"]),
        (
            [2, 2],
            0.0,
            ["cannot be told from it", "take LayerNorm, which is not clearly worse and needs no communication"],
        ),
        (
            [1, 3],
            0.0,
            ["comes to 2.000 ± 0.100 bits per character", "cannot be told from it", "SyncBatchNorm 1.000 ± "],
        ),
    ],
)
def test_advice_on_the_transformer_follows_the_numbers(sync_bn, gap, texts):
    advice = contrast_report.advise_transformer(cells(bits={"ln": [2, 2], "rms": [2, 2], "sync_bn": sync_bn}, gap=gap))
    assert all(text in advice for text in texts), advice


def test_a_report_of_one_seed_advises_nothing_on_quality(directory, tmp_path):
    shutil.copytree(directory / "records", tmp_path / "records")
    contrast(tmp_path, "--seeds", 1)
    report = (tmp_path / "report.md").read_text()
    assert "1 seed. " in report
    assert "With one seed no difference is clear: take no advice on quality from this report." in report
    for advice in "clearly", "told from", "Leave BatchNorm", "In a Transformer like", "suits", "deviation", "±":
        assert advice not in report, advice
    for section in "Test error of the CNN", "The Transformer":
        text = report.split(f"## {section}")[1].split("## ")[0]
        assert "by one seed: " in text
        assert "**" not in text


def test_one_seed_advises_nothing_whatever_its_numbers():
    for advise, made_up in (
        (contrast_report.advise_error, cells(WU_AND_HE, seeds=1)),
        (contrast_report.advise_transformer, cells(**BOTH, seeds=1)),
    ):
        assert "**" not in advise(made_up)
    assert "by one seed: BatchNorm 17.4, SyncBatchNorm 4.9 and GroupNorm 4.9." in contrast_report.advise_error(
        cells(WU_AND_HE, seeds=1)
    )
    alone = contrast_report.advise_error(cells({"bn": [9], "sync_bn": [5]}, sizes=(8,), seeds=1))
    assert alone == "At 8 samples per rank, in %, by one seed: BatchNorm 8.9 and SyncBatchNorm 4.9."


def test_a_report_on_the_transformer_speaks_of_no_images_and_no_batch_norm(directory, tmp_path):
    shutil.copytree(directory / "records", tmp_path / "records")
    contrast(tmp_path, "--models", "transformer")
    report = (tmp_path / "report.md").read_text()
    assert "by the mean over all sizes." in report
    assert "All trained in one process" in report
    assert "BatchNorm" not in report.replace("SyncBatchNorm", "")
    for word in "image", "error", "CNN":
        assert word not in report, word


@pytest.fixture
def plt():
    mpl = pytest.importorskip("matplotlib")
    mpl.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


ERRORS = [[1.3, 1.3, 1.25], [2.4, 2.5, 2.6], [0.1, 0.1, 0.1], [1, 10, 30]]


@pytest.mark.parametrize("errors", ERRORS, ids=str)
def test_the_error_figure_of_one_size_is_narrow_and_has_labels(plt, errors):
    by_norm = {norm: [error] for norm, error in zip(("bn", "sync_bn", "gn"), errors, strict=True)}
    figure = contrast_figures.draw_error(plt, cells(by_norm, sizes=(8,)))
    figure.canvas.draw()
    (axis,) = figure.axes
    points = [container.lines[0].get_xydata()[0] for container in axis.containers]
    across = [axis.transAxes.inverted().transform(axis.transData.transform(point))[0] for point in points]
    assert all(0.4 < place < 0.6 for place in across), across
    low, high = axis.get_ylim()
    shown = [label.get_text() for label, y in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True)]
    assert sum(low <= y <= high for y in axis.get_yticks()) >= 2, shown
    assert all(shown)


def test_the_figure_of_a_transformer_of_one_size_has_labels_of_time(plt):
    made_up = cells(bits={norm: [2] for norm in ("ln", "rms", "sync_bn")}, sizes=(8,))
    axis = contrast_figures.draw_transformer(plt, made_up).axes[0]
    low, high = axis.get_xlim()
    assert sum(low <= x <= high for x in axis.get_xticks()) >= 2


def test_a_figure_drawn_again_has_the_same_bytes(plt, tmp_path):
    """So a report that is written again from the same numbers differs in nothing."""
    written = []
    for name in "first", "second":
        (tmp_path / name).mkdir()
        figures.draw(tmp_path / name / "1.5-error", contrast_figures.draw_error, cells(WU_AND_HE))
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0].keys() == {"1.5-error.png", "1.5-error.svg"}
    assert written[0] == written[1]


def test_curves_of_other_things_than_norms_have_names_and_styles_of_their_own(plt):
    axis = plt.figure().add_subplot()
    names, styles = {"sent": "bytes sent"}, {"sent": ("#123456", "P")}
    figures.curve(axis, "sent", [1, 2], [Value((1.0, 2.0)), Value((3.0, 3.0))], styles)
    figures.label_ends(axis, {"sent": (2, 3)}, 0.1, names, styles)
    figures.sizes_axis(axis, [1, 2], "ranks (number)")
    line = axis.containers[0].lines[0]
    assert (line.get_color(), line.get_marker(), axis.get_xlabel()) == ("#123456", "P", "ranks (number)")
    (label,) = axis.texts
    assert (label.get_text(), label.get_color()) == ("bytes sent", figures.ink("#123456"))


def test_one_rank_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["contrast.py", "--ranks", "1"])
    with pytest.raises(SystemExit, match="2"):
        contrast_example.arguments()
    assert "expected at least 2 --ranks" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_the_trainings(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(sys, "argv", ["contrast.py", "--out", str(tmp_path / "taken" / "report")])
    with pytest.raises(SystemExit, match="1"):
        contrast_example.main()
    report = tmp_path / "taken" / "report" / "report.md"
    assert capsys.readouterr().err == f"--out: cannot write {report}: Not a directory\n"


@pytest.mark.parametrize("content", ["", '{"arguments": ', "[]", "null", '{"loss": []}', "\udcff"])
def test_a_broken_record_is_none(content, directory, tmp_path, monkeypatch):
    """Its run is run again."""
    monkeypatch.setattr(sys, "argv", ["contrast.py", *map(str, TINY)])
    runs = contrast_example.matrix(contrast_example.arguments())
    shutil.copytree(directory / "records", tmp_path / "records")
    assert contrast_example.read(tmp_path, runs).keys() == set(runs)
    (tmp_path / runs[0].path).write_text(content, errors="surrogateescape")
    assert contrast_example.read(tmp_path, runs).keys() == set(runs[1:])


def test_another_number_of_ranks_is_refused(tmp_path):
    job = launch("torchrun", 2, CONTRAST, "--ranks", 4, "--out", tmp_path, timeout=60)
    assert job.returncode != 0
    assert "expected 4 ranks, got 2" in job.stderr
