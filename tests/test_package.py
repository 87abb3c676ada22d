"""The package as it is imported."""

import subprocess
import sys
import textwrap
import warnings
from importlib.metadata import version

import torch

import syncnorm


def run_python(code, **environment):
    """Run `code` in a fresh interpreter; return what it printed, errors included."""
    import os

    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert completed.returncode == 0, completed.stdout
    return completed.stdout


def test_public_names():
    for name in syncnorm.__all__:
        assert getattr(syncnorm, name).__doc__, name
    assert syncnorm.__version__ == version("syncnorm")


def test_import_needs_neither_mpi4py_nor_triton():
    code = """
    import sys
    sys.modules["mpi4py"] = sys.modules["triton"] = None  # importing them raises ImportError
    import torch, syncnorm
    layer = syncnorm.SyncBatchNorm(3)
    layer(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert "mpi4py.MPI" not in sys.modules
    try:
        syncnorm.init("mpi")
    except RuntimeError as error:
        print(error)
    """
    assert "MPI was asked for" in run_python(code)
    assert "pip install 'syncnorm[mpi]'" in run_python(code)


def test_import_starts_nothing():
    code = """
    import sys, threading, syncnorm, torch.distributed
    assert not torch.distributed.is_initialized() and threading.active_count() == 1
    assert "mpi4py" not in sys.modules
    """
    assert run_python(code) == ""


TRAIN = """
import warnings, torch, syncnorm
layer = syncnorm.SyncBatchNorm(3)
for _ in range(2):
    layer(torch.randn(4, 3))
"""


def test_training_alone_in_a_larger_job_warns_once():
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"):
        output = run_python("import warnings\nwarnings.simplefilter('always')" + TRAIN, **{name: "3"})
        assert output.count(f"UserWarning: {name}=3 tells of 3 ranks") == 1


def test_no_warning_where_none_is_due():
    assert run_python(TRAIN, WORLD_SIZE="1") == ""
    assert run_python(TRAIN) == ""
    assert (
        run_python(TRAIN.replace("syncnorm.SyncBatchNorm(3)", "syncnorm.SyncBatchNorm(3).eval()"), PMI_SIZE="2") == ""
    )


def test_no_warning_from_a_group():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncnorm.SyncBatchNorm(3, process_group=syncnorm.communicators.LocalCommunicator())(torch.randn(4, 3))
