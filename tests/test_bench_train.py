"""bench/train.py and bench/resnet.py: steps of a ResNet, really timed. Nothing asserts a speed."""

import pytest
import torch
from benchmarks import JOBS, Stopwatch, bench, read

from syncnorm.bench import job, resnet, train
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import TimedCommunicator

CPU = torch.device("cpu")


def test_the_share_of_collectives(monkeypatch):
    clock, group = Stopwatch(), LocalCommunicator()
    monkeypatch.setattr("syncnorm.testing.time.perf_counter", clock)
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
        model = resnet.ResNet(resnet.BLOCKS[50], lambda channels, relu: torch.nn.BatchNorm2d(channels))
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == 53


def test_candidates_of_train_are_one_model():
    images = torch.randn(4, 3, 32, 32)
    alone = job.Job(LocalCommunicator(), CPU)
    outputs = [train.Training(name, alone, (1, 1, 1, 1), 8, images).model(images) for name in train.CANDIDATES]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("launcher", "ranks"), JOBS)
def test_train(tmp_path, launcher, ranks):
    out = tmp_path / "train.json"
    done = bench(launcher, ranks, "train", "--quick", "--batch", 3, "--json", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = read(out, done.stdout)["rows"]
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
