"""The README's usage examples run as they stand, under the launchers that it names."""

import re
from pathlib import Path

import pytest
from launchers import launch

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = dict(
    zip(
        ["torchrun", "mpirun"],
        re.findall(r"```python\n(import torch.*?)```", README.read_text(), re.DOTALL),
        strict=True,
    )
)


@pytest.mark.parametrize(
    ("example", "launcher"), [("torchrun", "torchrun"), ("mpirun", "mpirun"), ("torchrun", "mpirun")]
)
def test_usage_examples(example, launcher, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(EXAMPLES[example])
    job = launch(launcher, 2, script)
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    ranks = dict(re.findall(r"rank (\d) of 2: (tensor\(.*?\))", job.stdout, re.DOTALL))
    assert ranks.keys() == {"0", "1"}
    assert ranks["0"] == ranks["1"]


def test_the_readme_names_files_that_are_there():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / path).exists(), path
