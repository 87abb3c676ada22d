"""Models of bytes, trained on the text of examples/transformer.py and tested on the part of it that is held out."""

import copy

import torch
import transformer

from experiments.loop import train_with
from syncnorm.communicators import LocalCommunicator


def samples_of(context, kind=transformer.Samples):
    """Return the samples of at most `context` bytes to train on, and those held out. `kind` makes them."""
    return transformer.data(None, context, torch.device("cpu"), kind)[:2]


def train_on_text(model, samples, *, steps, batch, lr, seed):
    """Train by Adam to predict the next byte; return the loss of each step, in nats per byte.

    Args:
        model: (inputs, mask) -> logits, as Transformer.
        samples: transformer.Samples.
        steps: of training.
        batch: samples of a step.
        lr: learning rate, constant.
        seed: of the order of the samples.
    """

    def loss_of(net, which):
        inputs, targets, mask = samples.batch(which)
        return transformer.nats(net(inputs, mask), targets) / mask.sum()

    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95))
    return train_with(model, optimizer, loss_of, len(samples), steps=steps, batch=batch, seed=seed)


def bits(model, samples, batch, training=False):
    """Return the bits per character, by the statistics of each batch (training) or in eval mode."""
    net = copy.deepcopy(model).train(training)
    return transformer.bits_per_character(net, samples, batch, LocalCommunicator())


def curve_of(losses, points=30):
    """Return {step: mean loss of the steps up to it}, for as many steps."""
    long = max(1, len(losses) // points)
    means = torch.tensor(losses)[: len(losses) // long * long].view(-1, long).mean(1).tolist()
    return {long * (i + 1): mean for i, mean in enumerate(means)}


def late(steps, values):
    """Return a curve without its first tenth, where the loss falls so far that the rest would look flat."""
    first = len(steps) // 10
    return steps[first:], values[first:]
