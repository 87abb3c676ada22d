"""The programs of docs/frameworks.md run, and without the conversion the ranks do not agree."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from launchers import COMMANDS
from PIL import Image
from processes import run

import syncnorm

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
PROGRAM = re.compile(r"^## ([^\n]+)\n|^```python\n# (python|torchrun) [^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONVERSION = re.compile(
    r"^ *(?:\w+ = syncnorm\.convert_sync_batchnorm\(.*\)|plugins=\[.*\],|sync_batchnorm=True,)\n", re.MULTILINE
)
PACKAGES = {
    "Lightning": "lightning",
    "Accelerate": "accelerate",
    "The Trainer of transformers": "transformers",
    "MONAI": "monai",
    "MMEngine": "mmengine",
    "Ray Train": "ray",
    "Ultralytics": "ultralytics",
}
ULTRALYTICS = "Ultralytics"


def programs():
    """Return the programs of the page: the section, the launcher and the code of each."""
    found, section = [], None
    for heading, launcher, code in PROGRAM.findall(PAGE.read_text()):
        section = heading or section
        if code:
            found.append((section, launcher, code))
    return found


PROGRAMS = programs()
IDS = [f"{section} {i}" for i, (section, _, _) in enumerate(PROGRAMS)]
ON_RANKS = [program for program in PROGRAMS if program[0] != ULTRALYTICS]


def execute(launcher, code, folder):
    """Run a program in a folder, and return its exit status and what it printed."""
    (folder / "train.py").write_text(code)
    command = COMMANDS["torchrun" if launcher == "torchrun" else "alone"](2)
    path = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(PAGE.parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "YOLO_CONFIG_DIR": str(folder)}
    del environment["PYTEST_CURRENT_TEST"]  # with which ultralytics writes elsewhere
    job = run(*command, "train.py", timeout=240, cwd=folder, env=environment)
    return job.returncode, job.stdout


def test_every_section_has_a_program():
    assert {section for section, _, _ in PROGRAMS} == set(PACKAGES)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("section", "launcher", "code"), ON_RANKS, ids=IDS[: len(ON_RANKS)])
def test_ranks_agree(section, launcher, code, ran, tmp_path):
    what = "`sync_batchnorm=True` with `patch_torch`" if "patch_torch" in code else "its training loop"
    ran(PACKAGES[section], f"{what}, 2 ranks")
    status, output = execute(launcher, code, tmp_path)
    assert status == 0, output


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("section", "launcher", "code"), ON_RANKS, ids=IDS[: len(ON_RANKS)])
def test_without_the_conversion_they_do_not(section, launcher, code, tmp_path):
    plain, number = CONVERSION.subn("", code)
    assert number == 1
    status, output = execute(launcher, plain, tmp_path)
    assert status != 0
    assert "RunningStatsError" in output


@pytest.mark.timeout(300)
def test_ultralytics(ran, tmp_path):
    ran("ultralytics", "its training loop, 1 rank")
    for part in ("train", "val"):
        for name in ("dark", "bright"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                values = np.random.default_rng(i).integers(0, 128, (32, 32, 3)) + 127 * (name == "bright")
                Image.fromarray(values.astype(np.uint8)).save(folder / f"{i}.png")
    ((_, launcher, code),) = [program for program in PROGRAMS if program[0] == ULTRALYTICS]
    status, output = execute(launcher, code, tmp_path)
    assert status == 0, output
    (file,) = re.findall("^checkpoint: (.*)$", output, re.MULTILINE)
    checkpoint = torch.load(tmp_path / file, weights_only=False)
    norms = [layer for layer in checkpoint["model"].modules() if isinstance(layer, syncnorm.SyncBatchNorm)]
    assert norms
    assert all((layer.running_var != 1).any() for layer in norms)
