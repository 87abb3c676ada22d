"""Does BatchNorm make the loss smoother? The loss and its gradient along the gradient, while a plain CNN trains.

From time to time the training looks ahead from where it is, on the batch of its next step: it goes against the gradient
by 1/2 to 4 times the learning rate, as in Santurkar et al., 2018, and comes back. Three numbers say how smooth the loss
is there:

- the variation of the loss: the range of the losses found,
- the change of the gradient: its largest l2 distance from the gradient at the start ("gradient predictiveness"),
- the effective β-smoothness: the largest ratio of such a distance to the distance gone.

All networks start with convolutions of the same scale, and take steps of the same learning rates. The gradient is that
of all parameters. There remain two differences that are not of smoothness. A network whose loss falls faster spends
more of its steps at low losses, where all three numbers are low. So they are compared over all steps, as in the paper,
and once more where the loss is within a band that each network passes. And where gradients are shorter, the same rate
takes shorter steps. So the table has the change of the gradient relative to its length too.

The numbers span two orders of magnitude in the course of a training. So their averages are geometric means, or the
first steps would decide, and what is compared are the logarithms of these.
"""

import math

import datasets
import numpy as np
import torch
from common import batch_of_step
from figures import NAMES
from spread import Value
from torch.nn.functional import cross_entropy
from words import listed

from experiments.claim import FAILS, HOLDS, Claim, Verdict, only_if
from experiments.loop import smoothed, train
from experiments.models import NORMS, plain_cnn
from experiments.panel import WIDTH, panel
from experiments.weights import kept, put
from syncnorm.report import Table

COMPARED = ("none", "bn", "gn", "ln")
RATES = (0.01, 0.03, 0.1)
EVERY = 10  # steps from one look ahead to the next
BATCH = 64
AHEAD = (0.5, 1, 2, 4)  # times the learning rate
BAND = (0.1, 1)  # of losses, at which networks are compared
WAYS = ("mean {}", "{} at equal losses")
MEASURES = {  # units, and digits in the report
    "variation of the loss": ("nats", 4),
    "change of the gradient": ("nats per unit of weights", 2),
    "effective β-smoothness": ("nats per squared unit", 1),
}
RELATIVE = "relative change of the gradient"


def cases(quick):
    rates, steps = ((0.03,), 180) if quick else (RATES, 300)
    return [({"norm": norm, "lr": lr, "steps": steps}, 0.013 * steps) for lr in rates for norm in COMPARED]


def measure(seed, norm, lr, steps):
    images, labels = datasets.load()[0]
    torch.manual_seed(seed)
    model = plain_cnn(1, 10, NORMS[norm])
    found = {}

    def after_step(step):
        if (step + 1) % EVERY == 0:
            batch = batch_of_step(step + 1, BATCH, len(images), seed)
            found[step + 1] = look_ahead(model, images[batch], labels[batch], lr)

    losses = train(model, images, labels, steps=steps, batch=BATCH, lr=lr, seed=seed, after_step=after_step)
    within = [numbers for loss, *numbers in found.values() if BAND[0] <= loss <= BAND[1]]
    metrics = {"last loss": smoothed(losses)[-1].item()}
    for i, name in enumerate((*MEASURES, RELATIVE)):
        curve = {step: numbers[i] for step, (_loss, *numbers) in found.items()}
        metrics[f"mean {name}"] = geometric_mean(curve.values())
        metrics[f"{name} at equal losses"] = geometric_mean(numbers[i] for numbers in within)
        if name in MEASURES:
            metrics[name] = curve
    return metrics


def look_ahead(model, images, labels, lr):
    """Return the loss here, and the numbers of MEASURES and the relative change of the gradient ahead."""
    here = kept(model)
    loss, gradient = loss_and_gradient(model, images, labels)
    length = norm_of(gradient)
    losses, changes, ratios = [], [], []
    for rate in (times * lr for times in AHEAD):
        put(model, [weight - rate * part for weight, part in zip(here, gradient, strict=True)])
        loss_there, there = loss_and_gradient(model, images, labels)
        losses.append(loss_there)
        changes.append(norm_of([new - old for new, old in zip(there, gradient, strict=True)]))
        ratios.append(changes[-1] / (rate * length))
    put(model, here)
    return loss, max(losses) - min(losses), max(changes), max(ratios), max(changes) / length


