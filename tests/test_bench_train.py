"""bench/train.py and bench/resnet.py: steps of a ResNet, really timed. Nothing asserts a speed."""

import pytest
import torch
from benchmarks import JOBS, Stopwatch, bench, read

from syncnorm.bench import baselines, job, resnet, timing, train
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import TimedCommunicator

CPU = torch.device("cpu")
ALONE = job.Job(LocalCommunicator(), CPU)


@pytest.mark.parametrize(
    ("calls", "share", "device", "met", "cell"),
    [
        (0, 0.0, "cpu", None, "0.0%"),  # BatchNorm, or one rank
        (10, 0.1, "cpu", True, "10.0% (<= 10%: met)"),
        (10, 0.11, "cpu", False, "11.0% (<= 10%: MISSED)"),
        (10, 0.11, "cuda", None, "11.0%"),
    ],
)
def test_the_target_of_the_share(calls, share, device, met, cell):
    time = timing.Timing(1.0, 1.0, 1.0)
    row = train.Row(train.SYNC, 4, 8, time, time, calls, share, None, torch.device(device))
    assert row.cells()[-1] == cell
    wanted = {"target": "norms' collectives / step", "value": share, "limit": 0.1, "noisy": False, "met": met}
    assert row.numbers()["target"] == (None if met is None else wanted)
    if met is not None:
        row = row._replace(timing=timing.Timing(1.0, 1.0, 2.0))
        assert row.cells()[-1] == cell.replace(")", ", noisy)")


def test_the_share_of_collectives(monkeypatch):
    clock, group = Stopwatch(), LocalCommunicator()
    monkeypatch.setattr("syncnorm.testing.timed.time.perf_counter", clock)
    group.all_reduce = clock.candidate("all_reduce", 3.0)
    group.all_reduce = lambda tensor, wait=group.all_reduce: wait() or tensor
    timed = TimedCommunicator(group)
    compute = clock.candidate("compute", 2.0)

    def step():
        compute()
        timed.all_reduce(torch.ones(1))
        timed.all_reduce(torch.ones(1))

    step()  # is not counted
    assert train.waiting(step, timed, 4, clock) == (0.75, 2)


def test_resnet_50_is_torchvisions():
    with torch.device("meta"):
        model = resnet.ResNet(resnet.BLOCKS[50], lambda channels, relu, add: torch.nn.BatchNorm2d(channels))
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == 53


@pytest.mark.parametrize("names", [train.CANDIDATES, train.WITH_LEAKY_RELU])
def test_candidates_of_train_are_one_model(names):
    images = torch.randn(4, 3, 32, 32)
    outputs = [train.Training(name, ALONE, (1, 1, 1, 1), 8, images).model(images) for name in names]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-4)


def gradients(training):
    training()
    return torch.cat([parameter.grad.flatten() for parameter in training.model.parameters()])


def test_a_resnet_in_place_trains_as_the_one_with_leaky_relu():
    images = torch.randn(4, 3, 32, 32)
    fused, in_place = (gradients(train.Training(name, ALONE, (2, 1), 8, images)) for name in train.WITH_LEAKY_RELU)
    torch.testing.assert_close(in_place, fused, rtol=1e-3, atol=1e-3 * fused.abs().max().item())
    relu = gradients(train.Training(train.FUSED, ALONE, (2, 1), 8, images))
    assert (relu - fused).abs().max() > 1e-3 * fused.abs().max()


def saved_bytes(name):
    """Return the size of what the backward of a step keeps, each memory once, without parameters and images."""
    images = torch.randn(2, 3, 64, 64)
    training = train.Training(name, ALONE, (2, 1), 8, images)
    storages = {}

    given = {tensor.untyped_storage().data_ptr() for tensor in (images, *training.model.parameters())}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() in given:
            return tensor
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = training.model(images)
    assert output.requires_grad
    return sum(storages.values())


def test_norms_in_place_keep_less_for_backward():
    separate, fused = saved_bytes(train.SYNC), saved_bytes(train.FUSED)
    leaky, in_place = map(saved_bytes, train.WITH_LEAKY_RELU)
    assert fused < separate
    assert in_place < 0.9 * leaky


@pytest.mark.parametrize("name", [*train.CANDIDATES, *train.WITH_LEAKY_RELU])
def test_a_training_as_on_a_gpu(name):
    """In bfloat16 by autocast, in channels-last memory. This runs on the CPU too."""
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    training = train.Training(name, ALONE, (1,), 8, images, autocast=True)
    seen = []
    for module in training.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    training()
    assert {(y.dtype, y.is_contiguous(memory_format=torch.channels_last)) for y in seen} == {(torch.bfloat16, True)}
    assert all(parameter.dtype == torch.float32 for parameter in training.model.parameters())
    assert training.images is images


