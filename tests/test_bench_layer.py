"""bench/layer.py: a layer beside other implementations, really timed. Nothing asserts a speed."""

import json
import math
import re

import pytest
import torch
from benchmarks import JOBS, bench, read
from launchers import launch

import syncnorm
from syncnorm.bench import cases, job, layer, report, targets, timing
from syncnorm.communicators import LocalCommunicator
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
    "syncnorm per rank, reproducible",
    "composed of all-reduces",
]
OF_SEVERAL = ["syncnorm", "two all-reduces", "copy baseline with two all-reduces"]
OPTIONAL = {"fairscale", "torch.nn.SyncBatchNorm", "syncnorm per rank, CUDA graph"}


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
        settings.append(("kept", [case for case in listed if case.kind == cases.LARGE]))
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
            moved = 8 * math.prod(row["shape"]) * getattr(torch, row["dtype"]).itemsize  # bytes
            assert row["gigabytes_per_second"] == pytest.approx(moved / row["median_us"] / 1e3)
            assert row["clock"] == ("wall" if not on_gpu else "host" if kind == "tiny" else "device")
            assert (row.get("kernels") in ("native", "cudnn")) is row["candidate"].startswith("F.batch_norm")
        verdicts = {v["target"]: v for v in judged if (v["case"], v["memory"]) == (name, memory)}
        for verdict in verdicts.values():
            assert verdict["met"] is (verdict["value"] <= verdict["limit"])
        relu = of["syncnorm per rank, relu"]["median_us"] / of["syncnorm per rank"]["median_us"]
        assert kind == "tiny" or verdicts["one, relu / one"]["value"] == pytest.approx(relu)
        assert ("all / (one + 1.15 all-reduces)" in verdicts) is (ranks > 1 and kind != "tiny")
    assert done.stdout.count("met") + done.stdout.count("MISSED") == len(judged)
    assert record["failures"] == []
    assert "no time for" not in record["header"]
    written = files["markdown"].read_text()
    assert f"torch {torch.__version__}" in written
    quiet = {key: not any(row["noisy"] for row in of.values()) for key, of in by_case.items()}
    assert all(written.count(f"| {name} | {memory} |") == 2 * quiet[name, memory] for name, memory in by_case)
    assert "| copy µs (GB/s) |" in written
    disturbed = len(quiet) - sum(quiet.values())
    assert written.count(f"Left out as disturbed: {disturbed} of {len(quiet)} (") == 2 * (disturbed > 0)
    assert files["figure"].read_bytes().startswith(b"\x89PNG")


def test_a_candidate_that_fails_is_told_after_all_others_were_timed(monkeypatch, tmp_path):
    """A CUDA graph fails on a CPU."""
    layers = layer.layers

    def with_a_graph(*arguments):
        made = layers(*arguments)
        return {targets.GRAPH: made[targets.ALONE]._replace(captured=True), **made}

    monkeypatch.setattr(layer, "layers", with_a_graph)
    monkeypatch.setattr(layer, "join", lambda: job.Job(LocalCommunicator(), CPU))
    monkeypatch.setattr(layer.memory, "keep", lambda: False)  # for this process
    files = report.Files(json=tmp_path / "layer.json", markdown=tmp_path / "layer.md")
    with pytest.raises(RuntimeError, match=r"expected all candidates to run, got .*CUDA graph"):
        layer.main(files, quick=True, only="2x8x2x2")
    record = json.loads(files.json.read_text())
    [failure] = record["failures"]
    assert (failure["case"], failure["candidate"]) == ("2x8x2x2 fp32 NCHW", targets.GRAPH)
    assert targets.ALONE in {row["candidate"] for row in record["rows"]}
    assert targets.GRAPH not in {row["candidate"] for row in record["rows"]}
    assert f"| {failure['case']} | returned | {targets.GRAPH} | {failure['error']} |" in files.markdown.read_text()


def test_a_candidate_that_fails_on_one_of_several_ranks_raises(monkeypatch):
    group = LocalCommunicator()
    monkeypatch.setattr(group, "size", 2, raising=False)
    wrong = layer.Layer(lambda x: x * 2, [])
    monkeypatch.setattr(layer, "layers", lambda *_: {"wrong": wrong})
    with pytest.raises(RuntimeError, match="expected wrong on 4x3x5x5 fp32 NCHW to compute y to 10% on average"):
        layer._steps(job.Job(group, CPU), cases.Case(cases.SMALL, (4, 3, 5, 5)), False)


def test_cases_that_there_is_no_time_for_are_named():
    listed = [case.name for case in cases.cases(CPU, quick=True)]
    clock = iter([0.0, *[0.5] * 6, *[2.0] * 99])
    budget = timing.Budget(1.0, LocalCommunicator())
    budget.left = lambda: max(0.0, 1.0 - next(clock))
    measured = layer.measure(job.Job(LocalCommunicator(), CPU), cases.cases(CPU, quick=True), True, False, budget)
    names = [result.case.name for result in measured]
    assert names == listed[:7]
    assert report.left_undone(listed[7:]) == {"no time for": ", ".join(listed[7:])}
    assert report.left_undone([]) == {}


@pytest.mark.parametrize(("name", "options"), [("layer", ("--only", "2x8x2x2")), ("train", ("--batch", "1"))])
def test_triton_kernels_are_timed_in_their_interpreter(tmp_path, name, options):
    pytest.importorskip("triton")
    out = tmp_path / "rehearsal.json"
    words = ("-m", "syncnorm", "bench", name, "--quick", *options, "--json", out)
    done = launch("alone", 1, *words, SYNCNORM_KERNELS="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    record = read(out, done.stdout)
    assert record["header"]["triton"]
    medians = {row.get("candidate") or row["norm"]: row.get("median_us") or row["median_ms"] for row in record["rows"]}
    ours, torchs = {"layer": (targets.ALONE, targets.TORCH), "train": ("SyncBN", "BN")}[name]
    assert medians[ours] > 10 * medians[torchs]  # interpreted
