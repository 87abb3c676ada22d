"""Does BatchNorm keep activations out of saturation, and do gamma and beta give the expressiveness back?

Ioffe and Szegedy show the inputs of one sigmoid of a perceptron with and without BatchNorm, and argue that gamma and
beta are needed since normalized inputs would hold a sigmoid in its linear part. As there, a perceptron of three layers
of 100 units learns handwritten digits with batches of about 60. Its weights are PyTorch's at first, or several times
larger, which saturates a network without a norm from the start.

The linear part is where the slope is at least 0.42 of the largest one: |x| < 2 of sigmoid, |x| < 1 of tanh. The share
of inputs that lie there is taken from the batches of the training, by layer and step. Expressiveness is judged by the
training loss, with gamma and beta and without. Each network has its best learning rate by that loss.
"""

import functools
import math

import datasets
import torch
from figures import NAMES, STYLES
from spread import Value
from torch import nn

from experiments.claim import FAILS, HOLDS, Claim, Verdict, only_if
from experiments.evaluation import best_rate, loss_and_error, percent
from experiments.loop import train
from experiments.models import FEATURE_NORMS, perceptron
from experiments.panel import WIDTH, panel
from syncnorm.report import COLOURS, Table

ACTIVATIONS = {"sigmoid": (nn.Sigmoid, 2), "tanh": (nn.Tanh, 1)}  # |x| < limit is the linear part
GAINS = (1, 5)  # of the first weights
RATES = (0.03, 0.1, 0.3, 1)
LAYERS = (1, 2, 3)
POINTS = 20  # of the training, evenly spaced, at which the shares are taken
NORMS = {
    "bn": FEATURE_NORMS["bn"],
    "fixed": functools.partial(FEATURE_NORMS["bn"], affine=False),
    "none": FEATURE_NORMS["none"],
}
LABELS = {"bn": "BatchNorm", "fixed": "no gamma, beta", "none": NAMES["none"]}
FIXED = COLOURS["blue"], "o"
TEST_IMAGES = 297


def cases(quick):
    rates, steps = ((0.1, 0.3), 260) if quick else (RATES, 1000)
    return [
        ({"activation": activation, "gain": gain, "norm": norm, "lr": lr, "steps": steps}, 0.0013 * steps)
        for activation in ACTIVATIONS
        for gain in GAINS
        for norm in NORMS
        for lr in rates
    ]


