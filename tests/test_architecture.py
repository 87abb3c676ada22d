"""The rules of the house in pyproject.toml: `lint-imports` checks them, and there are no circles between modules."""

import graphlib
import shutil
from pathlib import Path

import grimp
import pytest
from processes import run

ROOT = Path(__file__).parent.parent
CLASSMETHOD = ("syncnorm.modules.batch_norm", "syncnorm.convert")  # SyncBatchNorm.convert_sync_batchnorm, as in torch


def test_no_circles():
    graph = grimp.build_graph("syncnorm", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    importer, imported = CLASSMETHOD
    imports[importer].remove(imported)
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def lint(folder):
    return run("lint-imports", "--no-cache", cwd=folder, timeout=120)


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("kernels/reference.py", "from ..errors import SyncNormError", "Kernels import nothing of the package"),
        ("moments.py", "from .communicators import LocalCommunicator", "Moments and kernels know no communicator"),
        ("functional.py", "from .modules import SyncBatchNorm", "Each layer imports only those below it"),
        ("info.py", "from mpi4py import MPI", "Only syncnorm.mpi imports mpi4py"),
    ],
)
def test_an_import_against_the_rules_is_found(module, line, rule, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "syncnorm", tmp_path / "syncnorm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    path = tmp_path / "syncnorm" / module
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    linted = lint(tmp_path)
    assert linted.returncode == 1
    assert f"{rule} BROKEN" in linted.stdout


def test_the_rules_are_kept():
    linted = lint(ROOT)
    assert linted.returncode == 0, linted.stdout
