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
    assert {case.shape[0] for case in cases.cases(CPU, quick=True)} == {2}
    assert all((case.megabytes >= 12) == (case.kind == cases.LARGE) for case in cases.cases(CPU))
    assert cases.cases(CUDA)[0].shape == (256, 64, 56, 56)
    with pytest.raises(RuntimeError, match=r"expected --only to name some of 32x64x56x56 fp32 NCHW, .*, got 'fp8'"):
        cases.cases(CPU, only="fp8")


def test_quick_cases_go_by_the_names_of_the_whole_ones():
    (case,) = cases.cases(CPU, quick=True, only="16x256x56x56")
    assert case.shape == (2, 256, 56, 56)
