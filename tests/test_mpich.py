"""MPI libraries other than Open MPI: each in an environment of its own, which has the packages of this one too.

MPICH is tested always. Intel MPI, of 130 MB, where it is asked for:

    SYNCNORM_TEST_MPI=mpich,impi-rt python -m pytest tests/test_mpich.py

The environments stay, as .venv-mpich and .venv-impi-rt.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap

import pytest
import torch
from examples_of_docs import EXAMPLES
from forks import FORKED
from forks import check as check_forks
from launchers import ENVIRONMENTS, ROOT, launch
from programs import FAIL, JOIN, STAY_AWAY

LIBRARIES = os.environ.get("SYNCNORM_TEST_MPI", "mpich").split(",")  # the names of their packages
CNN = ROOT / "examples" / "cnn.py"
# What calls MPI, not what is computed with the sums
CALLS_MPI = [f"tests/test_{name}.py" for name in ("communicators", "exchange", "functional", "join", "mpi_backend")]


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request):
    """Install the library with an mpi4py beside it, and return its name. Skips where pip finds none, or no network."""
    directory = ENVIRONMENTS[request.param]
    packages = sysconfig.get_path("purelib")
    installed, contents = directory / "installed", f"{request.param} beside {packages} of Python {sys.version}\n"
    if not installed.exists() or installed.read_text() != contents:
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True, timeout=60)
        pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
        done = subprocess.run([*pip, request.param, "mpi4py"], capture_output=True, text=True, timeout=100)
        if done.returncode != 0:
            pytest.skip(f"{request.param} is NOT TESTED, since pip cannot install it: {done.stderr[-500:]}")
        own = next(directory.glob("lib/python*/site-packages"))
        (own / "beside.pth").write_text(packages)  # they come after its own
        installed.write_text(contents)
    return request.param


@pytest.fixture
def run(library, tmp_path):
    """Return what runs a script, given as code or by its arguments, on ranks of the library."""

    def run(ranks, *words, code=None, timeout=90):
        if code is not None:
            (tmp_path / "script.py").write_text(textwrap.dedent(code))
            words = [tmp_path / "script.py"]
        return launch(library, ranks, *words, timeout=timeout, PYTHONPATH=str(ROOT), NO_COLOR="1")

    return run


def succeeded(job):
    assert job.returncode == 0, job.stdout + job.stderr
    return job.stdout


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_join(run, ranks):
    job = run(ranks, code=JOIN)
    lines = sorted(succeeded(job).splitlines())
    starts = [f"MpiCommunicator {rank}/{ranks} {0.05 * (ranks - 1):.3f} mpi4py" for rank in range(ranks)]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert job.stderr == ""


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (FAIL, "ValueError: rank one has had enough"),
        (STAY_AWAY, "DesyncError: MPI_Allreduce on rank 0 of 2 waited 2 s"),
    ],
    ids=["an exception", "a timeout"],
)
def test_a_failure_on_one_rank_ends_the_job(run, code, error):
    job = run(2, code=code, timeout=25)  # less than the other rank sleeps
    assert job.returncode != 0
    assert error in job.stderr


def test_children_end_and_ranks_train_on(run):
    check_forks([3, 1, 0], run(2, FORKED))


@pytest.mark.parametrize("example", EXAMPLES)
def test_usage_examples(run, example):
    means = re.findall(r"rank \d of 2: (tensor\(.*?\))", succeeded(run(2, code=EXAMPLES[example])), re.DOTALL)
    assert len(means) == 2
    assert means[0] == means[1]


def test_cnn_losses_are_those_of_one_process(run, tmp_path):
    def losses(record):
        return torch.tensor(json.loads(record.read_text())["loss"], dtype=torch.float64)

    options = ["--steps", 8, "--batch-per-rank"]
    succeeded(launch("alone", 1, CNN, *options, 8, "--out", tmp_path / "alone"))
    succeeded(run(2, CNN, *options, 4, "--out", tmp_path / "two"))
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "alone"), rtol=0, atol=1e-5)


@pytest.mark.timeout(420)
@pytest.mark.parametrize(("ranks", "paths"), [(2, CALLS_MPI), (4, ["tests/test_mpi_backend.py"])], ids=[2, 4])
def test_what_runs_under_open_mpi(run, ranks, paths):
    options = ["--with-mpi", "-m", "mpi", "--color=no", "-p", "no:cacheprovider", "--timeout-method=thread"]
    output = succeeded(run(ranks, "-m", "pytest", *options, *paths, timeout=400))
    assert len(re.findall(r"\d+ passed", output)) == ranks
