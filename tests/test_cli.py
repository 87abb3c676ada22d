"""`python -m syncnorm info`, alone and under real launchers."""

import re
import socket

import pytest
import torch
from launchers import launch

import syncnorm


def rows(output):
    return dict(re.split("  +", line, maxsplit=1) for line in output.splitlines())


@pytest.mark.parametrize(
    ("launcher", "ranks", "name", "communicator", "backend"),
    [
        ("alone", 1, "none", "LocalCommunicator", "not initialized"),
        ("torchrun", 2, "torchrun", "ProcessGroupCommunicator", "nccl" if torch.cuda.device_count() >= 2 else "gloo"),
        ("mpirun", 2, "mpirun", "MpiCommunicator", "mpi4py"),
    ],
)
def test_info(tmp_path, launcher, ranks, name, communicator, backend):
    script = tmp_path / "info.py"
    script.write_text(
        "import runpy\nimport sys\nsys.argv = ['syncnorm', 'info']\nrunpy.run_module('syncnorm', run_name='__main__')\n"
    )
    job = launch(launcher, ranks, script)
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    table = rows(job.stdout)
    assert table["syncnorm"] == syncnorm.__version__
    assert table["torch"] == torch.__version__
    assert table["launcher"] == name
    assert table["communicator"] == communicator
    assert table["torch.distributed"] == backend
    assert table["rank"] == f"0 of {ranks}"
    assert table["hosts"] == f"{socket.gethostname()} ({ranks} rank{'s' * (ranks > 1)})"
    assert table["kernels on cpu"].startswith(("cpu (", "reference"))  # test_install.py: which, and why
    assert "Open MPI" in table["mpi"]


def test_a_tool_that_is_not_there(capsys):
    from syncnorm.cli import main

    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_benchmarks_have_names(capsys):
    from syncnorm.cli import main

    with pytest.raises(SystemExit):
        main(["bench"])
    assert "required: NAME" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "nothing"])
    assert "invalid choice: 'nothing' (choose from" in capsys.readouterr().err
