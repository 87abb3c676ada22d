"""The examples, run for real: the training does not depend on the launcher or the number of ranks."""

import json
import re
from pathlib import Path

import pytest
import torch
from launchers import Jobs, launch

CNN = Path(__file__).parent.parent / "examples" / "cnn.py"
UNEVEN = CNN.parent / "uneven.py"
STEPS = 8
BACKENDS = {"alone": "alone", "torchrun": "nccl" if torch.cuda.device_count() >= 4 else "gloo", "mpirun": "mpi4py"}
BATCHES = {2: (5, 2), 4: (4, 0, 3, 1)}  # of each shard


def cnn(ranks, norm="sync_bn", seed=0, dtype="float64", steps=STEPS, checkpoint=None):
    """Return the command of a training with a global batch of 8."""
    options = {"--norm": norm, "--batch-per-rank": 8 // ranks, "--steps": steps, "--seed": seed, "--dtype": dtype}
    if checkpoint is not None:
        options |= {"--checkpoint": checkpoint, "--checkpoint-every": 2}
    return [CNN, *[word for option in options.items() for word in option]]


def uneven(shards, norm="sync_bn"):
    """Return the command of a training on shards of unequal length."""
    return [UNEVEN, "--norm", norm, "--dtype", "float64", "--batches", *BATCHES[shards]]


def trainings(ranks):
    """Return those that jobs of any launcher run."""
    some = {"sync_bn": cnn(ranks)} | {f"{n} shards": uneven(n) for n in BATCHES if ranks in (1, n)}
    if ranks < 4:
        some |= {"bn": cnn(ranks, "bn"), "5 steps": cnn(ranks, steps=5, checkpoint=Jobs.CHECKPOINT)}
    return some


OF_ALONE_AND_TORCHRUN = {
    ranks: {
        "float32": cnn(ranks, dtype="float32"),
        "2 shards, bn": uneven(2, "bn"),
        "4 steps": cnn(ranks, steps=4, checkpoint=Jobs.CHECKPOINT),
    }
    for ranks in (1, 2)
}
LAUNCHES = [("torchrun", 2), ("torchrun", 4), ("mpirun", 2), ("mpirun", 4)]
PLAN = {(launcher, ranks): trainings(ranks) for launcher, ranks in LAUNCHES}
PLAN["alone", 1] = trainings(1) | OF_ALONE_AND_TORCHRUN[1] | {"seed 1": cnn(1, seed=1)}
PLAN["torchrun", 2] |= OF_ALONE_AND_TORCHRUN[2]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("cnn"), PLAN)


@pytest.fixture(scope="module")
def train(jobs):
    """Return the losses of a training of the plan."""

    def run(name, launcher, ranks):
        return torch.tensor(jobs.record(launcher, ranks, name)["loss"], dtype=torch.float64)

    return run


@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), *LAUNCHES])
def test_cnn_says_what_it_does(jobs, launcher, ranks):
    job = jobs.run(launcher, ranks)
    of_cnn = [name for name, (script, *_) in PLAN[launcher, ranks].items() if script is CNN]
    assert all(f" -> {jobs.files(launcher, ranks, name)[0]}\n" in job.stdout for name in of_cnn)
    assert job.stderr.count(f", {ranks} x {8 // ranks} samples") == len(of_cnn)


@pytest.mark.parametrize(("launcher", "ranks"), LAUNCHES)
def test_cnn_losses_are_those_of_one_process(train, launcher, ranks):
    expected = train("sync_bn", "alone", 1)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(train("sync_bn", launcher, ranks), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_cnn_losses_with_plain_batch_norm_are_not(train, launcher):
    """The negative control."""
    assert (train("bn", launcher, 2) - train("bn", "alone", 1)).abs().max() > 1e-2


def test_cnn_in_float32_agrees_to_its_rounding(train, jobs):
    difference = (train("float32", "torchrun", 2) - train("float32", "alone", 1)).abs().max()
    assert 1e-12 < difference < 1e-5  # so the other trainings really were in float64
    of_dtypes = [jobs.record("torchrun", 2, name)["dtype"] for name in ("float32", "sync_bn")]
    assert of_dtypes == ["float32", "float64"]


def test_cnn_seeds_differ(train):
    assert not torch.equal(train("seed 1", "alone", 1), train("sync_bn", "alone", 1))


@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), *LAUNCHES])
def test_cnn_record(jobs, launcher, ranks):
    record = jobs.record(launcher, ranks, "sync_bn")
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


