"""The README's example runs as it stands, and so do those of the page that it names for whole programs."""

import re
from pathlib import Path

import pytest
from examples_of_docs import EXAMPLES
from launchers import launch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
(SHORT,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
STEP = """
group = syncnorm.communicator()
torch.manual_seed(group.rank)
model(torch.randn(2, 3, 16, 16)).square().mean().backward()
print(f"rank {group.rank} of {group.size}: {model.module[1].running_mean[:2]} {model.module[0].weight.grad.sum()}")
"""


def assert_equal_ranks(job):
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    ranks = dict(re.findall(r"rank (\d) of 2: (tensor\(.+?)(?=rank \d of|\n)", job.stdout))  # lines may mix
    assert ranks.keys() == {"0", "1"}
    assert ranks["0"] == ranks["1"]


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_the_example_trains(launcher, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SHORT + STEP)
    assert_equal_ranks(launch(launcher, 2, script))


@pytest.mark.parametrize(
    ("example", "launcher"), [("torchrun", "torchrun"), ("mpirun", "mpirun"), ("torchrun", "mpirun")]
)
def test_usage_examples(example, launcher, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(EXAMPLES[example])
    assert_equal_ranks(launch(launcher, 2, script))


def test_it_is_short_and_names_the_commands():
    assert len(README.splitlines()) <= 150
    for command in ("./launch/demo", "./launch/test", "./launch/docs", "pip install ."):
        assert command in README
    assert not re.search(r"pip install '?syncnorm", README)  # it is not on PyPI
