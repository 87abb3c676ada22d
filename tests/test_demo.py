"""launch/demo.py: what it claims follows from the records of the trainings. test_examples.py runs these."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "launch" / "demo.py"
STEPS = 40
DRIFT = {("sync_bn", "float64"): 1e-15, ("sync_bn", "float32"): 1e-7, ("bn", "float32"): 0.5}  # per rank more
LATE = 1e-2  # drift of float32 after the steps that are compared


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(demo, tmp_path):
    """Return a folder with made-up records, whose losses differ by DRIFT for each rank more than one."""
    (tmp_path / "demo").mkdir()
    for run in demo.RUNS:
        drift = (run.ranks - 1) * DRIFT[run.norm, run.dtype]
        late = LATE * (run.ranks > 1) * (run.dtype == "float32")
        losses = [0.25 + drift + late * (step >= demo.COMPARED) for step in range(STEPS)]
        record = {
            "loss": losses,
            "test_accuracy": 0.5,
            "samples_per_second": 1000.0,
            "per_step": {"norm": {"collectives": 18, "bytes": 1234}},
        }
        (tmp_path / "demo" / run.record).write_text(json.dumps(record))
    return tmp_path


def test_runs_have_one_rank_to_be_compared_with_and_several_more(demo):
    for section in demo.SECTIONS:
        ranks = {run.ranks for run in demo.RUNS if run[:2] == section}
        assert ranks == {1, 2, 4}
    assert all(run.on_one_rank in demo.RUNS for run in demo.RUNS)


def test_commands_train_in_the_dtype_of_the_run(demo):
    command = " ".join(demo.Run("sync_bn", "float64", "mpirun", 4).command(7, "record"))
    assert command.startswith("mpirun -n 4 python examples/cnn.py --norm sync_bn --batch-per-rank 4 --steps 7 ")
    assert "--dtype float64" in command


def test_float64_is_compared_over_all_steps_and_float32_over_the_first(demo, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--redraw", "--out", str(folder)])
    demo.main()
    printed = capsys.readouterr().out
    assert "synchronized, float64: all runs within 3.0e-15 of one rank over all 40 steps" in printed
    assert "synchronized, float32: all runs within 3.0e-07 of one rank over the first 20 steps" in printed
    assert "per rank, float32:     up to 1.5e+00 from one rank over the first 20 steps" in printed
    assert "1.0e-02" in printed  # float32 over all steps, in the table
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    whole = {run: json.loads((folder / "demo" / run.record).read_text()) for run in demo.RUNS}
    whole[demo.Run("sync_bn", "float64", "mpirun", 2)]["loss"][-1] += 1  # after the first steps
    assert "within 1.0e+00 of one rank over all" in demo.proof(whole)


def test_redrawing_without_records_says_what_is_missing(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--redraw", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--redraw: .*bn-float32-torchrun-1\.json"):
        demo.main()
