"""Does BatchNorm train faster because it reduces internal covariate shift?

If it did, BatchNorm with more shift than a network without norms would train no faster than that. So noise whose mean
and scale are drawn anew for each step and channel follows each BatchNorm, as in Santurkar et al., 2018. Shift, from one
step to the next, is measured in two ways:

- of inputs: how far the mean and the standard deviation of each channel of a layer's input move, on images that stay
  the same: the 2-Wasserstein distance of two normal distributions, relative to the standard deviation. It includes the
  noise.
- of gradients: how far the gradient of a layer's weight moves when the layers before it, with their noise, go from one
  step to the next, on the batch of that step. This is the definition of Santurkar et al., which counts what a layer
  sees of the shift: the next BatchNorm takes out much of what noise changes in its inputs. The distance is relative to
  the gradient, whose length differs between networks.

The noise is part of the network in training, so the losses of noisy networks include it.

All networks are compared at the learning rate, out of several, at which the one without norms is fastest. That is in
its favour: the others are faster at higher rates.

Shapes: N samples, C channels.
"""

import itertools
import math

import datasets
import torch
from figures import STYLES
from words import listed

from experiments.claim import FAILS, HOLDS, Claim, Verdict, only_if
from experiments.convergence import TARGET
from experiments.evaluation import best_rate
from experiments.loop import SMOOTHED, smoothed, steps_to, train
from experiments.models import NORMS, plain_cnn
from experiments.panel import CHOICE, WIDTH, panel
from experiments.shift import Noise, Shift
from syncnorm.report import Table

RATES = (0.01, 0.02, 0.03, 0.05, 0.1)
EVERY = 10  # steps from one measurement to the next
BATCH = 64
NAMES = {("none", 0): "no norm", ("bn", 0): "BatchNorm", ("bn", 1): "with noise", ("bn", 2): "twice the noise"}
PLAIN, NORM, NOISY, _ = NAMES
LOOKS = dict(zip(NAMES, [STYLES["none"], STYLES["bn"], CHOICE[1], CHOICE[3]], strict=True))  # colours and markers
SHIFTS = ("shift of inputs", "shift of gradients")
METRICS = (*SHIFTS, "difference of gradients", "cosine of gradients")


def cases(quick):
    rates, steps = ((0.03,), 160) if quick else (RATES, 300)
    return [
        ({"norm": norm, "noise": noise, "lr": lr, "steps": steps}, 0.016 * steps)
        for norm, noise in NAMES
        for lr in rates
    ]


def network(norm, noise, seed):
    seeds = itertools.count(100 * seed)
    make = NORMS[norm]
    return plain_cnn(1, 10, (lambda channels: Noise(make(channels), next(seeds), noise)) if noise else make)


def measure(seed, norm, noise, lr, steps):
    images, labels = datasets.load()[0]
    torch.manual_seed(seed)
    model = network(norm, noise, seed)
    shift = Shift(model, images, labels, batch=BATCH, seed=seed, every=EVERY)
    losses = train(model, images, labels, steps=steps, batch=BATCH, lr=lr, seed=seed, after_step=shift.after_step)
    curves = {metric: {step: found[i] for step, found in shift.found.items()} for i, metric in enumerate(METRICS)}
    return {
        "steps to the loss": steps_to(TARGET, losses),
        "loss": {i + SMOOTHED: loss for i, loss in enumerate(smoothed(losses).tolist()) if i % EVERY == 0},
        **{metric: curves[metric] for metric in SHIFTS},
        **{f"mean {metric}": sum(curve.values()) / len(curve) for metric, curve in curves.items()},
    }


def fastest_rate(data, network):
    """Return the learning rate at which a network is fastest."""
    norm, noise = network
    return best_rate(data, "steps to the loss", norm=norm, noise=noise)


def of(data, metric, network, lr):
    norm, noise = network
    return data.value(metric, norm=norm, noise=noise, lr=lr)


def slower(one, other):
    """Return whether a number of steps is clearly above another; either may be infinite."""
    if math.isinf(one.mean) or math.isinf(other.mean):
        return min(one.numbers) > max(other.numbers)
    return one.clearly_above(other)


def steps_text(value, data):
    return value.text(0) if math.isfinite(value.mean) else f"more than {data.all('steps')[0]}"


