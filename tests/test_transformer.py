"""examples/transformer.py, run for real: the training does not depend on how the global batch is split over ranks."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from launchers import Jobs, launch

TRANSFORMER = Path(__file__).parent.parent / "examples" / "transformer.py"
STEPS = 8
BACKENDS = {"alone": "alone", "torchrun": "nccl" if torch.cuda.device_count() >= 4 else "gloo", "mpirun": "mpi4py"}
GLOBAL_BATCH = 8
WIDTH, CONTEXT, NORMS = 32, 32, 3  # of one layer: before attention, before the MLP, at the end
SMALL = ["--layers", 1, "--width", WIDTH, "--heads", 2, "--context", CONTEXT, "--sample", 20]
TOLERANCE = 1e-5  # nats; float32 rounding made 1e-6 in 20 steps


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Return a file of paragraphs of 1 to 90 characters, some of two bytes."""
    generator = torch.Generator().manual_seed(0)
    words = ["norm", "batch", "rank", "größe", "of", "the", "a", "sum"]
    paragraphs = [
        f"{i} " + " ".join(words[j] for j in torch.randint(8, (1 + i % 15,), generator=generator)) for i in range(300)
    ]
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def command(text, norm, ranks, steps=STEPS):
    batch = ["--batch-per-rank", GLOBAL_BATCH // ranks, "--steps", steps]
    return [TRANSFORMER, "--norm", norm, "--data", text, *batch, *SMALL]


LAUNCHES = [
    ("sync_bn", "torchrun", 2),
    ("sync_bn", "torchrun", 4),
    ("sync_bn", "mpirun", 2),
    ("sync_bn", "mpirun", 4),
    ("ln", "torchrun", 4),
    ("rms", "mpirun", 2),
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, text):
    trainings = [(norm, "alone", 1) for norm in ("sync_bn", "bn", "ln", "rms")] + LAUNCHES + [("bn", "torchrun", 2)]
    plan = {}
    for norm, *job in trainings:
        plan.setdefault(tuple(job), {})[norm] = command(text, norm, job[1])
    checkpoint = ["--checkpoint", Jobs.CHECKPOINT, "--checkpoint-every", 2]
    for job, steps in ((("torchrun", 2), 5), (("mpirun", 2), 5), (("alone", 1), 4)):
        plan[job][f"{steps} steps"] = [*command(text, "sync_bn", job[1], steps), *checkpoint]
    return Jobs(tmp_path_factory.mktemp("transformer"), plan)


@pytest.fixture(scope="module")
def train(jobs):
    """Return the record of a training of the plan."""

    def run(norm, launcher, ranks):
        record = jobs.record(launcher, ranks, norm)
        job = jobs.run(launcher, ranks)
        assert f"-> {jobs.files(launcher, ranks, norm)[0]}\n\nThe value of " in job.stdout
        assert f"{norm}, {ranks} x {GLOBAL_BATCH // ranks} samples" in job.stderr
        return record

    return run


def losses(record):
    return torch.tensor(record["loss"], dtype=torch.float64)


@pytest.mark.parametrize(("norm", "launcher", "ranks"), LAUNCHES)
def test_losses_are_those_of_one_process(train, norm, launcher, ranks):
    expected, got = train(norm, "alone", 1), train(norm, launcher, ranks)
    assert losses(expected)[-1] < losses(expected)[0]
    torch.testing.assert_close(losses(got), losses(expected), rtol=0, atol=TOLERANCE)
    for bits in ("valid_bits_per_character", "valid_bits_per_character_in_train_mode"):
        assert abs(got[bits] - expected[bits]) < TOLERANCE


def test_losses_with_the_statistics_of_each_rank_are_not(train):
    """The negative control."""
    difference = (losses(train("bn", "torchrun", 2)) - losses(train("bn", "alone", 1))).abs()
    assert difference.max() > 1000 * TOLERANCE


@pytest.mark.parametrize(("norm", "launcher", "ranks"), [("sync_bn", "alone", 1), *LAUNCHES[2:]])
def test_record(train, norm, launcher, ranks):
    record = train(norm, launcher, ranks)
    assert (record["norm"], record["backend"], record["ranks"]) == (norm, BACKENDS[launcher], ranks)
    assert (record["batch_per_rank"], record["steps"], record["resumed_at_step"]) == (GLOBAL_BATCH // ranks, STEPS, 0)
    assert len(record["loss"]) == STEPS
    weights = (256 + CONTEXT + 4 * WIDTH + 8 * WIDTH + 256) * WIDTH
    assert record["parameters"] == weights + NORMS * WIDTH * (1 if norm == "rms" else 2)
    assert record["samples_per_second"] * record["seconds_per_step"] == pytest.approx(GLOBAL_BATCH)
    assert 1 < record["tokens_per_second"] / record["samples_per_second"] < CONTEXT
    alone = ranks == 1
    silent = alone or norm != "sync_bn"
    assert record["per_step"]["norm"] == {
        "collectives": 0 if silent else 2 * NORMS,
        "bytes": 0 if silent else NORMS * (8 * (2 * WIDTH + 3) + 8 * (2 * WIDTH + 2)),
    }
    assert record["per_step"]["gradients"]["bytes"] == (0 if alone else 4 * record["parameters"])


@pytest.mark.parametrize("norm", ["ln", "rms", "sync_bn"])
def test_gap_between_train_and_eval_mode(train, norm):
    record = train(norm, "alone", 1)
    bits = record["valid_bits_per_character"]
    assert 0 < bits < 8
    gap = abs(bits - record["valid_bits_per_character_in_train_mode"])
    assert gap > 1e-4 if norm == "sync_bn" else gap == 0


def resumed(jobs, text, launcher, ranks, folder, steps, of):
    """Go on in a new job from a copy of the checkpoint that another job has written after so many steps."""
    jobs.copy_checkpoint(*of, f"{steps} steps", folder / "checkpoint")
    options = ["--checkpoint", folder / "checkpoint", "--out", folder / "record.json", "--resume"]
    return launch(launcher, ranks, *command(text, "sync_bn", ranks), *options)


@pytest.mark.parametrize("job", [("torchrun", 2), ("mpirun", 2)], ids=["torchrun", "mpirun"])
def test_resumes_to_the_same_losses(train, jobs, text, job, tmp_path):
    ended = resumed(jobs, text, *job, tmp_path, 5, of=job)
    assert ended.returncode == 0, ended.stderr
    record, expected = json.loads((tmp_path / "record.json").read_text()), train("sync_bn", *job)
    assert record["resumed_at_step"] == 5
    for unchanged in ("loss", "valid_bits_per_character", "sample", "per_step"):
        assert record[unchanged] == expected[unchanged]  # bit for bit
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "record.json"]


def test_resumes_on_another_number_of_ranks(train, jobs, text, tmp_path):
    ended = resumed(jobs, text, "mpirun", 2, tmp_path, 4, of=("alone", 1))
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    torch.testing.assert_close(losses(record), losses(train("sync_bn", "alone", 1)), rtol=0, atol=TOLERANCE)


def test_does_not_resume_with_another_text(jobs, text, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(text.read_bytes() + b"\n\nmore")
    ended = resumed(jobs, other, "alone", 1, tmp_path, 4, of=("alone", 1))
    assert ended.returncode != 0
    assert "expected a checkpoint of" in ended.stderr
    assert "crc_of_text" in ended.stderr


def test_a_sample_of_no_bytes_is_not_printed(text, tmp_path):
    path = tmp_path / "record.json"
    job = launch("alone", 1, *command(text, "ln", 1, steps=1), "--sample", 0, "--out", path)
    assert job.stdout.endswith(f"-> {path}\n"), job.stdout


@pytest.fixture(scope="module")
def transformer():
    sys.path.insert(0, str(TRANSFORMER.parent))
    try:
        import transformer
    finally:
        sys.path.remove(str(TRANSFORMER.parent))
    return transformer


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--resume"], "--resume needs --checkpoint FILE"),
        (["--width", "30"], "expected a --width that --heads 4 divides, got 30"),
        (["--context", "3"], "expected a --context of at least 4, got 3"),
        (["--steps", "0"], "expected a positive number, got 0"),
    ],
)
def test_refuses_arguments(transformer, options, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["transformer.py", *options])
    with pytest.raises(SystemExit, match="2"):
        transformer.arguments()
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("file", [True, False])
def test_samples_hold_each_byte_once(transformer, text, file):
    paragraphs = transformer.paragraphs(text if file else None)
    assert len(set(paragraphs)) == len(paragraphs)
    samples = transformer.Samples(paragraphs, CONTEXT, "cpu")
    inputs, targets, mask = samples.batch(torch.arange(len(samples)))
    assert bytes(targets[mask].tolist()) == b"".join(paragraph + b"\n\n" for paragraph in paragraphs)
    assert samples.characters == len(bytes(targets[mask].tolist()).decode())
    assert (targets[~mask] == transformer.IGNORED).all()
    assert torch.equal(inputs[:, 1:][mask[:, 1:]], targets[:, :-1][mask[:, 1:]])
    lengths = mask.sum(1)
    assert torch.equal(lengths, samples.lengths)
    assert lengths.min() >= 2
    assert lengths.max() == CONTEXT


