"""The documentation builds without a warning, its links lead somewhere, its code runs, its tables are complete."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import launch

import syncnorm

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TABLE = DOCS / "compatibility-table.md"  # which compatibility.md includes
PAGES = sorted({*DOCS.glob("*.md"), DOCS / "claims/report.md"} - {TABLE})
READMES = [ROOT / folder / "README.md" for folder in ("", "launch", "examples")]
PROGRAMS = [page for page in PAGES if page.stem != "frameworks"]  # which tests/ecosystem runs
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LAUNCHER = re.compile(r"# (torchrun|mpirun) .*?-n\S* (\d) ")  # the first line of a block for several ranks
SAID = re.compile(r"rank (\d) of \d: (.+?)(?=rank \d of|\n)")  # torchrun's ranks write a line and its end separately
BEFORE, AFTER = "# before", "# after"  # the first lines of a block that uses another package, and of what replaces it


def blocks(page):
    return BLOCK.findall(page.read_text())


def python(*arguments, timeout=110):
    completed = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )
    assert completed.returncode == 0, completed.stdout
    return completed.stdout


def test_the_documentation_builds_without_a_warning(tmp_path):
    output = python(*["-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet", "docs"], tmp_path)
    assert output == ""
    reference = (tmp_path / "reference.html").read_text()
    for name in set(syncnorm.__all__) - {"functional", "testing"}:
        assert f'id="syncnorm.{name}"' in reference
    for module in (syncnorm.functional, syncnorm.testing):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in reference


def test_help_is_answered_without_installing(tmp_path):
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch/docs"
    for name in ("docs", "usage.sh"):  # without the setup.sh that installs
        (tmp_path / "launch" / name).write_bytes((ROOT / "launch" / name).read_bytes())
    completed = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, timeout=10)
    assert completed.returncode == 0
    assert completed.stdout.startswith("Install what is missing, then build the documentation")
    assert completed.stderr == ""


@pytest.mark.parametrize("page", [*READMES, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, _ = link.partition("#")
        assert not path or (page.parent / path).exists(), link


def test_every_page_is_reached_from_the_index():
    listed = re.findall(r"^[\w/-]+$", (DOCS / "index.md").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES} - {"index"}
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("page", [page for page in PROGRAMS if blocks(page)], ids=lambda page: page.stem)
def test_code_of_one_process_runs(page, tmp_path):
    """All blocks of a page are one program, without those of several ranks and those of other packages."""
    code = [block for block in blocks(page) if not LAUNCHER.match(block) and not block.startswith(BEFORE)]
    script = tmp_path / "page.py"
    script.write_text("\n".join(code))
    python("-W", "error", script)


LAUNCHED = [(page, block) for page in PROGRAMS for block in blocks(page) if LAUNCHER.match(block)]


@pytest.mark.parametrize(("page", "block"), LAUNCHED, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(LAUNCHED)])
def test_code_of_several_ranks_runs(page, block, tmp_path):
    launcher, ranks = LAUNCHER.match(block).groups()
    script = tmp_path / "train.py"
    script.write_text(block)
    job = launch(launcher, int(ranks), script)
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    said = SAID.findall(job.stdout)
    assert {rank for rank, _ in said} == {str(rank) for rank in range(int(ranks))}
    assert len({result for _, result in said}) == 1  # all ranks hold the same


def test_each_migration_ends_in_code_that_runs():
    kinds = [block.split("\n", 1)[0].split(":")[0] for block in blocks(DOCS / "migrate.md")]
    pairs = [pair for pair in itertools.pairwise(kinds) if pair[0] == BEFORE]
    assert len(pairs) >= 5
    assert {after for _, after in pairs} == {AFTER}


def test_the_plot_of_numerics_is_drawn_and_meets_the_target(tmp_path):
    file = tmp_path / "numerics.png"
    table = python("docs/plots/numerics.py", "--out", file)
    assert file.read_bytes().startswith(b"\x89PNG")
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    column = head.index("syncnorm, 4 ranks: y")
    torchs = head.index("torch F.batch_norm: y")
    assert [float(row[0]) for row in rows] == [0, 10, 100, 1e3, 1e4, 1e5, 1e6]
    for row in rows:
        limit = 2e-6 if float(row[0]) <= 1e4 else 5e-4
        assert float(row[column]) < limit, row  # of y
        assert float(row[column + 1]) < limit, row  # of the input gradient
    assert float(rows[4][torchs]) > 5e-4  # what the README says of torch at 1e4
    page = (DOCS / "numerics.md").read_text()
    assert all(f"| {float(row[0]):,.0f} |" in page for row in rows)


def sources():
    """Yield the paths of the program text: Python, and the scripts of `launch/`."""
    for folder in ("syncnorm", "tests", "launch"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".sbatch"))
    yield from (path for path in (ROOT / "launch").iterdir() if path.is_file() and not path.suffix)


def test_every_environment_variable_is_in_the_table():
    table = (DOCS / "environment.md").read_text()
    listed = {name for span in re.findall(r"`([^`]+)`", table) for name in re.findall(r"[A-Z][A-Z0-9_]+", span)}
    listed |= set(re.findall(r"`(\w+)`", table))
    read = re.compile(r"""\b(?:environ|told)(?:\.\w+)?[(\[]\s*["']([A-Z]\w+)["']""")  # `told` in rendezvous.py
    found = {}
    for path in sources():
        text = path.read_text()
        names = set(re.findall(r"(?<!#ifdef )\bSYNCNORM_[A-Z_]+[A-Z]\b", text))
        if not path.is_relative_to(ROOT / "tests"):
            names |= set(read.findall(text))
        if path.is_relative_to(ROOT / "launch"):
            for line in re.findall(r"\bexport ((?:\w+=\S+ ?)+)", text):
                names |= set(re.findall(r"(?:^| )([A-Z]\w+)=", line))
        found |= dict.fromkeys(names, path)
    assert {"SYNCNORM_KERNELS", "SYNCNORM_TEST_MPI", "OMPI_MCA_btl", "CXX", "SLURM_JOB_ID"} <= found.keys()
    assert not {name: str(path) for name, path in found.items() if name not in listed}


def test_the_gallery_shows_what_its_commands_print(tmp_path):
    """And the losses differ before the fix, and agree after it."""
    python("docs/gallery/regenerate.py", "--check")
    text = (DOCS / "gallery.md").read_text()
    losses = {
        (script, ranks): re.findall(r"loss (\S+)", printed)
        for ranks, script, printed in re.findall(
            r"--nproc-per-node (\d) (\w+)\.py\n```\n\n```text\n(.*?)```", text, re.DOTALL
        )
    }
    assert losses["train", "1"][0] != losses["train", "4"][0]
    assert len(losses["fixed", "1"]) == 5
    assert losses["fixed", "1"] == losses["fixed", "4"] == losses["train", "1"]
