"""bench/copy_baseline.py: the unit of the benchmarks moves all of the memory."""

import pytest
import torch

from syncnorm.bench import cases, copy_baseline

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", cases.cases(CPU, quick=True)[:-1], ids=lambda case: case.name)
def test_the_copies_read_all_of_the_memory(case):
    x, dy = (case.random(CPU, torch.Generator().manual_seed(seed)) for seed in range(2))
    memory = [tensor.as_strided((tensor.numel(),), (1,)).view(torch.float32) for tensor in (x, dy)]
    assert torch.equal(copy_baseline.PASSES["moments"](x, dy), memory[0].sum())
    assert torch.equal(copy_baseline.PASSES["normalize"](x, dy), x)
    assert torch.equal(copy_baseline.PASSES["reduce_grad"](x, dy), torch.dot(*memory))
    assert torch.equal(copy_baseline.PASSES["grad_input"](x, dy), memory[0] + memory[1])
    assert copy_baseline.LAYER_PASSES == 2 * 4  # each of 4 copies reads and writes
    fresh = copy_baseline.layer(x)()
    assert all(torch.equal(copy, x) and copy.stride() == x.stride() for copy in fresh)
    parameters = [torch.ones(2, requires_grad=True) for _ in range(2)]
    y, dx, *of_parameters = copy_baseline.layer_in_autograd(x.requires_grad_(), parameters, dy)()
    assert all(torch.equal(copy, x) and copy.stride() == x.stride() for copy in (y, dx))
    assert [gradient.shape for gradient in of_parameters] == [(2,), (2,)]
