"""SyncBatchNorm with mpi4py alone, no torch.distributed: the same losses on any number of ranks, to rounding.

mpirun -n 2 python examples/minimal_mpi.py, or python examples/minimal_mpi.py alone.
"""

import torch
from torch.nn.functional import cross_entropy

import syncnorm

group = syncnorm.init()  # under mpirun, MPI.COMM_WORLD
torch.manual_seed(group.rank)  # every rank makes its own model, and takes rank 0's below
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), syncnorm.SyncBatchNorm(8), torch.nn.ReLU(), torch.nn.Flatten())
model.append(torch.nn.Linear(8 * 6 * 6, 10))
images, labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
for tensor in [*model.state_dict().values(), images, labels]:
    group.broadcast(tensor)
images, labels = (whole.tensor_split(group.size)[group.rank] for whole in (images, labels))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(5):
    optimizer.zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()  # SyncBatchNorm sums over the ranks
    for parameter in model.parameters():
        group.all_reduce(parameter.grad).div_(group.size)  # what DistributedDataParallel does
    optimizer.step()
    mean = group.all_reduce(loss.detach().clone()) / group.size
    print(f"rank {group.rank} of {group.size}: step {step}, loss {mean.item():.6f}")
