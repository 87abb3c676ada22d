"""examples/checkpoints.py: files that do not fit are refused in one line, on all ranks; what is written is whole."""

import copy
import json
import os
import re
import resource
import runpy
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from launchers import launch
from torch import nn

from syncnorm.communicators import LocalCommunicator

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import checkpoints
import common

EXAMPLES = Path(common.__file__).parent
TRAINING = {"norm": "bn", "lr": 0.1, "decay": None}
STEPS = 8
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
}


class Training:
    """A model, its optimizer and its losses after some steps."""

    def __init__(self, steps=0, optimizer="SGD", training=TRAINING):
        torch.manual_seed(steps)
        self.training = training
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.losses = torch.zeros(STEPS, dtype=torch.float64)
        for step in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(5, 3)).square().sum()
            loss.backward()
            self.optimizer.step()
            self.losses[step] = loss.detach()
        self.steps = steps

    def save(self, path):
        arguments = self.training, self.model, self.optimizer, self.losses[: self.steps], LocalCommunicator()
        checkpoints.save(path, *arguments)

    def load(self, path):
        return checkpoints.load(path, self.training, self.model, self.optimizer, self.losses, LocalCommunicator())

    def state(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict(), self.losses])


def one_line(capsys):
    """Return what was printed, which is one line."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_saved_is_loaded(optimizer, path):
    saved, loaded = Training(5, optimizer), Training(0, optimizer)
    saved.save(path)
    assert loaded.load(path) == 5
    torch.testing.assert_close(loaded.state(), saved.state(), rtol=0, atol=0)


def test_without_a_file_there_are_no_steps(path):
    fresh = Training()
    before = fresh.state()
    assert fresh.load(path) == 0
    torch.testing.assert_close(fresh.state(), before, rtol=0, atol=0)


def changed(change):
    """Return what writes a checkpoint with a change in it."""

    def make(path):
        Training(5).save(path)
        state = torch.load(path, weights_only=True)
        torch.save(change(state) or state, path)

    return make


def truncated(path):
    Training(5).save(path)
    os.truncate(path, path.stat().st_size // 2)


def put(*keys, value):
    """Return what changes an entry of a state."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return changed(change)


def nan(tensor):
    return tensor.index_fill(0, torch.tensor(0), float("nan"))


