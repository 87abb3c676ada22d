"""Noise that shifts what the layers of a network see, and measurements of the shift from one step to the next.

Shapes: N samples, C channels.
"""

import itertools

import torch
from common import batch_of_step
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from experiments.weights import kept, put

MEAN, SCALE, JITTER = 0.5, 0.25, 0.1  # of noise: the largest mean, the largest growth, and their change by sample
IMAGES = 128  # on which the inputs of layers are compared
TINY = 1e-12  # keeps the shift of a layer without any gradient or variance at 0


class Noise(nn.Module):
    """A norm, then scale * x + mean, where both are random by channel and step, and a little by sample.

    The noise is a function of `step`, so that what is measured at a step sees the noise of its training.
    """

    def __init__(self, norm, seed, strength):
        super().__init__()
        self.norm, self.seed, self.strength, self.step = norm, seed, strength, 0

    def forward(self, x):  # (N, C, H, W)
        random = torch.Generator().manual_seed(1_000_000 * self.seed + self.step)
        n, c = x.shape[:2]
        mean, growth = MEAN * uniform(random, c), SCALE * (uniform(random, c) + 1) / 2  # (C,)
        mean = mean + JITTER * uniform(random, n, c)  # (N, C)
        growth = growth + JITTER * torch.randn(n, c, generator=random)  # (N, C)
        return self.norm(x) * (1 + self.strength * growth)[..., None, None] + self.strength * mean[..., None, None]


def uniform(random, *shape):
    """Return numbers from -1 to 1."""
    return 2 * torch.rand(*shape, generator=random) - 1


def set_step(layers, step):
    for module in layers.modules():
        if isinstance(module, Noise):
            module.step = step


class Shift:
    """Measures the shift from some steps to the next.

    Args:
        model: a Sequential of layers.
        images: (N, C, H, W).
        labels: (N,).
        batch: samples of a step of the training.
        seed: of the order of the samples.
        every: steps from one measurement to the next.
    """

    def __init__(self, model, images, labels, *, batch, seed, every):
        self.model, self.images, self.labels = model, images, labels
        self.batch, self.seed, self.every = batch, seed, every
        self.found = {}  # {step: (shift of inputs, shift of gradients, difference of gradients, cosine of gradients)}

    def after_step(self, step):
        """Measure, if it is time to; the training calls it when the update of a step is done."""
        if step % self.every == 0 and step > 0:
            self.found[step] = self.of_inputs(step), *self.of_gradients(step)
        set_step(self.model, step + 1)
        if (step + 1) % self.every == 0:
            self.before = [kept(layer) for layer in self.model]
            self.moments = self.moments_of_inputs()

    @torch.no_grad()
    def moments_of_inputs(self):
        """Return the mean and standard deviation, (2, C), of the input of each layer but the first."""
        outputs = itertools.accumulate(self.model[:-1], lambda x, layer: layer(x), initial=self.images[:IMAGES])
        return [torch.stack([x.mean((0, 2, 3)), x.std((0, 2, 3))]) for x in itertools.islice(outputs, 1, None)]

    def of_inputs(self, step):
        """Return the mean over layers of the distance of their inputs, in standard deviations."""
        set_step(self.model, step + 1)
        pairs = zip(self.moments, self.moments_of_inputs(), strict=True)
        set_step(self.model, step)
        return average((new - old).norm() / old[1].norm().clamp_min(TINY) for old, new in pairs)

    def of_gradients(self, step):
        """Return the means over layers of the relative distance, the distance and the cosine of their gradients.

        Layers before the one that is looked at are as after the step, the others as before it, with their noise.
        """
        batch = batch_of_step(step, self.batch, len(self.images), self.seed)
        after = [kept(layer) for layer in self.model]
        old = [weight_of(layer).grad.flatten() for layer in self.model]
        for layer, values in zip(self.model, self.before, strict=True):
            put(layer, values)
        pairs = []
        for i in range(1, len(self.model)):
            put(self.model[i - 1], after[i - 1])
            set_step(self.model[i - 1], step + 1)
            loss = cross_entropy(self.model(self.images[batch]), self.labels[batch])
            pairs.append((old[i], torch.autograd.grad(loss, weight_of(self.model[i]))[0].flatten()))
        put(self.model[-1], after[-1])
        return (
            average((g - h).norm() / g.norm().clamp_min(TINY) for g, h in pairs),
            average((g - h).norm() for g, h in pairs),
            average(cosine_similarity(g, h, 0) for g, h in pairs),
        )


def weight_of(layer):
    return next(parameter for parameter in layer.parameters() if parameter.ndim > 1)


def average(numbers):
    return torch.stack(list(numbers)).mean().item()
