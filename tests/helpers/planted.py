"""Models with a fault that shows only on several ranks, and the same model without one, for `testing.verify`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributed.nn.functional import all_reduce

import syncnorm

EXAMPLES = Path(__file__).parents[2] / "examples"


def group():
    return syncnorm.communicator()


def sound():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 5),
    )


def with_second_norm(norm):
    """The converted model, whose layer 4 is this one."""
    model = syncnorm.convert_sync_batchnorm(sound())
    model[4] = norm
    return model


def one_left():
    return with_second_norm(nn.BatchNorm2d(8))


def in_a_group_of_one():
    return with_second_norm(syncnorm.SyncBatchNorm(8, process_group=syncnorm.new_subgroups(1)))


def built_by_rank():
    torch.manual_seed(group().rank)
    return sound()


class OtherMomentum(syncnorm.SyncBatchNorm):
    def forward(self, x):
        given = self.momentum
        self.momentum = given if group().size == 1 else 1 - given
        y = super().forward(x)
        self.momentum = given
        return y


def other_momentum():
    return with_second_norm(OtherMomentum(8))


class LocalVariance(nn.BatchNorm2d):
    """Normalizes by the whole batch, and keeps statistics of its own shard."""

    def forward(self, x):
        y = syncnorm.functional.sync_batch_norm(x, None, None, self.weight, self.bias, training=True)
        if group().size == 1 or len(x):
            F.batch_norm(x, self.running_mean, self.running_var, None, None, True, self.momentum)
        return y


def local_variance():
    return with_second_norm(LocalVariance(8))


class Averaged(nn.BatchNorm2d):
    """The recipe of detectron2's NaiveSyncBatchNorm: ranks weigh equally, and the variance is the biased one."""

    def forward(self, x):
        if group().size == 1:
            return super().forward(x)
        means = torch.cat([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = (all_reduce(means) / group().size).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - mean * scale).view(-1, 1, 1)


def averaged():
    model = sound()
    model[1], model[4] = Averaged(8), Averaged(8)
    return model


class Forward(nn.BatchNorm2d):
    """Its backward pass takes the statistics for constants."""

    def forward(self, x):
        if group().size == 1:
            return super().forward(x)
        with torch.no_grad():
            counted = {"num_batches_tracked": self.num_batches_tracked}
            syncnorm.functional.sync_batch_norm(x, self.running_mean, self.running_var, training=True, **counted)
            mean, square = (all_reduce(m) / group().size for m in (x.mean((0, 2, 3)), x.square().mean((0, 2, 3))))
        return F.batch_norm(x, mean, square - mean.square(), self.weight, self.bias, False, 0.0, self.eps)


def forward_alone():
    return with_second_norm(Forward(8))


class Skipping(nn.Sequential):
    def forward(self, x):
        for i, layer in enumerate(self):
            if i != 4 or group().rank != 1:
                x = layer(x)
        return x


def skipped_on_a_rank():
    return Skipping(*sound())


class Waiting(nn.Identity):
    def forward(self, x):
        if group().rank == 1:
            dist.barrier()
        return x


def waiting_for_ever():
    return nn.Sequential(Waiting(), *sound())


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


def random_layer():
    return nn.Sequential(*sound()[:8], FunctionalDropout(), nn.Linear(8, 5))


class Standardized(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


def functional_batch_norm():
    return nn.Sequential(nn.Conv2d(3, 8, 3), Standardized(), *sound()[2:])


class Shifted(nn.Module):
    def forward(self, x):
        return x + 1000


def shifted():
    """The fault of `averaged` in float32 is that E[x^2] - E[x]^2 cancels."""
    return nn.Sequential(Shifted(), Averaged(3), nn.Conv2d(3, 4, 3))


def no_gradient():
    return nn.Sequential(nn.Flatten(), nn.Identity())


def no_norms():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LayerNorm(8 * 6 * 6), nn.Linear(8 * 6 * 6, 5))


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))


def no_module():
    return [sound()]


def example(name):
    """A module of the examples."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return __import__(name)


def example_cnn():
    return example("cnn").cnn(3, 10, nn.BatchNorm2d)


def example_transformer():
    transformer = example("transformer")
    return transformer.Transformer(2, 16, 2, 12, transformer.BatchNorm)