def test_a_text_of_few_paragraphs_is_refused(transformer, tmp_path):
    (tmp_path / "text").write_text("one\n\ntwo\n\n\none")
    with pytest.raises(ValueError, match=r"expected a text of at least 10 paragraphs .* got 2"):
        transformer.paragraphs(tmp_path / "text")


def model_of(transformer, norm):
    torch.manual_seed(0)
    model = transformer.Transformer(1, WIDTH, 2, CONTEXT, norm)
    tokens = torch.randint(256, (4, CONTEXT))
    mask = torch.arange(CONTEXT) < torch.tensor([[5], [32], [17], [2]])
    return model, tokens, mask


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm", "BatchNorm"])
def test_padding_has_no_part(transformer, norm):
    """Neither in the valid logits nor in the gradients."""
    model, tokens, mask = model_of(transformer, getattr(transformer, norm))
    results = []
    for filling in (0, 77):
        model.zero_grad()
        logits = model(tokens.masked_fill(~mask, filling), mask)
        transformer.nats(logits, tokens.masked_fill(~mask, transformer.IGNORED)).backward()
        results.append([logits[mask].detach(), *[parameter.grad.clone() for parameter in model.parameters()]])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("norm", "training"), [("LayerNorm", True), ("RMSNorm", True), ("BatchNorm", False)])
def test_is_causal(transformer, norm, training):
    model, tokens, _ = model_of(transformer, getattr(transformer, norm))
    model.train(training)
    changed = tokens.clone()
    changed[:, 20:] += 1
    with torch.no_grad():
        before, after = model(tokens, None), model(changed % 256, None)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 0.1


def test_batch_norm_over_time_sees_the_future(transformer):
    """What the example says of it, in training."""
    model, tokens, _ = model_of(transformer, transformer.BatchNorm)
    with torch.no_grad():
        before, after = model(tokens, None), model(tokens.index_fill(1, torch.arange(20, CONTEXT), 0), None)
    assert (before[:, :20] - after[:, :20]).abs().max() > 0.1


def test_loss_of_uniform_logits(transformer):
    targets = torch.tensor([[1, 2, transformer.IGNORED]])
    assert transformer.nats(torch.zeros(1, 3, 256), targets).item() == pytest.approx(2 * math.log(256))
