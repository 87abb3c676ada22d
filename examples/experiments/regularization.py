"""Does BatchNorm regularize, and do LayerNorm and RMSNorm hardly do? Gaps between test and training loss, few samples.

Ioffe and Szegedy report that a network with BatchNorm wants less Dropout; Luo et al. trace it to the noise of the
batch's statistics, which falls with the batch size. A perceptron learns 300 digits. There the batch's statistics are
noisier than in a CNN, where each is taken over many pixels.

Networks are compared at an equal training loss, in eval mode, and not after equal steps: the gap of every network grows
while it fits its samples, so that whichever fits faster would seem to regularize less. Each norm has, for each batch
size, its best learning rate by the test loss there. A batch of all 300 samples has statistics without noise.
"""

import functools
import math

import datasets
import torch
from figures import NAMES
from spread import Value
from torch import nn
from words import listed

import syncnorm
from experiments.claim import FAILS, HOLDS, Claim, Verdict, only_if
from experiments.evaluation import best_rate, loss_and_error, percent
from experiments.loop import train
from experiments.models import FEATURE_NORMS, draw_as_he, perceptron
from experiments.panel import WIDTH, panel
from syncnorm.report import Table

NORMS = {
    norm: FEATURE_NORMS.get(norm, functools.partial(syncnorm.GroupNorm, 10))
    for norm in ("none", "bn", "gn", "ln", "rms")
}
SAMPLES = 300  # of a training
TEST_IMAGES = 1497
TARGET = 0.01  # the training loss in nats, within a factor of 2, at which networks are compared
POINTS = 60  # of a training, at which the losses are taken
RUNS = {  # the steps of each rate, by batch size: so many that the target is reached, at the lowest rates too
    8: {0.003: 1200, 0.01: 1200, 0.03: 1200},
    32: {0.003: 1200, 0.01: 400, 0.03: 400},
    128: {0.01: 400, 0.03: 200, 0.1: 200},
    SAMPLES: {0.01: 400, 0.03: 200, 0.1: 200},
}


def cases(quick):
    folds = 1 if quick else 3
    return [
        ({"norm": norm, "batch": batch, "lr": lr, "steps": steps, "folds": folds}, (0.001 * steps + 0.2) * folds)
        for norm in NORMS
        for batch, runs in RUNS.items()
        for lr, steps in (list(runs.items())[1:2] if quick else runs.items())
        if not quick or batch in (8, 128)
    ]


def fold(number):
    """Return ((images, labels) to train on, all others) of the digits: the training sets do not overlap."""
    images, labels = (torch.cat(parts) for parts in zip(*datasets.load(), strict=True))
    mine = torch.zeros(len(labels), dtype=torch.bool)
    mine[number * SAMPLES : (number + 1) * SAMPLES] = True
    return [(images[which].flatten(1), labels[which]) for which in (mine, ~mine)]


def measure(seed, norm, batch, lr, steps, folds):
    trained = [measure_fold(number, seed, norm, batch, lr, steps) for number in range(folds)]
    return {metric: sum(of_fold[metric] for of_fold in trained) / folds for metric in trained[0]}


