"""`--help`: every script answers at once, and installs nothing for it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["demo", "docs", "gpu", "mpirun", "slurm-mpi.sbatch", "slurm-torchrun.sbatch", "test", "torchrun"]
SCRIPTS += ["virtual-cluster", "wheel"]
EXAMPLES = ["claims.py", "cnn.py", "contrast.py", "transformer.py"]
UNUSED = ["matplotlib", "mpi4py", "rich.console", "scipy", "sklearn"]  # by a program that only prints its options


@pytest.fixture
def fresh(tmp_path):
    """Return a copy of the launch scripts as a clone has them, and an environment that can install nothing."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "bin").mkdir()
    for command in ("bash", "dirname", "env", "sed"):
        (tmp_path / "bin" / command).symlink_to(shutil.which(command))
    return tmp_path, {"PATH": str(tmp_path / "bin"), "PYTHON": "none"}


def test_all_scripts_are_tried():
    files = [path for path in (ROOT / "launch").iterdir() if path.is_file()]
    executable = {path.name for path in files if path.read_bytes().startswith(b"#!")}
    assert executable == set(SCRIPTS)


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_explain_themselves_before_anything_is_installed(fresh, script, words):
    root, environment = fresh
    before = sorted(root.rglob("*"))
    done = subprocess.run(
        [root / "launch" / script, *words], env=environment, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{script}" in done.stdout
    assert "#" not in done.stdout
    assert sorted(root.rglob("*")) == before


def test_help_is_found_after_other_options(fresh):
    root, environment = fresh
    done = subprocess.run(
        [root / "launch" / "demo", "--steps", "5", "--help"], env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("Show what synchronized BatchNorm does")


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("demo", ("--steps N", "--out DIR", "--redraw")),
        ("gpu", ("--out FOLDER", "--only", "--rehearse", "--wheels FOLDER")),
    ],
)
def test_the_usage_has_all_options_of_the_program(script, options):
    answer = python(f"launch/{script}.py", "--help").stdout
    usage = (ROOT / "launch" / script).read_text()
    for option in options:
        assert option in answer
        assert f"#   {option} " in usage
    assert set(re.findall(r"--[a-z]+", answer)) == {"--help", *(option.split()[0] for option in options)}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_explain_themselves_without_what_draws_or_reads_data(example):
    done = python(f"examples/{example}", "--help")
    assert done.stdout.startswith(f"usage: {example}")


@pytest.mark.parametrize(
    "words", [[], ["info"], ["verify"], ["plan"], ["bench"], ["bench", "comm"], ["bench", "layer"]]
)
def test_tools_explain_themselves_without_what_draws(words):
    assert python("-m", "syncnorm", *words, "--help").stdout.startswith("usage: python -m syncnorm")


def python(*words):
    """Run Python in the repository on a script or module that must not import what is UNUSED."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({UNUSED!r}))\n"
    run = "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    if words[0] != "-m":
        run = "sys.path[0] = sys.argv[0].rpartition('/')[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    code = blocked + "import runpy; sys.argv = sys.argv[1:]\n" + run
    done = subprocess.run(
        [sys.executable, "-c", code, *(word for word in words if word != "-m")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done
