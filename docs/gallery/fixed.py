"""Train a small CNN on 16 images a step, divided over the ranks, and print the loss of all 16."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncnorm

BATCH, STEPS, CLASSES = 16, 40, 10


def build():
    """Return the model."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES)),
    )
    return syncnorm.convert_sync_batchnorm(model)


def batch(step):
    """Return the images and labels of a step, the same on all ranks."""
    generator = torch.Generator().manual_seed(step)
    patterns = torch.randn(CLASSES, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return patterns[labels] + torch.randn(BATCH, 3, 12, 12, generator=generator), labels


def main():
    """Train on the ranks that torchrun has started."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, STEPS + 1):
        images, labels = (tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in batch(step))
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(whole := loss.detach() / dist.get_world_size())
        if dist.get_rank() == 0 and (step == 1 or step % 10 == 0):
            print(f"step {step:2}  loss {whole:.4f}")
    del model, optimizer, loss  # PyTorch may abort if they outlive the process group
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