def measure_fold(number, seed, norm, batch, lr, steps):
    """Return the numbers of one training: at the target, nan if it is not reached, and at the end."""
    (inputs, labels), rest = fold(number)
    torch.manual_seed(seed)
    model = perceptron(inputs.shape[1], 10, NORMS[norm], nn.ReLU)
    draw_as_he(model, nn.Linear)
    near, last = [], {}

    def test(step):
        if (step + 1) % (steps // POINTS) and step + 1 < steps:
            return
        loss = loss_and_error(model, inputs, labels)[0]
        if TARGET / 2 < loss < 2 * TARGET or step + 1 == steps:
            test_loss, test_error = loss_and_error(model, *rest)
            last.update({"training loss": loss, "test loss": test_loss, "test error": test_error})
            last["gap"] = test_loss - loss
            near.extend([dict(last)] if TARGET / 2 < loss < 2 * TARGET else [])

    train(model, inputs, labels, steps=steps, batch=batch, lr=lr, seed=seed, after_step=test)
    at_target = {name: sum(one[name] for one in near) / len(near) if near else math.nan for name in last}
    moments = {"at the target": at_target, "at the end": last}
    return {f"{name} {when}": value for when, numbers in moments.items() for name, value in numbers.items()}


def at_best(data, metric, norm, batch, when="at the target"):
    """Return a number at the rate of the smallest gap."""
    case = {"norm": norm, "batch": batch}
    return data.value(f"{metric} {when}", lr=best_rate(data, "gap at the target", **case), **case)


def error(data, norm, batch, when="at the target"):
    """Return the test error in percent at the rate of the smallest gap."""
    return percent(at_best(data, "test error", norm, batch, when), TEST_IMAGES)


def gap(data, norm, batches):
    return Value.over([at_best(data, "gap", norm, batch) for batch in batches])


def regularizes(data, norm, batches):
    return gap(data, "none", batches).clearly_above(gap(data, norm, batches))


def as_claimed(data, batches):
    regular = {norm for norm in ("bn", "ln", "rms") if regularizes(data, norm, batches)}
    return regular == {"bn"}


def sizes_as_claimed(data, batches):
    """Return the batch sizes at which the claim holds, as a clause, if they are all up to or all from one size."""
    found = [batch for batch in batches if as_claimed(data, [batch])]
    if found and found == batches[: len(found)]:
        return f"the batch has at most {found[-1]} samples"
    if found and found == batches[-len(found) :]:
        return f"the batch has at least {found[0]} samples"
    return None


def judge(data):
    batches = [batch for batch in data.all("batch") if batch < SAMPLES]
    gaps = {norm: gap(data, norm, batches) for norm in NORMS}
    if as_claimed(data, batches):
        held = HOLDS
    elif clause := sizes_as_claimed(data, batches):
        held = only_if(clause)
    elif regularizes(data, "bn", batches):
        less = all(gaps[norm].clearly_above(gaps["bn"]) for norm in ("ln", "rms"))
        held = only_if('"hardly" means less than BatchNorm' if less else "it is about BatchNorm alone")
    else:
        held = FAILS
    return Verdict(
        held,
        f"At a training loss of about {TARGET}, the test loss is {gaps['bn'].text(3)} higher with BatchNorm, "
        f"{gaps['ln'].text(3)} with LayerNorm, {gaps['rms'].text(3)} with RMSNorm and {gaps['none'].text(3)} without a "
        f"norm, on the mean over batch sizes {listed(map(str, batches))}.{_without_noise(data)}",
        table(data, batches),
    )


def _without_noise(data):
    """Return a sentence on batches of all samples, if there are such runs."""
    if SAMPLES not in data.all("batch"):
        return ""
    bn, none = (gap(data, norm, [SAMPLES]).text(3) for norm in ("bn", "none"))
    batches = [batch for batch in data.all("batch") if batch < SAMPLES]
    bn_error, none_error = (Value.over([error(data, norm, batch) for batch in batches]) for norm in ("bn", "none"))
    return (
        f" With all {SAMPLES} samples in the batch, whose statistics have no noise, it is {bn} higher with BatchNorm "
        f"and {none} without a norm. By the test error, BatchNorm's is "
        f"{'clearly' if none_error.clearly_above(bn_error) else 'not clearly'} lower: {bn_error.text(1)} and "
        f"{none_error.text(1)} %, on the same mean."
    )


def table(data, batches):
    columns = ["norm", *(f"gap, batch {batch}" for batch in data.all("batch")), "gap, mean", "error, mean (%)"]
    rows = [
        [
            NAMES[norm],
            *(gap(data, norm, [batch]).text(3) for batch in data.all("batch")),
            gap(data, norm, batches).text(3),
            Value.over([error(data, norm, batch) for batch in batches]).text(1),
            Value.over([error(data, norm, batch, "at the end") for batch in batches]).text(1),
        ]
        for norm in NORMS
    ]
    return Table(
        "",
        [*columns, "last error, mean (%)"],
        [rows],
        names=1,
        note=f"The gap is the test loss less the training loss, in nats. Means are over batches below {SAMPLES}.",
    )


def draw(plt, data):
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.9), layout="constrained")
    sizes = data.all("batch")
    for axis, number, ylabel in (
        (axes[0], lambda norm, batch: gap(data, norm, [batch]), "test loss - training loss (nats)"),
        (axes[1], lambda norm, batch: error(data, norm, batch), "test error (%)"),
    ):
        curves = {
            norm: ([batch * 1.04**place for batch in sizes], [number(norm, batch) for batch in sizes])
            for place, norm in enumerate(NORMS, -2)  # beside one another, so that the spreads can be told apart
        }
        panel(axis, curves, xlabel="batch (samples, logarithmic)", ylabel=ylabel, logx=True, ticks=sizes)
    return figure


CLAIM = Claim(
    name="regularization",
    title="Regularization",
    sentence="BatchNorm regularizes a little; LayerNorm and RMSNorm hardly do.",
    source="[Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167), "
    "[Luo et al., 2019](https://arxiv.org/abs/1809.00846) of BatchNorm; texts that compare norms of the others",
    experiment="A perceptron learns 300 digits, with each norm and several batch sizes, and labels the 1497 others.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Left: the gap between test and training loss, at an equal training loss, against the batch size, with each "
        "norm. Right: the test error there."
    ),
)
