"""How a trained model is judged, and which of several learning rates it is judged at.

Shapes: N samples.
"""

import math

import torch
from spread import Value
from torch.nn.functional import cross_entropy


def loss_and_error(model, inputs, labels):
    """Return the mean loss (nats) and the share of samples that are labelled wrong, in eval mode.

    The mode of the model is left as it was.
    """
    mode = model.training
    model.eval()
    with torch.no_grad():
        logits = model(inputs)
    model.train(mode)
    wrong = (logits.argmax(1) != labels).float().mean()
    return cross_entropy(logits, labels).item(), wrong.item()


def percent(error, images):
    """Return a Value of an error, the share of so many test images, in percent. It resolves no less than one image."""
    return Value(tuple(100 * number for number in error.numbers), resolution=100 / images)


def best_rate(data, metric, **settings):
    """Return the learning rate, of those run with these settings, at which a metric is lowest on the mean over seeds.

    A rate at which the metric is not finite for a seed comes last.
    """
    rates = data.where(**settings).all("lr")
    means = {lr: data.value(metric, lr=lr, **settings).mean for lr in rates}
    return min(rates, key=lambda lr: means[lr] if math.isfinite(means[lr]) else math.inf)
