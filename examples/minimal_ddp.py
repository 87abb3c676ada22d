"""SyncBatchNorm with DistributedDataParallel: the same losses on any number of ranks, to rounding.

torchrun --nproc-per-node 2 examples/minimal_ddp.py, mpirun -n 2 python examples/minimal_ddp.py,
or python examples/minimal_ddp.py alone.
"""

import torch
from torch.nn.functional import cross_entropy

import syncnorm

group = syncnorm.init()  # NCCL where each rank has a GPU, else Gloo; mpi4py under mpirun
device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
torch.manual_seed(0)  # every rank makes the same model and the same batch
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten())
model = syncnorm.convert_sync_batchnorm(model.append(torch.nn.Linear(8 * 6 * 6, 10))).to(device)
if group.size > 1:
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
images, labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
images, labels = (whole.tensor_split(group.size)[group.rank].to(device) for whole in (images, labels))
for step in range(5):
    optimizer.zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()  # SyncBatchNorm sums over the ranks, DistributedDataParallel averages the gradients
    optimizer.step()
    mean = group.all_reduce(loss.detach().clone()) / group.size
    print(f"rank {group.rank} of {group.size}: step {step}, loss {mean.item():.6f}")
