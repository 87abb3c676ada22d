"""`verify` and `assert_matches_whole_batch`: models that are right pass, the place of each planted fault is found."""

import json
import os
import re
import sys
from pathlib import Path

import planted
import pytest
import torch
from processes import run

from syncnorm.testing import RankError, assert_matches_whole_batch, verify
from syncnorm.testing.whole_batch import random_batches
from syncnorm.testing.whole_batch.training import Plan, shards

HELPERS = Path(planted.__file__).parent

BATCHES = random_batches((3, 10, 10), 12, 3)
HELPERS = Path(__file__).parent / "helpers"


def tokens():
    """Batches of tokens and of their masks."""
    integers = random_batches((12,), 8, 2, integers=256)
    lengths = torch.arange(5, 13)
    return [(batch, torch.arange(12) < lengths[:, None]) for batch in integers]


@pytest.mark.parametrize(
    ("backend", "world_sizes", "splits"),
    [("gloo", [2, 3], ["even", "random", "empty"]), pytest.param("mpi", [2], ["random"], id="mpirun")],
)
@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (planted.sound, BATCHES),
        (planted.example_cnn, BATCHES),
        (planted.example_transformer, tokens()),
    ],
)
def test_models_that_are_right_pass(model, batches, backend, world_sizes, splits):
    report = verify(model, batches, world_sizes, splits=splits, backend=backend)
    assert report.passed, report.summary()
    assert len(report.runs) == 2 * len(world_sizes) * len(splits)
    assert all(0 < training.largest < 0.1 for training in report.runs)  # the tolerance is no narrow one
    assert report.summary().endswith(f"trains on several ranks as one process does on the whole batch ({backend}).")
    compared = [set(quantities) for _, _, quantities in report.layers()]
    assert {"activations", "gradients"} in compared
    assert {"activations", "statistics", "gradients"} in compared


