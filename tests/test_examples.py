"""The examples, run for real: the training does not depend on the launcher or the number of ranks."""

import json
import re
from pathlib import Path

import pytest
import torch
from launchers import launch

CNN = Path(__file__).parent.parent / "examples" / "cnn.py"
STEPS = 8
BACKENDS = {"alone": "alone", "torchrun": "nccl" if torch.cuda.device_count() >= 4 else "gloo", "mpirun": "mpi4py"}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Return the record of a training, run once for each set of arguments."""
    records = {}

    def run(norm, launcher, ranks, seed=0, dtype="float64"):
        key = norm, launcher, ranks, seed, dtype
        if key not in records:
            path = tmp_path_factory.mktemp("cnn") / "record.json"
            options = {"--norm": norm, "--batch-per-rank": 8 // ranks, "--steps": STEPS, "--seed": seed, "--out": path}
            options["--dtype"] = dtype
            job = launch(launcher, ranks, CNN, *[word for option in options.items() for word in option], NO_COLOR="1")
            assert job.returncode == 0, job.stderr
            records[key] = json.loads(path.read_text())
            assert str(path) in job.stdout
            assert f"{norm}, {ranks} x {8 // ranks} samples" in job.stderr
        return records[key]

    return run


LAUNCHES = [("torchrun", 2), ("torchrun", 4), ("mpirun", 2), ("mpirun", 4)]


def losses(record):
    return torch.tensor(record["loss"], dtype=torch.float64)


@pytest.mark.parametrize(("launcher", "ranks"), LAUNCHES)
def test_cnn_losses_are_those_of_one_process(train, launcher, ranks):
    expected = losses(train("sync_bn", "alone", 1))
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses(train("sync_bn", launcher, ranks)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_cnn_losses_with_plain_batch_norm_are_not(train, launcher):
    """The negative control."""
    assert (losses(train("bn", launcher, 2)) - losses(train("bn", "alone", 1))).abs().max() > 1e-2


def test_cnn_in_float32_agrees_to_its_rounding(train):
    one, two = (train("sync_bn", *who, dtype="float32") for who in (("alone", 1), ("torchrun", 2)))
    difference = (losses(two) - losses(one)).abs().max()
    assert 1e-12 < difference < 1e-5  # so the other trainings really were in float64
    assert [two["dtype"], train("sync_bn", "torchrun", 2)["dtype"]] == ["float32", "float64"]


def test_cnn_seeds_differ(train):
    assert not torch.equal(losses(train("sync_bn", "alone", 1, seed=1)), losses(train("sync_bn", "alone", 1)))


@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), *LAUNCHES])
def test_cnn_record(train, launcher, ranks):
    record = train("sync_bn", launcher, ranks)
    assert (record["backend"], record["ranks"], record["batch_per_rank"]) == (BACKENDS[launcher], ranks, 8 // ranks)
    assert len(record["loss"]) == STEPS
    assert 0 <= record["test_accuracy"] <= 1
    assert record["samples_per_second"] > 0
    channels = [16, 16, 16, 32, 32, 32, 64, 64, 64]
    alone = ranks == 1
    assert record["per_step"]["norm"] == {
        "collectives": 0 if alone else 2 * len(channels),
        "bytes": 0 if alone else sum(8 * (2 * c + 3) + 8 * (2 * c + 2) for c in channels),
    }
    assert (record["per_step"]["gradients"]["collectives"] > 0) == (not alone)


def train_with_checkpoint(launcher, ranks, directory, steps, *options):
    """Return the job that trains with a checkpoint in the directory, and its record."""
    record = directory / "record.json"
    record.unlink(missing_ok=True)
    options = ["--checkpoint", directory / "checkpoint", "--checkpoint-every", 2, "--dtype", "float64", *options]
    options += ["--out", record]
    job = launch(launcher, ranks, CNN, "--batch-per-rank", 8 // ranks, "--steps", steps, *options, NO_COLOR="1")
    return job, json.loads(record.read_text()) if record.exists() else None


@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), ("torchrun", 2), ("mpirun", 2)])
def test_cnn_resumes_to_the_same_losses(train, launcher, ranks, tmp_path):
    train_with_checkpoint(launcher, ranks, tmp_path, 5)
    _, resumed = train_with_checkpoint(launcher, ranks, tmp_path, STEPS, "--resume")
    assert resumed["resumed_at_step"] == 5
    assert resumed["loss"] == train("sync_bn", launcher, ranks)["loss"]  # bit for bit
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "record.json"]


def test_cnn_resumes_on_another_number_of_ranks(train, tmp_path):
    train_with_checkpoint("torchrun", 2, tmp_path, 4)
    _, resumed = train_with_checkpoint("alone", 1, tmp_path, STEPS, "--resume")
    torch.testing.assert_close(losses(resumed), losses(train("sync_bn", "alone", 1)), rtol=0, atol=1e-12)


def test_cnn_starts_anew_where_there_is_no_checkpoint(train, tmp_path):
    _, record = train_with_checkpoint("alone", 1, tmp_path, STEPS, "--resume")
    assert record["resumed_at_step"] == 0
    assert record["loss"] == train("sync_bn", "alone", 1)["loss"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--seed", 1, "--resume"], "'seed': 0"),
        (["--resume"], "expected a checkpoint of less than 4 steps, got one of 4"),
    ],
)
def test_cnn_refuses_a_checkpoint_that_does_not_fit(options, text, tmp_path):
    train_with_checkpoint("alone", 1, tmp_path, 4)
    job, record = train_with_checkpoint("alone", 1, tmp_path, 4, *options)
    assert job.returncode != 0
    assert text in job.stderr
    assert record is None


def test_cnn_resume_needs_a_checkpoint():
    job = launch("alone", 1, CNN, "--resume")
    assert job.returncode == 2
    assert "--resume needs --checkpoint FILE" in job.stderr


@pytest.fixture(scope="module")
def minimal_losses():
    """Return the losses that each rank of a minimal example printed, run once for each script, launcher and size."""
    jobs = {}

    def run(script, launcher, ranks):
        if (script, launcher, ranks) not in jobs:
            jobs[script, launcher, ranks] = launch(launcher, ranks, script)
        job = jobs[script, launcher, ranks]
        assert job.returncode == 0, job.stderr
        assert job.stderr == ""
        losses = [  # two ranks may print on one line
            [float(loss) for loss in re.findall(rf"rank {rank} of {ranks}: step \d, loss (\d\.\d{{6}})", job.stdout)]
            for rank in range(ranks)
        ]
        assert len(losses[0]) == 5
        return losses

    return run


@pytest.mark.parametrize(
    ("name", "launcher"), [("minimal_ddp", "torchrun"), ("minimal_ddp", "mpirun"), ("minimal_mpi", "mpirun")]
)
def test_minimal_examples_have_the_losses_of_one_process(minimal_losses, name, launcher):
    script = CNN.parent / f"{name}.py"
    [expected] = minimal_losses(script, "alone", 1)
    assert expected[-1] < expected[0] / 2
    for losses in minimal_losses(script, launcher, 2):
        assert losses == pytest.approx(expected, abs=1e-5)


def test_a_minimal_example_with_plain_batch_norm_has_not(minimal_losses, tmp_path):
    """The negative control."""
    script = CNN.parent / "minimal_mpi.py"
    plain = tmp_path / "plain.py"
    plain.write_text(script.read_text().replace("syncnorm.SyncBatchNorm", "torch.nn.BatchNorm2d"))
    [expected] = minimal_losses(script, "alone", 1)
    for losses in minimal_losses(plain, "mpirun", 2):
        assert abs(losses[0] - expected[0]) > 1e-3


UNEVEN = CNN.parent / "uneven.py"
BATCHES = {2: (5, 2), 4: (4, 0, 3, 1)}  # of each shard


@pytest.fixture(scope="module")
def train_unevenly(tmp_path_factory):
    """Return the losses of a training on shards of unequal length, run once for each set of arguments."""
    known = {}

    def run(norm, launcher, ranks, shards):
        key = norm, launcher, ranks, shards
        if key not in known:
            path = tmp_path_factory.mktemp("uneven") / "record.json"
            options = ["--norm", norm, "--dtype", "float64", "--out", path, "--batches", *BATCHES[shards]]
            job = launch(launcher, ranks, UNEVEN, *options, NO_COLOR="1")
            assert job.returncode == 0, job.stderr
            record = json.loads(path.read_text())
            assert record["ranks"] == ranks
            assert f"step {len(record['loss']) - 1}: loss " in job.stdout
            known[key] = losses(record)
        return known[key]

    return run


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 2), ("torchrun", 4), ("mpirun", 2), ("mpirun", 4)])
def test_cnn_on_shards_of_unequal_length_has_the_losses_of_one_process(train_unevenly, launcher, ranks):
    expected = train_unevenly("sync_bn", "alone", 1, ranks)
    assert len(expected) == max(BATCHES[ranks])
    torch.testing.assert_close(train_unevenly("sync_bn", launcher, ranks, ranks), expected, rtol=0, atol=1e-12)


def test_cnn_on_shards_of_unequal_length_with_plain_batch_norm_has_not(train_unevenly):
    """The negative control. Torch's own join would let the ranks of such a model train on."""
    difference = train_unevenly("bn", "torchrun", 2, 2) - train_unevenly("bn", "alone", 1, 2)
    assert difference.abs().max() > 1e-2


def test_cnn_on_shards_needs_a_rank_for_each():
    job = launch("torchrun", 2, UNEVEN, "--batches", 3, 2, 1)
    assert job.returncode != 0
    assert "--batches: expected 1 rank, or as many as shards (3), got 2" in job.stderr
