"""bench/cases.py: which tensors are timed, and how they are chosen by name."""

import pytest
import torch

from syncnorm.bench import cases

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_cases_are_named():
    assert [case.name for case in cases.cases(CPU, only="bf16 56x56")] == [
        "32x64x56x56 bf16 NCHW",
        "32x64x56x56 bf16 NHWC",
    ]
    assert all((case.megabytes >= 12) == (case.kind == cases.LARGE) for case in cases.cases(CPU))
    on_gpu = cases.cases(CUDA)
    assert [case.kind for case in on_gpu[:2]] == [cases.TINY, cases.LARGE]
    assert on_gpu[1].shape == (256, 64, 56, 56)
    assert len(on_gpu) == len(cases.cases(CPU))
    with pytest.raises(RuntimeError, match=r"expected --only to name some of 32x64x56x56 fp32 NCHW, .*, got 'fp8'"):
        cases.cases(CPU, only="fp8")


def test_quick_cases_go_by_the_names_of_the_whole_ones():
    (case,) = cases.cases(CPU, quick=True, only="16x256x56x56")
    assert (case.kind, case.shape) == (cases.LARGE, (2, 8, 8, 8))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_quick_cases_are_small_and_differ(device):
    listed = cases.cases(device, quick=True)
    assert len({case.name for case in listed}) == len(listed)
    of_all = {(case.kind, case.dtype, case.layout) for case in cases.cases(device)}
    assert {(case.kind, case.dtype, case.layout) for case in listed} == of_all
    assert max(case.megabytes for case in listed) < 0.01


def test_a_generator_draws_on_its_own_device():
    case = cases.Case(cases.SMALL, (3, 4, 5, 6), torch.bfloat16, "NHWC")
    x = case.random(CPU, torch.Generator(CPU).manual_seed(1), mean=2.0)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    drawn = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)) + 2
    assert torch.equal(x, drawn.to(torch.bfloat16))
