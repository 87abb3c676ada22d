"""The package as it is imported."""

import ast
import re
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from interpreter import run_python

import syncnorm

ROOT = Path(__file__).parent.parent
YAML = ["CITATION.cff", ".clang-format", ".pre-commit-config.yaml", ".github/workflows/test.yml"]


def test_public_names():
    for name in syncnorm.__all__:
        assert getattr(syncnorm, name).__doc__, name
    assert syncnorm.__version__ == version("syncnorm")


def test_the_citation_names_the_version():
    found = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert found == [syncnorm.__version__]


def test_the_version_has_one_source():
    assert re.findall(r"^ *version = .*$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) == [
        'version = { attr = "syncnorm.__version__" } # a literal, which setuptools reads without importing torch'
    ]


@pytest.mark.parametrize("name", YAML)
def test_yaml_files_parse(name):
    text = (ROOT / name).read_text()
    try:
        import yaml
    except ImportError:  # no dependency: then each line is at least a comment, a key, an item, or continues a text
        assert "\t" not in text
        for line in filter(None, text.splitlines()):
            assert re.match(r" *#| *(- )*[\w-]+:( |$)| *- \S| {6,}\S", line), line
    else:
        assert isinstance(yaml.safe_load(text), dict)


def test_the_workflow_names_what_is_there():
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    paths = re.findall(r"\./launch/\w+", workflow)
    assert {"./launch/test", "./launch/wheel"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
    environments = re.findall(r" environment: (\w+)", workflow)
    assert len(environments) == 2
    for environment in environments:  # of tox
        assert f"[tool.tox.env.{environment}]" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_pages_name_files_that_are_there(page):
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL))
    files = {span for span in spans if re.fullmatch(r"(\./)?[\w./-]+\.(py|md|cpp|sh|cff)", span) and "NAME" not in span}
    assert len(files) > 0
    folders = (ROOT, ROOT / "tests", ROOT / "syncnorm/kernels", ROOT / "syncnorm/communicators")
    assert not {file for file in files if not any((folder / file).exists() for folder in folders)}


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
    assert "expected mpi4py and an MPI library" in run_python(code)
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
        assert output.count(f"UserWarning: {name}=3, but no process group was joined") == 1


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


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^(from|import) test_", path.read_text(), re.MULTILINE), path


def imported(path):
    """Return the names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_no_test_imports_a_test(path):
    """What tests share is in tests/helpers/."""
    assert [name for name in imported(path) if name.split(".")[-1].startswith("test_") or name == "conftest"] == []
