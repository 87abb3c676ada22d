"""bench/job.py: what a process alone with a GPU joins."""

import pytest
import torch

from syncnorm.bench import job
from syncnorm.communicators import LocalCommunicator


@pytest.fixture
def gpu(monkeypatch):
    """Let a benchmark find a GPU and NCCL; return the backends that it asks for."""
    asked = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    monkeypatch.setattr(job.dist, "is_nccl_available", lambda: True)
    return asked


def test_a_process_alone_has_a_group_of_its_own(monkeypatch, gpu):
    monkeypatch.setattr(job, "init", lambda backend="auto": gpu.append(backend) or LocalCommunicator())
    assert job.join().device == torch.device("cuda", 0)
    assert gpu == ["cuda:0", "nccl"]


def test_without_nccl_it_goes_on_with_a_warning(monkeypatch, gpu):
    def init(backend="auto"):
        gpu.append(backend)
        if backend == "nccl":
            raise RuntimeError("no socket interface found")
        return LocalCommunicator()

    monkeypatch.setattr(job, "init", init)
    with pytest.warns(UserWarning, match=r"torch\.nn\.SyncBatchNorm is not timed, since NCCL failed: no socket"):
        assert job.join().device == torch.device("cuda", 0)
    assert gpu == ["cuda:0", "nccl", "auto"]
