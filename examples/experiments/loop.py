"""Training of a small model in one process, by the loop that all examples share."""

import math

import torch
from torch.nn.functional import cross_entropy
from training import option_parser, parsed, training_loop

from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import TimedCommunicator

SMOOTHED = 20  # steps


def train(
    model, inputs, targets, *, steps, batch, lr, seed, momentum=0.9, loss=cross_entropy, decay=None, after_step=None
):
    """Train by stochastic gradient descent; return the loss of each step.

    Args:
        model: trained in place, in train mode.
        inputs: (N, ...).
        targets: (N, ...).
        steps: of training.
        batch: samples of a step.
        lr: learning rate.
        seed: of the order of the samples.
        momentum: of SGD.
        loss: (outputs, targets) -> scalar.
        decay: warm the learning rate up and let it fall to 0 in so many steps; None keeps it constant.
        after_step: called with the number of each step, from 0, when its update is done.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return train_with(
        model,
        optimizer,
        lambda net, which: loss(net(inputs[which]), targets[which]),
        len(inputs),
        steps=steps,
        batch=batch,
        seed=seed,
        decay=decay,
        after_step=after_step,
    )


def train_with(model, optimizer, loss_of, samples, *, steps, batch, seed, decay=None, after_step=None):
    """Train with an optimizer and a loss of your own, loss_of(model, which): the numbers of the samples, (batch,)."""
    words = {"--steps": steps, "--batch-per-rank": batch, "--seed": seed, "--lr": optimizer.param_groups[0]["lr"]}
    if decay:
        words["--decay"] = decay
    args = parsed(option_parser("", steps=steps, lr=0.1), [str(word) for option in words.items() for word in option])
    args.norm = ""
    alone = LocalCommunicator()

    def track(steps):
        for step in steps:
            yield step
            if after_step:
                after_step(step)

    record = training_loop(
        args,
        alone,
        model,
        TimedCommunicator(alone),
        optimizer,
        lambda net, which, _share: loss_of(net, which),
        samples,
        {},
        track,
    )
    return record["loss"]


def smoothed(losses):
    """Return the means of SMOOTHED losses in a row, as a tensor."""
    return torch.tensor(losses).unfold(0, SMOOTHED, 1).mean(1)


def steps_to(target, losses):
    """Return the steps after which the smoothed loss is first below the target, infinity if it never is."""
    reached = (smoothed(losses) < target).nonzero()
    return reached[0].item() + SMOOTHED if len(reached) else math.inf
