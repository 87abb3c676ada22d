"""`import syncnorm.mpi_backend` makes "mpi4py" a backend of torch.distributed. The code is in `syncnorm.mpi`."""

from .mpi.backend import BACKEND, MpiProcessGroup, MpiWork

__all__ = ["BACKEND", "MpiProcessGroup", "MpiWork"]
