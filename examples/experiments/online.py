"""Learning from one sample at a time, and what a norm does with a single vector."""

import datasets
import torch

from experiments.loop import train
from experiments.models import FEATURE_NORMS, NORMS, perceptron, plain_cnn
from experiments.on_ranks import error_of


def online(seed, norm, ranks, lr, steps):
    """Train a plain CNN with one sample a step; return the test error in eval mode and in train mode, in percent."""
    (images, labels), (tests, answers) = datasets.load()
    torch.manual_seed(seed)
    model = plain_cnn(1, 10, NORMS[norm])
    train(model, images, labels, steps=steps, batch=1, lr=lr, seed=seed)
    error = error_of(model)
    model.train()
    with torch.no_grad():
        guesses = torch.cat([model(test).argmax(1) for test in tests.split(1)])
    return {"error": error, "error in train mode": 100 * (guesses != answers).float().mean().item()}


def one_vector(seed, norm, ranks):
    """Return whether a perceptron in train mode refuses a single sample: 1 or 0."""
    torch.manual_seed(seed)
    try:
        perceptron(64, 10, FEATURE_NORMS[norm], torch.nn.ReLU)(datasets.load()[0][0][:1].flatten(1))
    except ValueError:
        return {"refused": 1}
    return {"refused": 0}
