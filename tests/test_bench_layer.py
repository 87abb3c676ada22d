"""bench/layer.py: a layer beside other implementations, really timed. Nothing asserts a speed."""

import re

import pytest
import torch
from benchmarks import JOBS, bench, read

import syncnorm
from syncnorm.bench import cases, job, layer, targets
from syncnorm.testing import run_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CANDIDATES = [
    "copy baseline",
    "copy baseline in autograd",
    "F.batch_norm",
    "F.batch_norm, relu",
    "F.batch_norm, add, relu",
]
CANDIDATES += [
    "syncnorm per rank",
    "syncnorm per rank, relu",
    "syncnorm per rank, add, relu",
    "composed of all-reduces",
]
OF_SEVERAL = ["syncnorm", "two all-reduces", "copy baseline with two all-reduces"]
OPTIONAL = {"fairscale", "torch.nn.SyncBatchNorm"}


def candidates_of_two_ranks():
    group = syncnorm.communicator()
    case = cases.Case(cases.SMALL, (4, 3, 5, 5))
    generator = torch.Generator().manual_seed(group.rank)
    x = case.random(CPU, generator, mean=2.0 * group.rank).requires_grad_()
    dy = case.random(CPU, generator)
    made = layer.layers(case, job.Job(group, CPU), residual=dy)
    wanted = layer.expected(made[targets.ALL], x, dy, group)
    outcomes = {}
    for name in (targets.ALL, layer.COMPOSITION, targets.TORCH, targets.ALONE):
        try:
            layer.check(name, made[name].step(x, dy)()[:2], wanted)
            outcomes[name] = "right"
        except RuntimeError as error:
            outcomes[name] = str(error)
    return outcomes


def test_a_layer_of_one_rank_is_not_timed_as_a_synchronized_one():
    for outcomes in run_ranks(candidates_of_two_ranks, 2):
        assert outcomes[targets.ALL] == outcomes[layer.COMPOSITION] == "right"
        for name in (targets.TORCH, targets.ALONE):
            assert re.fullmatch(rf"expected {name} to compute y to 10% on average, got \d\d+%", outcomes[name])


@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_layer(tmp_path, launcher, ranks):
    files = {name: tmp_path / f"layer.{name}" for name in ("json", "markdown", "figure")}
    files["figure"] = files["figure"].with_suffix(".png")
    only = "28x28 fp32" if ranks > 1 else ""
    options = [word for name, path in files.items() for word in (f"--{name}", path)]
    done = bench(launcher, ranks, "layer", "--quick", "--only", only, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("forward + backward on") == 1
    record = read(files["json"], done.stdout)
    rows, judged = record["rows"], record["targets"]
    on_gpu = torch.cuda.is_available()
    listed = cases.cases(CUDA if on_gpu else CPU, quick=True, only=only)
    settings = [("cached" if on_gpu else "returned", listed)]
    if not on_gpu:
        settings.append(("kept", listed))
    assert {(row["memory"], row["case"]) for row in rows} == {(m, case.name) for m, of in settings for case in of}
    by_case = {}
    for row in rows:
        by_case.setdefault((row["case"], row["memory"]), {})[row["candidate"]] = row
    for (name, memory), of in by_case.items():
        kind = of["copy baseline"]["kind"]
        expected = CANDIDATES + OF_SEVERAL * (ranks > 1) + ["nn.BatchNorm2d"] * (kind == "tiny")
        assert of.keys() - OPTIONAL == set(expected)
        for row in of.values():
            low, high = row["quartiles_us"]
            assert 0 < low <= row["median_us"] <= high
            assert row["ratio"] == pytest.approx(row["median_us"] / of["copy baseline"]["median_us"])
        verdicts = {v["target"]: v for v in judged if (v["case"], v["memory"]) == (name, memory)}
        for verdict in verdicts.values():
            assert verdict["met"] is (verdict["value"] <= verdict["limit"])
        relu = of["syncnorm per rank, relu"]["median_us"] / of["syncnorm per rank"]["median_us"]
        assert kind == "tiny" or verdicts["one, relu / one"]["value"] == pytest.approx(relu)
        assert ("all / (one + 1.15 all-reduces)" in verdicts) is (ranks > 1 and kind != "tiny")
    assert done.stdout.count("met") + done.stdout.count("MISSED") == len(judged)
    written = files["markdown"].read_text()
    assert f"torch {torch.__version__}" in written
    quiet = {key: not any(row["noisy"] for row in of.values()) for key, of in by_case.items()}
    assert all(written.count(f"| {name} | {memory} |") == 2 * quiet[name, memory] for name, memory in by_case)
    disturbed = len(quiet) - sum(quiet.values())
    assert written.count(f"Left out as disturbed: {disturbed} of {len(quiet)} (") == 2 * (disturbed > 0)
    assert files["figure"].read_bytes().startswith(b"\x89PNG")