def judge(data):
    lr = fastest_rate(data, PLAIN)
    steps = {network: of(data, "steps to the loss", network, lr) for network in NAMES}
    shifts = {name: {network: of(data, f"mean {name}", network, lr) for network in NAMES} for name in SHIFTS}
    words = [steps_text(steps[network], data) for network in NAMES]
    inputs = [shifts["shift of inputs"][network].text(4) for network in NAMES]
    return Verdict(
        held(steps, shifts),
        f"In a step at a learning rate of {lr:g}, the best without norms, the inputs of layers shift by {inputs[1]} of "
        f"their standard deviation with BatchNorm, by {inputs[0]} without norms, and by {inputs[2]} with BatchNorm "
        f"and noise. A loss of {TARGET} takes {words[1]} steps with BatchNorm, {words[0]} without norms, and "
        f"{words[2]} with BatchNorm and noise. With noise twice as strong, it takes {words[3]} steps.",
        table(data, lr),
    )


def held(steps, shifts):
    less = [name for name in SHIFTS if shifts[name][PLAIN].clearly_above(shifts[name][NORM])]
    more = [name for name in SHIFTS if shifts[name][NOISY].clearly_above(shifts[name][PLAIN])]
    if not less or not slower(steps[PLAIN], steps[NORM]):
        return FAILS
    if slower(steps[PLAIN], steps[NOISY]):
        unrefuted = [f"the {name}" for name in less if name not in more]
        return only_if(f"what counts is {listed(unrefuted, 'or')}") if unrefuted else FAILS
    shown = [f"the {name}" for name in less if name in more and slower(steps[NOISY], steps[NORM])]
    if shown:
        return HOLDS if len(shown) == len(SHIFTS) else only_if(f"what counts is {listed(shown)}")
    return only_if("correlation counts as proof, since the noise decides nothing")


def table(data, lr):
    rows = [
        [
            name,
            steps_text(of(data, "steps to the loss", network, lr), data),
            steps_text(of(data, "steps to the loss", network, fastest_rate(data, network)), data),
            *(of(data, f"mean {metric}", network, lr).text(4) for metric in METRICS),
        ]
        for network, name in NAMES.items()
    ]
    columns = ["network", f"steps to a loss of {TARGET}", "steps at its own best rate", *METRICS]
    note = (
        f"All but the steps at the best rate is at a learning rate of {lr:g}. Shifts, differences and cosines are from "
        "one step to the next, averaged over layers and the training. The shift of gradients is their difference "
        "relative to their length."
    )
    return Table("", columns, [rows], names=1, note=note)


def draw(plt, data):
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), layout="constrained")
    lr = fastest_rate(data, PLAIN)
    for axis, metric, ylabel, title in (
        (axes[0, 0], "loss", "loss (nats)", "training"),
        (axes[1, 0], "shift of inputs", "shift per step (standard deviations)", "shift of inputs"),
        (axes[1, 1], "shift of gradients", "shift per step (of the gradient)", "shift of gradients"),
    ):
        curves = {(norm, noise): data.curve(metric, norm=norm, noise=noise, lr=lr) for norm, noise in NAMES}
        panel(axis, curves, xlabel="step (number)", ylabel=ylabel, title=title, logy=True, names=NAMES, styles=LOOKS)
    curves = {
        network: (
            [of(data, "mean shift of inputs", network, rate).mean for rate in data.all("lr")],
            [of(data, "steps to the loss", network, rate) for rate in data.all("lr")],
        )
        for network in NAMES
    }
    panel(
        axes[0, 1],
        curves,
        xlabel="shift of inputs (standard deviations)",
        ylabel=f"steps to a loss of {TARGET} (number)",
        title="speed against shift, by rate",
        logx=True,
        ticks=(0.001, 0.01, 0.1, 1),
        names=NAMES,
        styles=LOOKS,
    )
    return figure


CLAIM = Claim(
    name="covariate-shift",
    title="Internal covariate shift",
    sentence="BatchNorm works because it reduces internal covariate shift.",
    source="[Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167); disputed by "
    "[Santurkar et al., 2018](https://arxiv.org/abs/1805.11604)",
    experiment="A plain CNN of 6 convolutions is trained on digits without norms, with BatchNorm, and with BatchNorm "
    "whose outputs are shifted and scaled at random in each step. The shift from step to step is measured.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Top left: the loss of each network against the step. Top right: the steps to a loss of 0.1 against the shift "
        "of inputs, a point for each learning rate. Bottom: the shift of inputs and of gradients against the step."
    ),
)
