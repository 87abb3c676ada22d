"""Norms over sharded features in a tensor-parallel plan of `torch.distributed.tensor.parallel.parallelize_module`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .modules import LayerNorm, RMSNorm

__all__ = ["ShardedNorm"]


class ShardedNorm(ParallelStyle):
    """Parallelize a norm over features that are sharded over a tensor-parallel mesh.

    The norm is a `LayerNorm` or `RMSNorm`, of torch or of syncnorm, over one axis. Its statistics are those of the
    features of all ranks. For example, a query norm over all heads follows a `ColwiseParallel` projection:

        parallelize_module(model, mesh, {"attention.wq": ColwiseParallel(), "attention.q_norm": ShardedNorm()})

    Input and output are this rank's features, (*, D_rank), as `ColwiseParallel` returns them. Weight and bias become
    DTensors with placement `Shard(0)` on the mesh.

    Collectives: those of the norm, over the ranks of the mesh.

    Raises:
        TypeError: the module is not such a norm; in forward, the input is a DTensor, as
            `ColwiseParallel(use_local_output=False)` returns it.
        ValueError: the norm is over more than one axis, or the mesh has more than one dimension.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
            raise TypeError(f"expected a LayerNorm or an RMSNorm, got {type(module).__name__}")
        if len(module.normalized_shape) != 1:
            raise ValueError(f"expected a norm over one axis, got one over {module.normalized_shape}")
        norm = convert_in_place(module)  # in place: parallelize_module cannot replace a module
        norm.process_group = device_mesh
        for name, parameter in list(norm.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)])
            norm.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        norm.normalized_shape = (local_size(norm.normalized_shape[0], device_mesh),)
        return norm


def convert_in_place(module: nn.LayerNorm | nn.RMSNorm) -> LayerNorm | RMSNorm:
    """Turn torch's norm into syncnorm's, which has additional attributes. The module object stays the same."""
    if isinstance(module, LayerNorm | RMSNorm):
        return module
    attributes: dict[str, Any] = {} if isinstance(module, nn.LayerNorm) else {"eps_outside": False, "bias": None}
    module.__class__ = LayerNorm if isinstance(module, nn.LayerNorm) else RMSNorm
    for name, value in attributes.items():
        setattr(module, name, value)
    return module  # type: ignore[return-value]


def local_size(features: int, mesh: DeviceMesh) -> int:
    """Return the number of features that `Shard` assigns to this rank."""
    per_rank = -(-features // mesh.size())
    return max(0, min(per_rank, features - per_rank * mesh.get_local_rank()))
