"""`python -m syncnorm plan`: alone, on the ranks of a job that it measures, and with wrong arguments."""

import json
import os
import sys
from pathlib import Path

import pytest
from launchers import launch
from processes import run

from syncnorm.planning.predict import BN, GLOBAL

HELPERS = Path(__file__).parent / "helpers"
RUN = "import runpy, sys\nsys.argv[0] = 'syncnorm'\nrunpy.run_module('syncnorm', run_name='__main__')\n"


def by_command(*arguments, **options):
    return run(sys.executable, "-m", "syncnorm", "plan", *arguments, timeout=110, **options)


SHAPE = ["--input-shape", "3,8,8", "--batch-per-rank", "4"]
NETWORK = ["--latency-us", "20", "--bandwidth-gbps", "100", "--ranks-per-node", "1"]


def test_the_command(tmp_path):
    found, drawn = tmp_path / "found.json", tmp_path / "drawn.png"
    cluster = ["--nodes", "4", "--ranks-per-node", "8", "--latency-within-us", "2", "--bandwidth-within-gbps", "400"]
    files = ["--json", found, "--figure", drawn]
    job = by_command(f"{HELPERS / 'planted.py'}:sound", *SHAPE, *NETWORK, *cluster, *files, cwd=tmp_path)
    assert job.returncode == 0, job.stdout
    assert "A step on 32 ranks, 8 on each node, 4 samples on each rank" in job.stdout
    report = json.loads(found.read_text())
    assert report["recommendation"] in job.stdout
    assert [layer["message_bytes"] for layer in report["layers"]] == [[152, 144], [152, 144]]
    assert report["message_bytes"] == 592
    assert report["compute_ms"] > 0
    assert report["statistics_network"]["between"] == pytest.approx({"latency_us": 20, "bandwidth_gbps": 100})
    assert report["statistics_network"]["within"] == pytest.approx({"latency_us": 2, "bandwidth_gbps": 400})
    assert {each["ranks"] for each in report["predictions"]} == {32}
    assert {each["ranks"] for each in report["curves"]} == {2**i for i in range(13)}
    assert report["checks"] == []
    assert drawn.stat().st_size > 10_000


def test_the_command_takes_the_time_of_a_step():
    job = by_command("planted:sound", *SHAPE, *NETWORK, "--step-ms", "150", "--noise", "0", cwd=HELPERS)
    assert job.returncode == 0, job.stdout
    assert "150 ms, as given, converted or not" in job.stdout
    assert "the job has one rank" in job.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["planted:nothing", *SHAPE, *NETWORK], "plan cannot run the model: ValueError"),
        (["planted:sound", "--input-shape", "1,8,8", "--batch-per-rank", "4", *NETWORK], "the model: RuntimeError"),
        (["planted:no_gradient", *SHAPE, *NETWORK], "with a tensor that requires a gradient in its output"),
        (["planted:sound", *SHAPE, *NETWORK[:4]], "expected --nodes and --ranks-per-node"),
        (["planted:sound", *SHAPE, *NETWORK, "--json", "nowhere/found.json"], "expected a file that can be written"),
        (["planted:sound", *SHAPE], "expected --measure, or --latency-us and --bandwidth-gbps"),
        (["planted:sound", *SHAPE, "--latency-us", "3"], "expected both --latency-us and a positive --bandwidth-gbps"),
        (["planted:sound", *SHAPE, *NETWORK, "--noise", "-1"], "expected a number of 0 or more, got -1"),
        (["planted:sound", *SHAPE, "--measure", "--step-ms", "3"], "expected no --step-ms and no link within a node"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    job = by_command(*arguments, cwd=HELPERS)
    assert job.returncode == 2
    assert message in job.stdout
    assert "Traceback" not in job.stdout


def test_the_command_under_a_launcher():
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    job = by_command("planted:sound", *SHAPE, *NETWORK, cwd=HELPERS, env=os.environ | launcher)
    assert job.returncode == 1
    assert "expected plan without --measure to be started alone, got it under a launcher" in job.stdout


def test_the_command_measures_on_several_ranks():
    job = by_command("planted:sound", *SHAPE, "--measure", cwd=HELPERS)
    assert job.returncode == 1
    assert "got this process alone: start it under torchrun or mpirun" in job.stdout


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_ranks_measure_and_check_the_prediction(launcher, tmp_path):
    script, found = tmp_path / "plan.py", tmp_path / "found.json"
    script.write_text(RUN)
    model = f"{HELPERS / 'planted.py'}:sound"
    job = launch(launcher, 2, script, "plan", model, *SHAPE, "--measure", "--nodes", "8", "--json", found, timeout=110)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("This job: predicted and measured") == 1  # rank 0 prints
    report = json.loads(found.read_text())
    assert [(check["variant"], check["ranks"]) for check in report["checks"]] == [(BN, 2), (GLOBAL, 2)]
    for check in report["checks"]:
        ratio = check["predicted_ms"] / check["measured_ms"]
        assert check["error_percent"] == pytest.approx(100 * (ratio - 1))
    assert report["ranks"] == 16
    assert report["statistics_network"]["ranks_per_node"] == 2