def resume(jobs, steps, launcher, ranks, folder, *options, of=None):
    """Go on in a new job from the checkpoint after `steps` steps, of another job if need be.

    Return the job, and its record if it has written one.
    """
    checkpoint, out = folder / "checkpoint", folder / "record.json"
    if steps:
        jobs.copy_checkpoint(*of or (launcher, ranks), f"{steps} steps", checkpoint)
    words = [*cnn(ranks, checkpoint=checkpoint), "--out", out, "--resume", *options]
    job = launch(launcher, ranks, *words, NO_COLOR="1")
    return job, json.loads(out.read_text()) if out.exists() else None


@pytest.mark.parametrize(("launcher", "ranks"), [("alone", 1), ("torchrun", 2), ("mpirun", 2)])
def test_cnn_resumes_to_the_same_losses(jobs, launcher, ranks, tmp_path):
    _, resumed = resume(jobs, 5, launcher, ranks, tmp_path)
    assert resumed["resumed_at_step"] == 5
    assert resumed["loss"] == jobs.record(launcher, ranks, "sync_bn")["loss"]  # bit for bit
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "record.json"]


def test_cnn_resumes_on_another_number_of_ranks(train, jobs, tmp_path):
    _, resumed = resume(jobs, 4, "alone", 1, tmp_path, of=("torchrun", 2))
    losses = torch.tensor(resumed["loss"], dtype=torch.float64)
    torch.testing.assert_close(losses, train("sync_bn", "alone", 1), rtol=0, atol=1e-12)


def test_cnn_starts_anew_where_there_is_no_checkpoint(jobs, tmp_path):
    _, record = resume(jobs, 0, "alone", 1, tmp_path)
    assert record["resumed_at_step"] == 0
    assert record["loss"] == jobs.record("alone", 1, "sync_bn")["loss"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--seed", 1], "'seed': 0"),
        (["--steps", 4], "expected a checkpoint of less than 4 steps, got one of 4"),
    ],
)
def test_cnn_refuses_a_checkpoint_that_does_not_fit(jobs, options, text, tmp_path):
    job, record = resume(jobs, 4, "alone", 1, tmp_path, *options)
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


@pytest.mark.parametrize(("launcher", "ranks"), LAUNCHES)
def test_cnn_on_shards_of_unequal_length_has_the_losses_of_one_process(jobs, train, launcher, ranks):
    expected = train(f"{ranks} shards", "alone", 1)
    assert len(expected) == max(BATCHES[ranks])
    torch.testing.assert_close(train(f"{ranks} shards", launcher, ranks), expected, rtol=0, atol=1e-12)
    assert jobs.record(launcher, ranks, f"{ranks} shards")["ranks"] == ranks
    assert f"step {len(expected) - 1}: loss " in jobs.run(launcher, ranks).stdout


def test_cnn_on_shards_of_unequal_length_with_plain_batch_norm_has_not(train):
    """The negative control. Torch's own join would let the ranks of such a model train on."""
    difference = train("2 shards, bn", "torchrun", 2) - train("2 shards, bn", "alone", 1)
    assert difference.abs().max() > 1e-2


def test_cnn_on_shards_needs_a_rank_for_each():
    job = launch("torchrun", 2, UNEVEN, "--batches", 3, 2, 1)
    assert job.returncode != 0
    assert "--batches: expected 1 rank, or as many as shards (3), got 2" in job.stderr
