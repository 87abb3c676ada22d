"""`python -m syncnorm bench`: how candidates are timed, and each benchmark really run. Nothing asserts a speed."""

import json
import re
import sys

import pytest
import torch
from launchers import launch

import syncnorm
from syncnorm.bench import cases, comm, floor, job, kernels, layer, resnet, targets, timing, train
from syncnorm.bench.timing import Effort, Timing
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import run_ranks

BENCH = """
import runpy, sys
sys.argv = ["syncnorm", "bench", *sys.argv[1:]]
runpy.run_module("syncnorm", run_name="__main__")
"""


class Stopwatch:
    """A clock that stands still but for the candidates, which cost what they are made with."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def candidate(self, name, cost):
        def run():
            self.calls.append(name)
            self.now += cost(len(self.calls)) if callable(cost) else cost

        return run


def time_candidates(clock, effort, group=None, **costs):
    candidates = {name: clock.candidate(name, cost) for name, cost in costs.items()}
    return timing.interleave(candidates, group or LocalCommunicator(), effort, clock)


def test_a_timing_is_the_median_and_the_quartiles():
    assert Timing.of([9.0, 1.0, 3.0, 2.0, 100.0]) == Timing(median=3.0, low=2.0, high=9.0)


def test_candidates_take_what_they_take():
    timings = time_candidates(Stopwatch(), Effort(rounds=5, block=0.0), quick=0.25, slow=3.0)
    assert timings == {"quick": Timing(0.25, 0.25, 0.25), "slow": Timing(3.0, 3.0, 3.0)}


def test_ranks_start_the_timed_block_together():
    clock, group = Stopwatch(), LocalCommunicator()
    group.barrier = lambda: clock.calls.append("barrier")
    candidates = {"a": clock.candidate("a", 1.0)}
    timing.interleave(candidates, group, Effort(rounds=2, block=0.0), clock, together=True)
    assert clock.calls == ["a", "a", *["barrier", "a"] * 4]
    assert timing.clock_of(torch.device("cpu")) is timing.time.perf_counter


def test_a_sample_is_as_many_calls_as_fill_a_block():
    clock = Stopwatch()
    timings = time_candidates(clock, Effort(rounds=2, block=8.0), quick=0.5)
    assert timings["quick"].median == 0.5
    assert len(clock.calls) == 1 + (1 + 2 + 4 + 8 + 16) + 2 * (16 + 16)  # warm up, double, measure
    clock = Stopwatch()
    time_candidates(clock, Effort(rounds=2, block=8.0), slow=16.0)
    assert len(clock.calls) == 1 + 1 + 2 * (1 + 1)


def test_the_spread_is_that_of_the_rounds():
    costs = iter([1.0, 1.0, *(cost for sample in (5.0, 1.0, 2.0, 4.0, 3.0) for cost in (0.0, sample))])
    timings = time_candidates(Stopwatch(), Effort(rounds=5, block=0.0), only=lambda _: next(costs))
    assert timings["only"] == Timing(median=3.0, low=2.0, high=4.0)


def test_every_round_times_every_candidate_in_an_order_of_its_own():
    clock = Stopwatch()
    time_candidates(clock, Effort(rounds=20, block=0.0), a=1.0, b=1.0, c=1.0)
    timed = clock.calls[-2 * 3 * 20 :: 2]
    rounds = ["".join(timed[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}


def slower_on_each_rank():
    clock, group = Stopwatch(), syncnorm.communicator()
    timings = time_candidates(clock, Effort(rounds=3, block=4.0), group, a=1.0 + group.rank, b=0.5)
    return timings, clock.calls


def test_the_slowest_rank_counts_and_all_call_in_lockstep():
    results = run_ranks(slower_on_each_rank, 2)
    assert results[0] == results[1]
    assert results[0][0] == {"a": Timing(2.0, 2.0, 2.0), "b": Timing(0.5, 0.5, 0.5)}


@pytest.mark.parametrize(
    ("path", "micros", "met", "cell"),
    [
        (comm.COMMUNICATOR, 13.0, True, "met"),
        (comm.COMMUNICATOR, 13.1, False, "MISSED"),
        (comm.MPI4PY, 34.9, True, "met"),
        (comm.MPI4PY, 35.1, False, "MISSED"),
        (comm.GLOO, 1000.0, None, ""),
    ],
)
def test_a_row_holds_its_target(path, micros, met, cell):
    def timing_of(median):
        return Timing(median * 1e-6, median * 1e-6, median * 1e-6)

    row = comm.Row(comm.MESSAGES[0], path, timing_of(micros), timing_of(10.0))
    assert row.numbers()["met"] is met
    assert row.cells()[-1] == cell
    row = row._replace(raw=row.raw._replace(high=1.6e-5))
    assert row.numbers()["met"] is met
    assert row.numbers()["noisy"] is True
    assert row.cells()[-1] == (f"{cell}, noisy" if cell else "")


def test_a_path_that_does_not_sum_is_not_timed():
    with pytest.raises(RuntimeError, match=r"expected nothing to sum ones over 2 ranks, got tensor\(\[1., 1.\]\)"):
        comm.check("nothing", lambda: None, torch.zeros(2), 2)


@pytest.fixture
def bench(tmp_path):
    """Return what runs a benchmark under a launcher."""
    script = tmp_path / "bench.py"
    script.write_text(BENCH)
    return lambda launcher, ranks, *arguments: launch(launcher, ranks, script, *arguments)


RAW_OF = {"mpirun": "raw mpi4py", "torchrun": comm.GLOO}
PATHS_OF = {
    "mpirun": ["raw mpi4py", comm.COMMUNICATOR, comm.MPI4PY, comm.GLOO],
    "torchrun": [comm.GLOO, comm.COMMUNICATOR],
}


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_comm(bench, tmp_path, launcher):
    out = tmp_path / "comm.json"
    job = bench(launcher, 2, "comm", "--quick", "--json", out)
    assert job.returncode == 0, job.stderr
    assert job.stderr == ""
    assert job.stdout.count("all-reduce on 2 ranks") == 1
    record = json.loads(out.read_text())
    assert record["header"].keys() >= {"date", "machine", "torch", "mpi4py", "mpi", "hosts"}
    for name, value in record["header"].items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(value)}$", job.stdout, re.MULTILINE)
    rows = record["rows"]
    assert [(r["message"], r["path"]) for r in rows] == [(m.name, p) for m in comm.MESSAGES for p in PATHS_OF[launcher]]
    raw = {r["message"]: r["median_us"] for r in rows if r["path"] == RAW_OF[launcher]}
    for row in rows:
        low, high = row["quartiles_us"]
        assert 0 < low <= row["median_us"] <= high
        assert row["ratio"] == pytest.approx(row["median_us"] / raw[row["message"]])
        assert row["extra_us"] == pytest.approx(row["median_us"] - raw[row["message"]])
        if row["target"] is None:
            assert row["met"] is None
        else:
            assert row["met"] is (row[row["target"]["quantity"]] <= row["target"]["limit"])
    assert [r["elements"] for r in rows if r["path"] == comm.COMMUNICATOR] == [129, 513, 2049, 4097, 6553600]


def test_targets_of_comm():
    ratio, extra = comm.Target("ratio", 1.3), comm.Target("extra_us", 25)
    assert [m.targets for m in comm.MESSAGES[:-1]] == [{comm.COMMUNICATOR: ratio, comm.MPI4PY: extra}] * 4
    assert comm.MESSAGES[-1].targets == {comm.MPI4PY: comm.Target("ratio", 1.2)}
    assert (str(ratio), str(extra)) == ("<= 1.3 x raw", "<= raw + 25 µs")


def test_comm_alone_says_how_to_launch(bench):
    job = bench("alone", 1, "comm")
    assert job.returncode == 1
    assert "RuntimeError: expected a group of several ranks, got this process alone: mpirun -n 2" in job.stderr


def test_rich_is_asked_for(tmp_path):
    script = tmp_path / "no_rich.py"
    script.write_text("import sys\nsys.modules['rich'] = None\n" + "import syncnorm.bench.comm")
    job = launch("alone", 1, script)
    assert job.returncode == 1
    assert "RuntimeError: python -m syncnorm bench draws its tables with rich" in job.stderr
    assert "pip install 'syncnorm[bench]'" in job.stderr


def seconds(**medians):
    """Return timings by candidate, without spread; names are those of `targets`, in lower case."""
    return {getattr(targets, name.upper()): Timing(median, median, median) for name, median in medians.items()}


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LARGE = cases.Case(cases.LARGE, (32, 64, 56, 56))
ONE_RANK = {"floor": 1.0, "torch": 1.2, "alone": 1.1, "relu": 1.15, "add_relu": 1.15}
TWO_RANKS = {**ONE_RANK, "all_reduces": 2.0, "all_reduces_between": 3.1, "all": 3.25}


def verdicts(case, times, device=CPU):
    return {verdict.target: verdict for verdict in targets.verdicts(case, seconds(**times), device)}


@pytest.mark.parametrize("slower", ["alone", "relu", "add_relu", "all"])
def test_a_layer_that_is_too_slow_misses_its_target(slower):
    within = verdicts(LARGE, TWO_RANKS)
    assert all(verdict.met for verdict in within.values()), within
    beyond = verdicts(LARGE, {**TWO_RANKS, slower: 1.3 * TWO_RANKS[slower]})
    missed = {target for target, verdict in beyond.items() if not verdict.met}
    assert (
        missed
        == {
            "alone": {"one / floor"},
            "relu": {"one, relu / one"},
            "add_relu": {"one, add, relu / one"},
            "all": {
                "all / (one + 1.15 all-reduces)",
                "all / (one + 1.15 all-reduces in place)",
                "(all - all-reduces in place) / F.batch_norm",
            },
        }[slower]
    )
    assert {verdict.cells()[-1] for target, verdict in beyond.items() if target in missed} == {"MISSED"}


def test_targets_of_layers():
    def limits(*arguments):
        return {target: (verdict.value, verdict.limit) for target, verdict in verdicts(*arguments).items()}

    assert limits(LARGE, TWO_RANKS) == {
        "one / floor": (1.1, 1.1),
        "all / (one + 1.15 all-reduces)": (pytest.approx(3.25 / 3.4), 1),
        "all / (one + 1.15 all-reduces in place)": (pytest.approx(3.25 / (1.1 + 1.15 * 2.1)), 1),
        "(all - all-reduces in place) / F.batch_norm": (pytest.approx(1.15 / 1.2), 1),
        "one, relu / one": (pytest.approx(1.15 / 1.1), 1.05),
        "one, add, relu / one": (pytest.approx(1.15 / 1.1), 1.05),
    }
    quick = limits(LARGE, {**TWO_RANKS, "all_reduces_between": 1.1})["all / (one + 1.15 all-reduces in place)"]
    assert quick == (pytest.approx(3.25 / 3.4), 1)  # never less than the bare ones alone
    small = limits(LARGE._replace(kind=cases.SMALL), ONE_RANK)
    assert small["one / floor"][1] == 1.4
    assert small["one / F.batch_norm"] == (pytest.approx(1.1 / 1.2), pytest.approx(1 / 1.5))
    assert "one / floor" not in limits(LARGE._replace(dtype=torch.bfloat16), ONE_RANK)
    assert limits(LARGE._replace(kind=cases.TINY), {"alone": 3.0, "module": 2.0}) == {
        "one / nn.BatchNorm2d": (1.5, 1.5)
    }
    on_gpu = limits(LARGE, {**ONE_RANK, "torch_sync": 2.0}, CUDA)
    assert on_gpu["one / floor"][1] == 1.25
    assert on_gpu["all / torch.nn.SyncBatchNorm"] == (0.55, pytest.approx(1 / 1.5))
    assert "one / F.batch_norm" not in on_gpu


def test_a_noisy_verdict_says_so():
    noisy = seconds(**ONE_RANK) | {targets.FLOOR: Timing(1.0, 0.8, 1.3)}
    first, second, *_ = targets.verdicts(LARGE, noisy, CPU)
    assert first.cells() == ["one / floor", "1.10", "<= 1.1", "met, noisy"]
    assert first.cell() == "1.10 (<= 1.1)"
    assert second.noisy is False


def test_cases_are_named():
    assert [case.name for case in cases.cases(CPU, only="bf16 56x56")] == [
        "32x64x56x56 bf16 NCHW",
        "32x64x56x56 bf16 NHWC",
    ]
    assert {case.shape[0] for case in cases.cases(CPU, quick=True)} == {2}
    assert all((case.megabytes >= 12) == (case.kind == cases.LARGE) for case in cases.cases(CPU))
    assert cases.cases(CUDA)[0].shape == (256, 64, 56, 56)
    with pytest.raises(RuntimeError, match=r"expected --only to name some of 32x64x56x56 fp32 NCHW, .*, got 'fp8'"):
        cases.cases(CPU, only="fp8")


@pytest.mark.parametrize("case", cases.cases(CPU, quick=True)[:-1], ids=lambda case: case.name)
def test_the_floor_reads_all_of_the_memory(case):
    x, dy = (case.random(CPU, torch.Generator().manual_seed(seed)) for seed in range(2))
    memory = [tensor.as_strided((tensor.numel(),), (1,)).view(torch.float32) for tensor in (x, dy)]
    assert torch.equal(floor.PASSES["moments"](x, dy), memory[0].sum())
    assert torch.equal(floor.PASSES["normalize"](x, dy), x)
    assert torch.equal(floor.PASSES["reduce_grad"](x, dy), torch.dot(*memory))
    assert torch.equal(floor.PASSES["grad_input"](x, dy), memory[0] + memory[1])
    fresh = floor.layer(x)()
    assert all(torch.equal(copy, x) and copy.stride() == x.stride() for copy in fresh)
    parameters = [torch.ones(2, requires_grad=True) for _ in range(2)]
    y, dx, *of_parameters = floor.layer_in_autograd(x.requires_grad_(), parameters, dy)()
    assert all(torch.equal(copy, x) and copy.stride() == x.stride() for copy in (y, dx))
    assert [gradient.shape for gradient in of_parameters] == [(2,), (2,)]


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


def test_kernels_are_found_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "syncnorm.kernels.cpu", syncnorm.kernels.reference)
    assert list(kernels.available(CPU)) == ["reference", "cpu"]
    monkeypatch.setitem(sys.modules, "syncnorm.kernels.cpu", None)
    assert list(kernels.available(CPU)) == ["reference"]

    def not_compiled(name):
        raise OSError(f"{name}: cannot open shared object file")

    with monkeypatch.context() as patch:
        patch.setattr(kernels.importlib, "import_module", not_compiled)
        assert list(kernels.available(CPU)) == list(kernels.available(CUDA)) == ["reference"]
    monkeypatch.setitem(sys.modules, "syncnorm.kernels.triton", syncnorm.kernels.reference)
    assert list(kernels.available(CUDA)) == ["reference", "triton"]


def test_a_kernel_that_computes_something_else_is_not_timed():
    one = torch.ones(3)
    kernels.check("it", (one, None), (one + 5e-5, None))
    with pytest.raises(RuntimeError, match=r"expected it to agree with the reference to 0\.0001, got 0\.01"):
        kernels.check("it", (1.01 * one,), (one,))
    with pytest.raises(RuntimeError, match="expected it to return None, got tensor"):
        kernels.check("it", (one,), (None,))


def test_the_share_of_collectives(monkeypatch):
    clock, group = Stopwatch(), LocalCommunicator()
    monkeypatch.setattr("syncnorm.testing.time.perf_counter", clock)
    group.all_reduce = clock.candidate("all_reduce", 3.0)
    group.all_reduce = lambda tensor, wait=group.all_reduce: wait() or tensor
    timed = train.TimedCommunicator(group)
    compute = clock.candidate("compute", 2.0)

    def step():
        compute()
        timed.all_reduce(torch.ones(1))
        timed.all_reduce(torch.ones(1))

    step()  # is not counted
    assert train.waiting(step, timed, 4, clock) == (0.75, 2)


def test_resnet_50_is_torchvisions():
    with torch.device("meta"):
        model = resnet.ResNet(resnet.BLOCKS[50], lambda channels, relu: torch.nn.BatchNorm2d(channels))
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == 53


def test_candidates_of_train_are_one_model():
    images = torch.randn(4, 3, 32, 32)
    alone = job.Job(LocalCommunicator(), CPU)
    outputs = [train.Training(name, alone, (1, 1, 1, 1), 8, images).model(images) for name in train.CANDIDATES]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-4)


def read(path, stdout):
    """Return the rows and the targets that a benchmark wrote, after comparing the header with what it printed."""
    record = json.loads(path.read_text())
    for name, value in record["header"].items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(value)}$", stdout, re.MULTILINE), name
    return record["rows"], record.get("targets")


JOBS = [("alone", 1), ("torchrun", 2), ("mpirun", 2)]
CANDIDATES = ["floor", "floor in autograd", "F.batch_norm", "F.batch_norm, relu", "F.batch_norm, add, relu"]
CANDIDATES += [
    "syncnorm per rank",
    "syncnorm per rank, relu",
    "syncnorm per rank, add, relu",
    "composed of all-reduces",
]
OF_SEVERAL = ["syncnorm", "two all-reduces", "floor with two all-reduces"]
OPTIONAL = {"fairscale", "torch.nn.SyncBatchNorm"}


@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_layer(bench, tmp_path, launcher, ranks):
    files = {name: tmp_path / f"layer.{name}" for name in ("json", "markdown", "figure")}
    files["figure"] = files["figure"].with_suffix(".png")
    only = "28x28 fp32" if ranks > 1 else ""
    options = [word for name, path in files.items() for word in (f"--{name}", path)]
    done = bench(launcher, ranks, "layer", "--quick", "--only", only, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("forward + backward on") == 1
    rows, judged = read(files["json"], done.stdout)
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
        kind = of["floor"]["kind"]
        expected = CANDIDATES + OF_SEVERAL * (ranks > 1) + ["nn.BatchNorm2d"] * (kind == "tiny")
        assert of.keys() - OPTIONAL == set(expected)
        for row in of.values():
            low, high = row["quartiles_us"]
            assert 0 < low <= row["median_us"] <= high
            assert row["ratio"] == pytest.approx(row["median_us"] / of["floor"]["median_us"])
        verdicts = {v["target"]: v for v in judged if (v["case"], v["memory"]) == (name, memory)}
        for verdict in verdicts.values():
            assert verdict["met"] is (verdict["value"] <= verdict["limit"])
        relu = of["syncnorm per rank, relu"]["median_us"] / of["syncnorm per rank"]["median_us"]
        assert kind == "tiny" or verdicts["one, relu / one"]["value"] == pytest.approx(relu)
        assert ("all / (one + 1.15 all-reduces)" in verdicts) is (ranks > 1 and kind != "tiny")
    assert done.stdout.count("met") + done.stdout.count("MISSED") == len(judged)
    written = files["markdown"].read_text()
    assert f"torch {torch.__version__}" in written
    assert all(written.count(f"| {name} | {memory} |") == 2 for name, memory in by_case)
    assert files["figure"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("launcher", "ranks"), [JOBS[0], JOBS[2]])
def test_kernels(bench, tmp_path, launcher, ranks):
    out = tmp_path / "kernels.json"
    done = bench(
        launcher, ranks, "kernels", "--quick", "--only", "28x28", "--json", out, "--markdown", tmp_path / "k.md"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows, _ = read(out, done.stdout)
    device = CUDA if torch.cuda.is_available() else CPU
    listed = [case.name for case in cases.cases(device, quick=True, only="28x28")]
    made = ["floor", *kernels.available(device)]
    named = [(row["case"], row["kernel"], row["implementation"]) for row in rows]
    assert named == [(case, kernel, name) for case in listed for kernel in floor.PASSES for name in made]
    for row in rows:
        low, high = row["quartiles_us"]
        assert 0 < low <= row["median_us"] <= high
        assert row["ratio"] == pytest.approx(row["median_us"] / row["floor_us"])
        assert row["floor_us"] > 0
        assert row["implementation"] != "floor" or row["ratio"] == 1
    assert (tmp_path / "k.md").read_text().count("| moments | reference |") == len(listed)


@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_train(bench, tmp_path, launcher, ranks):
    out = tmp_path / "train.json"
    done = bench(launcher, ranks, "train", "--quick", "--batch", 3, "--json", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows, _ = read(out, done.stdout)
    assert [row["norm"] for row in rows] == list(train.CANDIDATES)
    norms = 1 + 4 * 3 + 4  # of the stem, the blocks and their shortcuts
    for row in rows:
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["images_per_step"] == 3 * ranks
        assert row["images_per_second"] == pytest.approx(1000 * 3 * ranks / row["median_ms"])
        assert row["ratio"] == pytest.approx(row["median_ms"] / rows[0]["median_ms"])
        synchronizes = ranks > 1 and row["norm"] != "BN"
        assert row["norm_collectives_per_step"] == 2 * norms * synchronizes
        assert 0 < row["norm_collectives_share"] < 1 if synchronizes else row["norm_collectives_share"] == 0


KEEP = """
import resource
import torch
from syncnorm.bench import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
assert memory.keep()
for _ in range(8):
    faults()  # the heap grows until it has room
print(returned, faults())
"""


def test_memory_that_is_kept_has_no_page_faults(tmp_path):
    script = tmp_path / "keep.py"
    script.write_text(KEEP)
    done = launch("alone", 1, script)
    assert done.returncode == 0, done.stderr
    returned, kept = map(int, done.stdout.split())
    assert kept < returned / 4


def test_matplotlib_is_asked_for(tmp_path):
    script = tmp_path / "no_matplotlib.py"
    script.write_text("import sys\nsys.modules['matplotlib'] = None\nimport syncnorm.bench.figure")
    done = launch("alone", 1, script)
    assert done.returncode == 1
    assert "RuntimeError: python -m syncnorm bench layer --figure draws with matplotlib" in done.stderr


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
def test_what_cannot_be_measured_or_written_is_refused_before(bench, arguments, error):
    done = bench("alone", 1, *arguments)
    assert done.returncode != 0
    assert error in done.stderr.replace("'", "")
    assert done.stdout == ""


def test_quick_cases_go_by_the_names_of_the_whole_ones():
    (case,) = cases.cases(CPU, quick=True, only="16x256x56x56")
    assert case.shape == (2, 256, 56, 56)
