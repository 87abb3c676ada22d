"""Does BatchNorm speed up convergence and allow larger learning rates? A plain CNN at many rates, with each norm."""

import math

import datasets
import torch
from figures import NAMES
from spread import Value
from words import listed, spanned

from experiments.claim import FAILS, HOLDS, Claim, Verdict, only_if
from experiments.evaluation import best_rate
from experiments.loop import smoothed, steps_to, train
from experiments.models import NORMS, plain_cnn
from experiments.panel import WIDTH, panel
from syncnorm.report import Table

TARGET = 0.1  # the loss to reach: nats
LARGER = 2  # times the rate
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
COMPARED = ("none", "bn", "gn", "ln", "rms")


def cases(quick):
    rates, steps = (RATES[1:-1], 150) if quick else (RATES, 300)
    return [({"norm": norm, "lr": lr, "steps": steps}, 0.008 * steps) for norm in COMPARED for lr in rates]


def measure(seed, norm, lr, steps):
    images, labels = datasets.load()[0]
    torch.manual_seed(seed)
    model = plain_cnn(1, 10, NORMS[norm])
    losses = train(model, images, labels, steps=steps, batch=64, lr=lr, seed=seed)
    return {"last loss": smoothed(losses)[-1].item(), "steps to the loss": steps_to(TARGET, losses)}


def largest_rate(data, norm):
    """Return the largest rate at which the last loss is below the target, over the seeds; 0 if there is none."""
    rates = data.all("lr")
    losses = [data.value("last loss", norm=norm, lr=lr).numbers for lr in rates]
    trained = [
        [lr for lr, loss in zip(rates, of_seed, strict=True) if loss < TARGET] for of_seed in zip(*losses, strict=True)
    ]
    return Value(tuple(max(of_seed, default=0) for of_seed in trained))


def fewest_steps(data, norm):
    """Return the rate at which the loss is reached in the fewest steps by all seeds, and these steps."""
    best = best_rate(data, "steps to the loss", norm=norm)
    return best, data.value("steps to the loss", norm=norm, lr=best)


def judge(data):
    rates = {norm: largest_rate(data, norm) for norm in COMPARED}
    best = {norm: fewest_steps(data, norm) for norm in COMPARED}
    without, steps = best["none"][1], best["bn"][1]
    larger = min(rates["bn"].numbers) >= LARGER * max(rates["none"].numbers)
    faster = math.isinf(without.mean) or without.clearly_above(steps)
    if larger and faster:
        held = HOLDS
    elif larger or faster:
        held = only_if("it is about the rate alone" if larger else "it is about the speed alone")
    else:
        held = FAILS
    rows = [[NAMES[norm], span(rates[norm]), f"{best[norm][0]:g}", best[norm][1].text(0)] for norm in COMPARED]
    note = (
        f"A rate trains if the last loss is below {TARGET} nats. Of the rates "
        f"{listed(f'{lr:g}' for lr in data.all('lr'))}, the best is the one with the fewest steps."
    )
    return Verdict(
        held,
        f"The largest learning rate that trains is {span(rates['bn'])} with BatchNorm and {span(rates['none'])} "
        f"without a norm. At the best rate of each, a loss of {TARGET} takes {steps.text(0)} steps with BatchNorm and "
        f"{without.text(0)} without.",
        Table(
            "",
            ["norm", "largest learning rate that trains", "best learning rate", f"steps to a loss of {TARGET}"],
            [rows],
            names=1,
            note=note,
        ),
    )


def span(value):
    """Return the smallest and the largest number of the seeds, or the only one."""
    return spanned(f"{number:g}" for number in sorted(value.numbers))


def draw(plt, data):
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.9), layout="constrained")
    rates = data.all("lr")
    for axis, metric, ylabel in zip(
        axes, ("last loss", "steps to the loss"), ("last loss (nats)", "steps to a loss of 0.1 (number)"), strict=True
    ):
        curves = {norm: (rates, [data.value(metric, norm=norm, lr=lr) for lr in rates]) for norm in COMPARED}
        panel(axis, curves, xlabel="learning rate (logarithmic)", ylabel=ylabel, logx=True, logy=True, ticks=rates[::2])
    axes[0].axhline(TARGET, color="#999999", linewidth=0.8, zorder=0)
    return figure


CLAIM = Claim(
    name="convergence",
    title="Convergence and learning rates",
    sentence="BatchNorm speeds up convergence and allows larger learning rates.",
    source="[Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167)",
    experiment="A plain CNN of 6 convolutions is trained on digits at constant learning rates, with each norm.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Left: the last loss of a plain CNN against the learning rate, with each norm. "
        "Right: the steps to a loss of 0.1."
    ),
)