def measure(seed, activation, gain, norm, lr, steps):
    (images, labels), (test_images, test_labels) = datasets.load()
    torch.manual_seed(seed)
    kind, limit = ACTIVATIONS[activation]
    model = perceptron(64, 10, NORMS[norm], kind)
    with torch.no_grad():
        for linear, *_ in model[:-1]:
            linear.weight *= gain
    seen = watched([layer[-1] for layer in model[:-1]])
    shares = {layer: {} for layer in LAYERS}

    def note(step):
        if step % (steps // POINTS) == 0 or step == steps - 1:
            for layer, x in zip(LAYERS, seen, strict=True):
                shares[layer][step] = (x.abs() < limit).float().mean().item()

    losses = train(model, images.flatten(1), labels, steps=steps, batch=64, lr=lr, seed=seed, after_step=note)
    curves = {f"share in layer {layer}": share for layer, share in shares.items()}
    return curves | {
        "share": sum(sum(share.values()) / len(share) for share in shares.values()) / len(LAYERS),
        "last loss": sum(losses[-50:]) / 50,
        "test error": loss_and_error(model, test_images.flatten(1), test_labels)[1],
    }


def watched(modules):
    """Return a list of the tensors that the modules were given last, which each forward pass renews."""
    seen = [None] * len(modules)
    for place, module in enumerate(modules):
        module.register_forward_pre_hook(lambda _, given, place=place: seen.__setitem__(place, given[0].detach()))
    return seen


class Case:
    """The numbers of one activation and one scale of the first weights, by norm, each at its best rate."""

    def __init__(self, data, activation, gain):
        self.data, self.activation, self.gain = data, activation, gain
        self.words = f"{activation} and {weights(gain)}"
        self.settings = {norm: {"activation": activation, "gain": gain, "norm": norm} for norm in NORMS}
        for settings in self.settings.values():
            settings["lr"] = best_rate(data, "last loss", **settings)
        self.kept_linear = self.value("share", "bn").clearly_above(self.value("share", "none"))
        self.given_back = self.value("last loss", "fixed").clearly_above(self.value("last loss", "bn"))

    def kept_linear_at(self, lr):
        bn, none = (self.value("share", norm, lr=lr) for norm in ("bn", "none"))
        return bn.clearly_above(none)

    def value(self, metric, norm, **more):
        return self.data.value(metric, **self.settings[norm] | more)

    def shares(self, norm):
        """Return the steps and the shares there, for each layer."""
        return [self.data.curve(f"share in layer {layer}", **self.settings[norm]) for layer in LAYERS]

    def share_by_step(self, norm):
        """Return the steps and the mean of the layers' shares."""
        steps, shares = zip(*self.shares(norm), strict=True)
        return steps[0], [Value.over(at_step) for at_step in zip(*shares, strict=True)]

    def row(self, norm):
        at_end = [shares[-1].text(3) for _, shares in self.shares(norm)]
        error = percent(self.value("test error", norm), TEST_IMAGES)
        numbers = [self.value("share", norm).text(3), *at_end, self.value("last loss", norm).text(4), error.text(1)]
        return [self.activation, weights(self.gain), LABELS[norm], f"{self.settings[norm]['lr']:g}", *numbers]


def weights(gain):
    return "default weights" if gain == 1 else f"{gain} times larger weights"


def cases_of(data):
    return [Case(data, activation, gain) for activation in data.all("activation") for gain in data.all("gain")]


def condition(those, every):
    """Return the condition under which a case is one of `those` rather than another of `every`, as a clause."""
    for name, clause in (("activation", "the activation is {}"), ("gain", "the network starts with {}")):
        first = getattr(those[0], name)
        if those == [case for case in every if getattr(case, name) == first]:
            return clause.format(first if name == "activation" else weights(first))
    return "the network has " + ", or ".join(case.words for case in those)


def judge(data):
    every = cases_of(data)
    linear = [case for case in every if case.kept_linear]
    back = [case for case in every if case.given_back]
    both = [case for case in linear if case in back]
    if both == every:
        held = HOLDS
    elif both:
        held = only_if(condition(both, every))
    elif every in (linear, back):
        held = only_if("it is about saturation alone" if linear else "it is about gamma and beta alone")
    else:
        held = FAILS
    lower = [case for case in every if case.value("last loss", "bn").clearly_above(case.value("last loss", "none"))]
    slowest = min(data.all("lr"))
    slow = [case for case in every if case.kept_linear_at(slowest)]
    return Verdict(
        held,
        f"BatchNorm clearly raises the share of inputs in the linear part in {len(linear)} of {len(every)} cases, most "
        f"with {_most(every, 'share', 'none', 'bn', 3)}. With a learning rate of {slowest} for all, it does so in "
        f"{len(slow)}. Gamma and beta clearly lower the training loss in {len(back)}, most with "
        f"{_most(every, 'last loss', 'fixed', 'bn', 4)}. Without a norm it is clearly lower still in {len(lower)}.",
        table(every),
    )


def _most(every, metric, before, after, digits):
    """Return the case in which the ratio of a metric with two norms is largest, and the metric with both."""
    case = max(every, key=lambda case: abs(math.log(case.value(metric, after).mean / case.value(metric, before).mean)))
    old, new = (case.value(metric, norm).text(digits) for norm in (before, after))
    return f"{case.words}, from {old} to {new}"


def table(every):
    shares = ["mean share", *(f"last share, layer {layer}" for layer in LAYERS)]
    return Table(
        "",
        ["activation", "first weights", "norm", "learning rate", *shares, "training loss (nats)", "test error (%)"],
        [[case.row(norm) for norm in NORMS] for case in every],
        names=3,
        note="Shares are of inputs in the linear part. The mean share is that over layers and steps.",
    )


def draw(plt, data):
    every = cases_of(data)
    shown = functools.partial(panel, names=LABELS, styles=STYLES | {"fixed": FIXED})
    figure, axes = plt.subplots(3, 2, figsize=(WIDTH, 8.4), layout="constrained")
    for axis, case in zip(axes[:2].flat, every, strict=True):
        curves = {norm: case.share_by_step(norm) for norm in NORMS}
        axis.set_ylim(-0.03, 1.03)
        shown(axis, curves, xlabel="step (number)", ylabel="share in the linear part", title=case.words)
    for axis, activation in zip(axes[2], data.all("activation"), strict=True):
        of_activation = [case for case in every if case.activation == activation]
        words = [weights(case.gain).replace(" weights", "\nweights") for case in of_activation]
        curves = {norm: (words, [case.value("last loss", norm) for case in of_activation]) for norm in NORMS}
        shown(axis, curves, xlabel="", ylabel="last training loss (nats, logarithmic)", title=activation, logy=True)
    return figure


CLAIM = Claim(
    name="saturation",
    title="Saturation, gamma and beta",
    sentence="BatchNorm keeps activations out of saturation, and gamma and beta give the expressiveness back.",
    source="[Ioffe and Szegedy, 2015](https://arxiv.org/abs/1502.03167)",
    experiment=(
        "A perceptron learns digits with sigmoid or tanh: with BatchNorm, with BatchNorm that has no gamma and beta, "
        "and without a norm."
    ),
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Above: the share of inputs in the linear part of the activation, the mean of the layers, by step. "
        "Below: the last training loss with both scales of the first weights."
    ),
)