def loss_and_gradient(model, images, labels):
    loss = cross_entropy(model(images), labels)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def norm_of(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def geometric_mean(numbers):
    logs = [math.log(max(number, 1e-12)) for number in numbers]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def lower(data, lr, ways):
    """Return the measures that are clearly lower with BatchNorm than without norms, in all these ways."""
    pairs = {
        name: [[logarithm(data.value(way.format(name), norm=norm, lr=lr)) for norm in ("none", "bn")] for way in ways]
        for name in MEASURES
    }
    return [name for name, found in pairs.items() if all(without.clearly_above(norm) for without, norm in found)]


def logarithm(value):
    return Value(tuple(np.log(value.numbers)))


def judge(data):
    rates = data.all("lr")
    lr = middle(rates)
    norm, without = (
        [data.value(f"mean {name}", norm=norm, lr=lr).text(digits) for name, (_unit, digits) in MEASURES.items()]
        for norm in ("bn", "none")
    )
    variation, (_, digits) = next(iter(MEASURES.items()))
    equal = [data.value(f"{variation} at equal losses", norm=norm, lr=lr).text(digits) for norm in ("bn", "none")]
    return Verdict(
        held({lr: lower(data, lr, WAYS[:1]) for lr in rates}, {lr: lower(data, lr, WAYS) for lr in rates}),
        f"Along the gradient, at a learning rate of {lr:g}, the loss varies by {norm[0]} nats with BatchNorm and by "
        f"{without[0]} nats without norms. The gradient changes by {norm[1]} with BatchNorm and by {without[1]} "
        f"without. The effective β-smoothness is {norm[2]} with BatchNorm and {without[2]} without. While the loss is "
        f"between 0.1 and 1, it varies by {equal[0]} nats with BatchNorm and by {equal[1]} nats without.",
        table(data),
    )


def middle(rates):
    return rates[len(rates) // 2]


def held(over_steps, both_ways):
    """Return the verdict by the measures that are lower, by rate: over all steps, and at equal losses too."""
    common = [name for name in MEASURES if all(name in names for names in over_steps.values())]
    whole = [lr for lr, names in over_steps.items() if len(names) == len(MEASURES)]
    if all(len(names) == len(MEASURES) for names in both_ways.values()):
        return HOLDS
    if len(whole) == len(over_steps):
        return only_if("networks are compared at equal steps, not at equal losses")
    if whole:
        return only_if(f"the learning rate is {listed([f'{lr:g}' for lr in whole], 'or')}")
    return only_if(f"smoothness is the {listed(common, 'or the')}") if common else FAILS


def table(data):
    columns = {way.format(name): digits for way in WAYS for name, (_unit, digits) in MEASURES.items()}
    columns[f"mean {RELATIVE}"] = 2
    sections = [
        [
            [
                NAMES[norm],
                f"{lr:g}",
                *(data.value(metric, norm=norm, lr=lr).text(digits) for metric, digits in columns.items()),
            ]
            for norm in COMPARED
        ]
        for lr in data.all("lr")
    ]
    note = (
        f"All are geometric means over steps. At equal losses: over those with a loss from {BAND[0]:g} to {BAND[1]:g}."
    )
    headings = [metric.removeprefix("mean ") for metric in columns]
    return Table("", ["norm", "learning rate", *headings], sections, names=1, note=note)


def draw(plt, data):
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.4), layout="constrained")
    for axis, (name, (unit, _digits)) in zip(axes, MEASURES.items(), strict=True):
        lr = middle(data.all("lr"))
        curves = {norm: data.curve(name, norm=norm, lr=lr) for norm in COMPARED}
        panel(axis, curves, xlabel="step (number)", ylabel=unit, title=name, logy=True, labels=axis is axes[-1])
    figure.suptitle(f"learning rate {lr:g}", size=10)
    return figure


CLAIM = Claim(
    name="smoothness",
    title="Smoothness of the loss",
    sentence="BatchNorm makes the loss smoother.",
    source="[Santurkar et al., 2018](https://arxiv.org/abs/1805.11604)",
    experiment="A plain CNN of 6 convolutions is trained on digits with each norm. From time to time, the loss and its "
    "gradient are evaluated at 1/2 to 4 times the learning rate along the gradient.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "From left to right: the variation of the loss, the change of the gradient, and the effective β-smoothness "
        "along the gradient, against the step, with each norm. Lower is smoother."
    ),
)
