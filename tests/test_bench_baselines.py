"""bench/baselines.py: what others do is called as they do it."""

import pytest
import torch
import torch_sync_operators
from torch import nn

import syncnorm
from syncnorm.bench import baselines, cases, layer
from syncnorm.testing import run_ranks

CPU = torch.device("cpu")


def torch_sync_batch_norm(dtype, layout):
    operators = torch_sync_operators.define()
    group = syncnorm.communicator()
    case = cases.Case(cases.SMALL, (4, 3, 5, 5), dtype, layout)
    generator = torch.Generator().manual_seed(group.rank)
    x = case.random(CPU, generator, mean=2.0 * group.rank).requires_grad_()
    dy = case.random(CPU, generator)
    norm = baselines.TorchSyncBatchNorm(3)
    candidate = layer.Layer(norm, list(norm.parameters()), synchronized=True)
    found = candidate.step(x, dy)()
    layer.check("torch", found[:2], layer.expected(candidate, x, dy, group))
    whole = nn.BatchNorm2d(3)
    whole(torch.cat(group.all_gather(x.detach())).float())
    torch.testing.assert_close(norm.running_mean, whole.running_mean, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(norm.running_var, whole.running_var, rtol=1e-2, atol=1e-3)
    del operators
    return baselines.has_torch_group(), [gradient.shape for gradient in found[2:]]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "NCHW"), (torch.bfloat16, "NHWC")])
def test_the_function_of_torch_is_called_with_a_group_of_one_as_well(ranks, dtype, layout):
    """On the function itself, and on its operators for GPUs in plain PyTorch."""
    for has_group, shapes in run_ranks(torch_sync_batch_norm, ranks, dtype, layout):
        assert has_group
        assert shapes == [(3,), (3,)]


def test_torch_tells_whose_kernels_batch_norm_runs():
    assert baselines.batch_norm_kernels(nn.BatchNorm2d(3), torch.ones(2, 3, 4, 4)) == "native"
    assert {"Cudnn", "Native"} <= torch._C._BatchNormBackend.__members__.keys()


def test_without_a_group_torchs_function_is_left_out():
    assert not baselines.has_torch_group()