BUFFER = ("optimizer", "state", 0, "momentum_buffer")
UNREADABLE = "expected a checkpoint, got a file that is none or not whole: torch.load cannot read it"
FOREIGN = "expected a checkpoint of this example, got a"
STATES = "expected a checkpoint with the states of a model and an optimizer"
WEIGHT, MOMENTUM = "expected model.0.weight to be (4, 3) float32, got ", "optimizer.0.momentum_buffer"
BROKEN = {  # how a file is made, and what is said of it
    "truncated": (truncated, UNREADABLE),
    "empty": (lambda path: path.write_bytes(b""), UNREADABLE),
    "a text": (lambda path: path.write_text("a text\nof two lines\n"), UNREADABLE),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), UNREADABLE),
    "a pickled function": (lambda path: torch.save({"training": os.system}, path), UNREADABLE),
    "a whole model": (lambda path: torch.save(nn.Linear(3, 4), path), UNREADABLE),
    "a folder": (Path.mkdir, "expected a file, got a folder or device"),
    "a pipe": (os.mkfifo, "expected a file, got a folder or device"),
    "a state dict": (lambda path: torch.save(nn.Linear(3, 4).state_dict(), path), f"{FOREIGN} OrderedDict"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), f"{FOREIGN} Tensor"),
    "another training": (put("training", "lr", value=0.2), "of {'lr': 0.1}, got one of {'lr': 0.2}"),
    "tensors for a training": (put("training", value={"norm": torch.zeros(3)}), "a checkpoint of {'norm': 'bn', "),
    "nan in the loss": (put("loss", value=nan), "expected finite numbers, got nan or inf in loss"),
    "nan in a weight": (put("model", "0.weight", value=nan), "got nan or inf in model.0.weight"),
    "inf in a statistic": (put("model", "1.running_var", value=lambda t: t / 0), "inf in model.1.running_var"),
    "nan in a momentum": (put(*BUFFER, value=nan), f"got nan or inf in {MOMENTUM}"),
    "another shape": (put("model", "0.weight", value=torch.zeros(4, 2)), f"{WEIGHT}(4, 2) float32"),
    "another dtype": (put("model", "0.weight", value=torch.Tensor.half), f"{WEIGHT}(4, 3) float16"),
    "another shape of momentum": (put(*BUFFER, value=torch.zeros(3)), f"{MOMENTUM} to be (4, 3) float32, got (3,)"),
    "a number for a momentum": (put(*BUFFER, value=0.0), f"{MOMENTUM} to be (4, 3) float32, got a float"),
    "a sparse weight": (put("model", "0.weight", value=torch.Tensor.to_sparse), f"{WEIGHT}a Tensor of another kind"),
    "a meta weight": (put("model", "0.weight", value=lambda t: t.to("meta")), ": "),
    "no momentum": (put("optimizer", "state", 0, value={}), f"expected a checkpoint with {MOMENTUM}"),
    "no state": (put("optimizer", value={}), STATES),
    "a list for a model": (put("model", value=[1]), STATES),
    "one more layer": (put("model", "2.weight", value=torch.zeros(1)), "expected a checkpoint without model.2.weight"),
    "losses of two axes": (put("loss", value=lambda t: t[:, None]), "expected loss to be (0,) float64, got (5, 1) f"),
    "losses in a list": (put("loss", value=[1.0]), "expected loss to be (0,) float64, got a list"),
    "no losses": (put("loss", value=lambda t: t[:0]), "expected a checkpoint of less than 8 steps, got one of 0"),
    "all the steps": (put("loss", value=torch.zeros(8).double()), "a checkpoint of less than 8 steps, got one of 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_fit_is_refused_in_one_line_and_changes_nothing(name, path, capsys):
    make, text = BROKEN[name]
    make(path)
    fresh = Training()
    before = fresh.state()
    with pytest.raises(SystemExit, match="1"):
        fresh.load(path)
    said = one_line(capsys)
    assert said.startswith("--checkpoint: ")
    assert text in said
    assert said.endswith(f": {path}\n")
    torch.testing.assert_close(fresh.state(), before, rtol=0, atol=0)


def test_numbers_that_are_not_finite_are_not_saved(path, capsys):
    Training(3).save(path)
    content = path.read_bytes()
    diverged = Training(4)
    diverged.losses[3] = float("inf")
    with pytest.raises(SystemExit, match="1"):
        diverged.save(path)
    assert one_line(capsys) == (
        f"--checkpoint: expected finite numbers, got nan or inf in loss after step 4; not written: {path}\n"
    )
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["checkpoint"]


def test_nothing_is_written_through_links(path, capsys):
    """Not at the names that an unfinished file may have, and not at the file's own."""
    victim = path.with_name("victim")
    victim.write_text("precious")
    for name in "checkpoint.unfinished", "checkpoint.tmp":
        path.with_name(name).symlink_to(victim)
    Training(3).save(path)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(SystemExit, match="1"):
        Training(3).save(path)
    assert one_line(capsys) == (f"--checkpoint: cannot write {path}: expected a file or nothing there, got a link\n")
    assert victim.read_text() == "precious"


def test_an_unfinished_file_is_made_exclusively(path, monkeypatch):
    """Even if its name could be foretold."""
    monkeypatch.setattr(common.secrets, "token_hex", lambda _: "foretold")
    victim = path.with_name("victim")
    victim.write_text("precious")
    path.with_name("checkpoint.foretold.unfinished").symlink_to(victim)
    with pytest.raises(OSError, match=f"cannot write {path}: File exists"):
        common.write(path, b"content")
    assert victim.read_text() == "precious"
    assert not path.exists()


def test_a_file_has_the_permissions_that_the_user_chose(path):
    before = os.umask(0o027)
    try:
        common.write(path, b"content")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(path, capsys):
    Training(3).save(path)
    content = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="1"):
            Training(4).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert one_line(capsys) == f"--checkpoint: cannot write {path}: File too large\n"
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["checkpoint"]


def test_an_error_without_words_ends_the_program_too(capsys):
    def fail():
        raise OSError

    with pytest.raises(SystemExit, match="1"):
        common.on_all_ranks(LocalCommunicator(), "--data", fail)
    assert one_line(capsys) == "--data: OSError\n"


# The examples, on ranks

TRANSFORMER = ["--layers", 1, "--width", 32, "--heads", 2, "--context", 32, "--sample", 20]
OPTIONS = {"cnn": [], "transformer": TRANSFORMER}
WRAPPER = """
    # FOLDER LIMIT EXAMPLE ARGUMENT...: each rank in a folder of its own, with files of LIMIT bytes at most
    import os, resource, runpy, sys
    import syncnorm

    folder, limit, example, *arguments = sys.argv[1:]
    init = syncnorm.init

    def init_on_a_host(*args, **kwargs):
        group = init(*args, **kwargs)
        os.chdir(os.path.join(folder, f"host{group.rank}"))
        if int(limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        return group

    syncnorm.init = init_on_a_host
    sys.argv = [example, *arguments]
    sys.path.insert(0, os.path.dirname(example))
    runpy.run_path(example, run_name="__main__")
"""
PAIRS = [("cnn", "torchrun"), ("transformer", "mpirun")]


