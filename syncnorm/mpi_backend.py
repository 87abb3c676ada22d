"""Importing this module registers the "mpi4py" backend of torch.distributed. The code is in `syncnorm.mpi`."""

from .mpi.backend import BACKEND, MpiProcessGroup, MpiWork

__all__ = ["BACKEND", "MpiProcessGroup", "MpiWork"]
