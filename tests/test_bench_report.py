"""bench/report.py: what is published, what is left out, and what is refused before anything is measured."""

from typing import NamedTuple

import pytest
from benchmarks import bench
from launchers import launch

from syncnorm.bench import report
from syncnorm.report import Table


class Row(NamedTuple):
    name: str
    noisy: bool

    def cells(self):
        return [self.name]


FACTS = {name: name for name in ("syncnorm", "torch", "mpi4py", "mpi", "machine", "communicator", "hosts", "date")}
FACTS["threads per rank"] = "1"


def test_disturbed_rows_are_printed_and_not_published(tmp_path, capsys):
    sections = [[Row("quiet", False), Row("disturbed", True)], [Row("calm", False)]]
    files = report.Files(json=tmp_path / "all.json", markdown=tmp_path / "some.md")
    report.publish_rows(FACTS, Table("title", ["row"], [], names=1), sections, {"rows": [{"a": 1}]}, files)
    written = files.markdown.read_text()
    assert (
        "| quiet |\n| calm |\n\nLeft out as disturbed: 1 of 3 (upper quartile above 1.5 times the lower).\n" in written
    )
    assert "| disturbed |" not in written
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("quiet", "disturbed", "calm"))
    assert '"a": 1' in files.json.read_text()


def test_nothing_is_said_of_disturbed_rows_where_there_are_none():
    assert report.undisturbed([Row("quiet", False)]) == ([Row("quiet", False)], "")


def test_rich_is_asked_for(tmp_path):
    script = tmp_path / "no_rich.py"
    script.write_text("import sys\nsys.modules['rich'] = None\n" + "import syncnorm.bench.comm")
    job = launch("alone", 1, script)
    assert job.returncode == 1
    assert "RuntimeError: python -m syncnorm bench draws its tables with rich" in job.stderr
    assert "pip install 'syncnorm[bench]'" in job.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["kernels", "--quick", "--only", "2x8x2x2"],
            "to name a case with memory traffic, got 2x8x2x2",
        ),
        (["train", "--quick", "--batch", "0"], "argument --batch: expected a positive integer, got 0"),
        (["train", "--quick", "--size", "-3"], "argument --size: expected "),
        (["layer", "--quick", "--json", "/nowhere/x.json"], "expected a file that can be written, got /nowhere/x.json"),
        (["layer", "--quick", "--figure", "x.xyz"], "got x.xyz"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_before(arguments, error):
    done = bench("alone", 1, *arguments)
    assert done.returncode != 0
    assert error in done.stderr.replace("'", "")
    assert done.stdout == ""