@pytest.fixture
def hosts(tmp_path):
    """Return two folders, and what runs an example on two ranks, each in its own."""
    folders = [tmp_path / f"host{rank}" for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    script = tmp_path / "wrapper.py"
    script.write_text(textwrap.dedent(WRAPPER))

    def run(example, launcher, *options, limit=0):
        words = ["--batch-per-rank", 4, "--checkpoint", "checkpoint", "--checkpoint-every", 2, "--out", "record.json"]
        words = [tmp_path, limit, EXAMPLES / f"{example}.py", *words, *OPTIONS[example], *options]
        return launch(launcher, 2, script, *words, NO_COLOR="1")

    return folders, run


def trained(example, steps, path):
    """Train an example in this process for some steps, with a checkpoint, and return its losses."""
    module = runpy.run_path(str(EXAMPLES / f"{example}.py"))
    words = ["--batch-per-rank", 8, "--steps", steps, "--checkpoint", path, *OPTIONS[example]]
    _, record = module["train"](module["arguments"](list(map(str, words))), LocalCommunicator())
    return record["loss"]


def check_one_line(job, launcher, text):
    """Check that the job ended with status 1 after one line of its ranks; torchrun has a traceback of its own."""
    assert job.returncode == 1, job.stderr
    assert [line for line in job.stderr.splitlines() if line.startswith("--") and line.strip("-")] == [text]
    assert job.stderr.count("Traceback") == (launcher == "torchrun"), job.stderr
    if launcher == "torchrun":  # which ends the others when the first has ended
        assert "1" in set(re.findall(r"exitcode +: (-?\d+)", job.stderr)) <= {"1", "-15"}, job.stderr


@pytest.mark.parametrize(("example", "launcher"), PAIRS)
def test_ranks_go_on_from_the_step_of_rank_0_whatever_their_hosts_have(example, launcher, hosts):
    folders, run = hosts
    expected = trained(example, STEPS, folders[0] / "checkpoint")
    trained(example, 5, folders[0] / "checkpoint")
    trained(example, 3, folders[1] / "checkpoint")
    job = run(example, launcher, "--steps", STEPS, "--resume")
    assert job.returncode == 0, job.stderr
    record = json.loads((folders[0] / "record.json").read_text())
    assert record["resumed_at_step"] == 5
    assert record["loss"] == pytest.approx(expected, abs=1e-5)
    assert sorted(os.listdir(folders[0])) == ["checkpoint", "record.json"]
    assert os.listdir(folders[1]) == ["checkpoint"]


def test_a_broken_checkpoint_ends_all_ranks_in_one_line(hosts):
    folders, run = hosts
    (folders[0] / "checkpoint").write_text("no checkpoint")
    job = run("cnn", "mpirun", "--steps", STEPS, "--resume")
    check_one_line(job, "mpirun", f"--checkpoint: {UNREADABLE} (UnpicklingError): checkpoint")


def test_a_full_disk_ends_all_ranks_in_one_line(hosts):
    folders, run = hosts
    checkpoint = folders[0] / "checkpoint"
    trained("transformer", 3, checkpoint)
    content = checkpoint.read_bytes()
    job = run("transformer", "torchrun", "--steps", STEPS, "--resume", limit=100_000)
    check_one_line(job, "torchrun", "--checkpoint: cannot write checkpoint: File too large")
    assert checkpoint.read_bytes() == content
    assert os.listdir(folders[0]) == ["checkpoint"]


@pytest.mark.parametrize(
    ("example", "launcher", "option"), [("cnn", "torchrun", "--checkpoint"), ("transformer", "mpirun", "--out")]
)
def test_what_cannot_be_written_is_found_before_the_training(example, launcher, option, hosts):
    folders, run = hosts
    (folders[0] / "taken").write_text("")
    job = run(example, launcher, option, "taken/file")
    check_one_line(job, launcher, f"{option}: cannot write taken/file: Not a directory")
    assert "samples" not in job.stderr  # of the training's progress bar
    assert os.listdir(folders[0]) == ["taken"]


def test_data_that_one_host_lacks_end_all_ranks_in_one_line(hosts):
    folders, run = hosts
    (folders[0] / "text").write_text("\n\n".join(f"paragraph {i}" for i in range(30)))
    job = run("transformer", "mpirun", "--data", "text")
    check_one_line(job, "mpirun", "--data: [Errno 2] No such file or directory: 'text' (on rank 1)")