FAULTS = {  # the layer, what departs, why, and whether the model is converted
    "sound": ("1", "activations", r"by the statistics of rank 0's shard alone.*convert_sync_batchnorm", False),
    "one_left": ("4", "activations", r"Layer 4 \(BatchNorm2d\) normalizes by .* rank 0's shard alone", False),
    "in_a_group_of_one": ("4", "activations", r"If it is converted, its process group has only this rank", False),
    "built_by_rank": ("0", "initial values", r"Rank 1 starts with another value of 0.weight", True),
    "other_momentum": ("4", "statistics", r"running_mean moves as with a momentum of 0.9, .* has one of 0.1", False),
    "local_variance": ("4", "statistics", r"of rank 0 is that of its own shard", False),
    "averaged": ("1", "statistics", r"1.running_var is updated with the biased variance", False),
    "forward_alone": (
        "3",
        "gradients",
        r"The forward pass of layer 3 .* agrees, the gradient of 3.weight does not",
        False,
    ),
    "random_layer": ("8", "activations", r"Layer 8 \(FunctionalDropout\) is random", True),
    "functional_batch_norm": (
        "1",
        "activations",
        r"Layer 1 \(Standardized\) computes a sample's output from other",
        True,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_place_of_a_fault_is_found(fault):
    layer, quantity, why, convert = FAULTS[fault]
    report = verify(getattr(planted, fault), BATCHES, [2], convert=convert, dtypes=[torch.float64])
    assert not report.passed
    (training,) = report.runs
    found = training.departure
    assert (found.layer, found.quantity, found.step) == (layer, quantity, 0), training.reason
    assert re.search(why, training.reason, re.DOTALL), training.reason
    assert f"The first difference is in the {quantity} of layer {layer}, step 0" in report.summary()


def test_the_recipe_of_equal_weights_departs_where_shards_are_unequal():
    report = verify(planted.averaged, BATCHES, [2], splits=["random"], convert=False)
    assert report.runs[0].departure.quantity == "activations"
    assert "the ranks have to be weighted by these counts" in report.summary()


def test_the_report_says_how_to_repeat_it(capsys):
    report = verify(planted.averaged, BATCHES, [2], splits=["random"], convert=False, dtypes=[torch.float32], seed=3)
    plan = Plan(planted.averaged, tuple(BATCHES), 0.05, 3)
    samples = [[end - begin for begin, end in of_ranks] for of_ranks in zip(*shards(plan, 2, "random"), strict=True)]
    said = ", ".join(f"{one}+{other}" for one, other in samples)
    assert len(samples) == 3
    assert report.summary().endswith(f"\nSeed 3. Samples of the ranks in each step: {said}.")
    assert (report.json()["seed"], report.json()["runs"][0]["samples"]) == (3, samples)
    report.show()
    table = capsys.readouterr().out
    assert "trainings, seed 3" in table
    assert said in table


def test_the_only_rank_has_the_samples_of_the_empty_one():
    report = verify(planted.sound, BATCHES, [1], splits=["empty"], dtypes=[torch.float64])
    assert report.passed, report.summary()
    assert report.runs[0].samples == [[12]] * 3
    assert {"activations", "statistics", "gradients"} <= {name for _, _, units in report.layers() for name in units}
    assert report.runs[0].largest < 0.1


def test_the_recipe_of_squares_departs_where_the_mean_is_large():
    """In float32 alone. The converted model passes."""
    double, single = verify(planted.shifted, BATCHES, [2], convert=False).runs
    assert "updated with the biased variance" in double.reason
    assert (single.departure.layer, single.departure.quantity) == ("1", "activations")
    assert "E[x^2] and E[x]^2 cancels" in single.reason


def test_a_layer_that_a_rank_skips_is_named():
    report = verify(planted.skipped_on_a_rank, BATCHES, [2])
    assert "Rank 1 of 2 failed" in report.summary()
    assert "expected this rank to call 4 as often as one process does" in report.summary()
    assert len(report.runs) == 1  # the others would wait, too


def test_ranks_that_wait_for_ever_are_ended_and_shown():
    report = verify(planted.waiting_for_ever, BATCHES[:1], [2], timeout=12)
    assert "still running after 12 s" in report.summary()
    assert "planted.py" in report.summary(), report.summary()


def test_the_assertion_says_what_departs():
    assert_matches_whole_batch(planted.sound, BATCHES[0], 2, dtypes=[torch.float64])
    with pytest.raises(AssertionError, match=r"(?s)one_left departs .*activations of layer 4, step 0, rank"):
        assert_matches_whole_batch(planted.one_left, BATCHES[0], 2, convert=False)


@pytest.mark.parametrize(
    ("model", "batch", "options", "message"),
    [
        (
            planted.sound,
            (torch.zeros(3, 1), torch.zeros(2)),
            {},
            r"the same number of samples in a batch, got \[2, 3\]",
        ),
        (planted.sound, BATCHES, {"splits": ["odd"]}, r"expected a split of even, random, empty, got 'odd'"),
        ("planted", BATCHES, {}, r'expected "MODULE:FUNCTION", got \'planted\''),
        ("planted:soud", BATCHES, {}, r"expected a function of planted, got 'soud'; the nearest names are sound\b"),
        (
            f"{HELPERS}/plantd.py:sound",
            BATCHES,
            {},
            r"expected a file, .*/plantd\.py; the nearest names are planted\.py",
        ),
        (planted.no_module, BATCHES, {}, r"expected a function that returns a torch.nn.Module, got list"),
        (planted.lazy, BATCHES, {}, r"expected a model with initialized parameters, got lazy ones"),
        (planted.no_gradient, BATCHES, {}, r"expected a model with a tensor that requires a gradient in its output"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(model, batch, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        verify(model, batch, [2], **options)


@pytest.mark.parametrize("split", ["even", "random", "empty"])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_shards_are_a_partition_of_the_batch(split, world_size):
    plan = Plan(planted.sound, tuple(torch.zeros(7, 1) for _ in range(6)), 0.1, 3)
    for step, of_ranks in enumerate(zip(*shards(plan, world_size, split), strict=True)):
        assert [i for begin, end in of_ranks for i in range(begin, end)] == [*range(7)]
        sizes = [end - begin for begin, end in of_ranks]
        if split == "even":
            assert max(sizes) - min(sizes) <= 1
        if split == "empty" and world_size > 1:
            assert sizes[step % world_size] == 0


def verify_by_command(*arguments, **options):
    return run(sys.executable, "-m", "syncnorm", "verify", *arguments, timeout=110, **options)


def test_the_command(tmp_path):
    found, drawn = tmp_path / "found.json", tmp_path / "drawn.png"
    model = f"{HELPERS / 'planted.py'}:sound"
    arguments = ["--input-shape", "3,8,8", "--batch", "6", "--steps", "2"]
    job = verify_by_command(model, *arguments, "--ranks", "2,3", "--json", found, "--figure", drawn, cwd=tmp_path)
    assert job.returncode == 0, job.stdout
    assert "trains on several ranks as one process does" in job.stdout
    assert job.stdout.count("passed") == 4
    report = json.loads(found.read_text())
    assert report["passed"]
    assert [(run["ranks"], run["dtype"]) for run in report["runs"]] == [
        (ranks, f"torch.float{bits}") for ranks in (2, 3) for bits in (64, 32)
    ]
    assert {layer["layer"] for layer in report["runs"][0]["layers"]} >= {"0", "1", "4", "9"}
    assert drawn.stat().st_size > 10_000
    job = verify_by_command(model, *arguments, "--no-convert", "--seed", "5", "--json", found, cwd=tmp_path)
    assert job.returncode == 1
    assert "DEPARTS" in job.stdout
    assert not json.loads(found.read_text())["passed"]
    assert json.loads(found.read_text())["seed"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["planted:nothing", "--input-shape", "3,8,8"], "verify cannot train the model: ValueError"),
        (["planted:sound", "--input-shape", "1,8,8"], "verify cannot train the model: RuntimeError"),
        (
            ["planted:sound", "--input-shape", "3,8,8", "--json", "nowhere/found.json"],
            "expected a file that can be written",
        ),
        (["planted:sound", "--input-shape", "3x8"], "expected positive integers with commas between them, got 3x8"),
        (["planted:sound", "--input-shape", "3,8,8", "--splits", "odd"], "expected even, random, empty, with commas"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    job = verify_by_command(*arguments, cwd=HELPERS)
    assert job.returncode == 2
    assert message in job.stdout
    assert job.stdout.count("Traceback") <= 1


def test_the_command_under_a_launcher(tmp_path):
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    job = verify_by_command("planted:sound", "--input-shape", "3,8,8", cwd=tmp_path, env=os.environ | launcher)
    assert job.returncode == 1
    assert "expected verify to be started alone" in job.stdout


def test_an_error_of_the_model_comes_from_one_process():
    with pytest.raises(RuntimeError) as caught:
        verify(planted.sound, torch.zeros(4, 2, 8, 8), [2])
    assert isinstance(caught.value.__cause__, RankError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT TESTED: there is a CUDA device")
def test_a_backend_without_its_device_is_an_error_not_a_departure():
    with pytest.raises(RuntimeError, match='expected a CUDA device for backend="nccl", found none'):
        verify(planted.sound, torch.zeros(4, 3, 8, 8), [2], backend="nccl")
