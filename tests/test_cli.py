"""`python -m syncnorm info`, alone and under real launchers."""

import re
import socket

import pytest
import torch
from launchers import launch

import syncnorm
from syncnorm.cli import main
from syncnorm.job.launcher import LaunchInfo


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
    assert re.search(r"\d.*, (not )?CUDA-aware$", table["mpi"])  # whatever the MPI


def test_info_joins_no_job_unless_it_is_asked_to(monkeypatch, capsys):
    joined = []
    monkeypatch.setattr("syncnorm.info.init", lambda: joined.append(True) or syncnorm.communicator())
    monkeypatch.setattr("syncnorm.cli.detect_launcher", lambda: LaunchInfo("none", 0, 1))
    main(["info"])
    assert rows(capsys.readouterr().out)["rank"] == "0 of 1"
    assert joined == []
    main(["info", "--job"])
    assert rows(capsys.readouterr().out)["rank"] == "0 of 1"
    assert joined == [True]


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"syncnorm {syncnorm.__version__}\n"


def test_a_tool_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_benchmarks_have_names(capsys):
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "required: NAME" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "nothing"])
    assert "invalid choice: 'nothing' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "module", "expected"),
    [
        (["comm", "--quick"], "comm", {"quick": True}),
        (["kernels", "--only", "bf16 NHWC"], "kernels", {"quick": False, "only": "bf16 NHWC", "seconds": None}),
        (
            ["layer", "--compile", "--seconds", "60"],
            "layer",
            {"quick": False, "only": "", "with_compiled": True, "seconds": 60},
        ),
        (
            ["train", "--batch", "3", "5"],
            "train",
            {"quick": False, "depth": 50, "batch": [3, 5], "size": None, "seconds": None},
        ),
    ],
)
def test_options_reach_the_benchmark(monkeypatch, tmp_path, words, module, expected):
    called = []
    monkeypatch.setattr(f"syncnorm.bench.{module}.main", lambda files, **options: called.append((files, options)))
    main(["bench", *words, "--json", str(tmp_path / "all.json")])
    [(files, options)] = called
    assert options == expected
    assert (files.json, files.markdown, files.figure) == (tmp_path / "all.json", None, None)
