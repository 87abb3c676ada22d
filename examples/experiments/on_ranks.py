"""Trainings of the CNN of cnn.py at a number of samples per rank, on real ranks or in one process, and what they send.

`of` ranks share a global batch of `of * samples`. They are as many processes as `ranks` says: 1 has the whole batch.
"""

import cnn
import datasets

import syncnorm
from experiments.models import Affine
from syncnorm.communicators import LocalCommunicator

LR = 0.05 / 64  # for each sample of the global batch
RECOMPUTED_OVER = 500  # images


def error(seed, norm, samples, of, ranks, seen, trainings):
    """Train on `seen` samples several times; return, on rank 0, the mean of the test errors, in percent."""
    group = syncnorm.communicator()
    found = []
    for training in range(trainings):
        args = _arguments(norm, samples * of, ranks, seen // (samples * of), trainings * seed + training)
        model, _ = cnn.train(args, group)
        if group.rank == 0:
            found.append({"error": error_of(model)})
            if norm == "bn":
                images = datasets.load()[0][0][:RECOMPUTED_OVER]
                syncnorm.recompute_running_stats(model, images.split(samples), LocalCommunicator())
                found[-1]["error, recomputed"] = error_of(model)
    return {metric: sum(one[metric] for one in found) / trainings for metric in (found[0] if found else ())}


def communication(seed, norms, samples, of, ranks, steps):
    """Return what a norm layer communicates in a step, and how far the losses are from those of one process."""
    layers = sum(isinstance(module, Affine) for module in cnn.cnn(1, 10, Affine).modules())
    found = {}
    for norm in norms:
        split, whole = (_arguments(norm, samples * of, processes, steps, seed) for processes in (ranks, 1))
        record, alone = cnn.train(split, syncnorm.communicator())[1], cnn.train(whole, LocalCommunicator())[1]
        for unit, number in record["per_step"]["norm"].items():
            found[f"{norm}: {unit}"] = number / layers
        found[f"{norm}: apart"] = max(abs(a - b) for a, b in zip(record["loss"], alone["loss"], strict=True))
    return found


def error_of(model):
    """Return the test error of a model in eval mode, in percent."""
    return 100 * (1 - cnn.evaluate(model, cnn.arguments([]), LocalCommunicator())["test_accuracy"])


def _arguments(norm, batch, ranks, steps, seed):
    options = {"--norm": norm, "--batch-per-rank": batch // ranks, "--steps": steps, "--decay": steps, "--seed": seed}
    return cnn.arguments([str(word) for option in (options | {"--lr": LR * batch}).items() for word in option])