def test_the_bytes_of_a_training_are_those_of_parameters_momentum_and_buffers():
    training = train.Training(train.BN, ALONE, (1,), 8, torch.randn(2, 3, 32, 32))
    training()
    parameters = 4 * sum(parameter.numel() for parameter in training.model.parameters())
    buffers = sum(buffer.nbytes for buffer in training.model.buffers())
    assert training.bytes() == 2 * parameters + buffers


class Memory:
    """The memory of a GPU, as torch.cuda counts it."""

    def __init__(self, others):
        self.allocated = self.peak = others

    def reset(self, device):
        self.peak = self.allocated

    def step(self):
        self.peak = max(self.peak, self.allocated + 500)


def test_the_peak_is_that_of_one_training_alone(monkeypatch):
    training = train.Training(train.BN, ALONE, (1,), 8, torch.randn(2, 3, 32, 32))
    training()
    memory = Memory(others=10_000)
    memory.peak = 99_999  # of another training
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", memory.reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory.peak)
    monkeypatch.setattr(train.Training, "__call__", lambda training: memory.step())
    assert train.peak_memory(training, CPU) == training.bytes() + 500
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_norms_by_device():
    assert train.candidates(CPU) == list(train.CANDIDATES)
    assert train.candidates(CPU, quick=True) == [*train.CANDIDATES, *train.WITH_LEAKY_RELU]
    assert train.candidates(torch.device("cuda")) == [*train.CANDIDATES, *train.WITH_LEAKY_RELU]  # without a group
    norm = train._norms(train.TORCH_SYNC, ALONE.group)(4, True, False)
    assert type(norm.norm) is baselines.TorchSyncBatchNorm


def test_a_norm_that_fails_is_told_and_the_others_are_timed():
    failures = []
    names = [train.BN, train.TORCH_SYNC]  # torch's kernels, without a group and on a CPU
    arguments = (ALONE, names, (1,), 8, (2, 3, 32, 32), train.QUICK_STEPS, timing.Budget(9.0, ALONE.group), failures)
    rows = list(train.measure(*arguments))
    assert [row.norm for row in rows] == [train.BN]
    [(norm, images, error)] = failures
    assert (norm, images) == (train.TORCH_SYNC, 2)
    assert error


def test_a_row_with_memory_has_a_cell_for_it():
    time = timing.Timing(0.002, 0.001, 0.003)
    row = train.Row(train.SYNC, 4, 8, time, time, 0, 0.0, 1_234_567_890, torch.device("cuda"))
    assert row.numbers()["peak_memory_mb"] == pytest.approx(1234.56789)
    assert dict(zip(train._columns(True), row.cells(), strict=True))["peak memory MB"] == "1,235"
    assert row._replace(memory=None).numbers()["peak_memory_mb"] is None
    assert len(row._replace(memory=None).cells()) == len(train._columns(False))


@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_train(tmp_path, launcher, ranks):
    out = tmp_path / "train.json"
    done = bench(launcher, ranks, "train", "--quick", "--batch", 3, 2, "--json", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    record = read(out, done.stdout)
    rows, names = record["rows"], [*train.CANDIDATES, *train.WITH_LEAKY_RELU]
    assert record["failures"] == []
    assert [(row["images_per_rank"], row["norm"]) for row in rows] == [
        (size, name) for size in (3, 2) for name in names
    ]
    norms = 1 + 3 + 1  # of the stem, the block and its shortcut
    for row in rows:
        size = row["images_per_rank"]
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["images_per_step"] == size * ranks
        assert row["images_per_second"] == pytest.approx(1000 * size * ranks / row["median_ms"])
        assert row["ratio"] == pytest.approx(row["median_ms"] / rows[0 if size == 3 else len(names)]["median_ms"])
        assert row["peak_memory_mb"] is None
        synchronizes = ranks > 1 and row["norm"] != "BN"
        assert row["norm_collectives_per_step"] == 2 * norms * synchronizes
        if synchronizes:
            assert row["target"]["met"] is (row["norm_collectives_share"] <= row["target"]["limit"] == 0.1)
        else:
            assert row["target"] is None
        assert 0 < row["norm_collectives_share"] < 1 if synchronizes else row["norm_collectives_share"] == 0
