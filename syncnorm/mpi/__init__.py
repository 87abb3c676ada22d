"""MPI by mpi4py: a communicator, and a backend of torch.distributed.

Nothing else in the package imports mpi4py at run time.
"""
