"""A norm in eval mode that a tracer records: torch's own operations, which every exporter and quantizer knows."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .kernels import reference
from .kernels.epilogue import Epilogue

__all__ = ["batch_norm", "can_export"]


def can_export(input: Tensor, *others: Tensor | None) -> bool:
    """Return whether torch's operation takes these dtypes: parameters and buffers of one, which may be float32."""
    dtypes = {tensor.dtype for tensor in others if tensor is not None}
    return len(dtypes) == 1 and (dtypes == {input.dtype} or (input.dtype.itemsize == 2 and dtypes == {torch.float32}))


def batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    epilogue: Epilogue,
) -> Tensor:
    """Return y = activation((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)."""
    z = F.batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    y = reference.activate(z if residual is None else z + residual, epilogue.activation)
    return input.copy_(y) if epilogue.inplace else y
