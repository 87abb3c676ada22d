"""Does LayerNorm assume features of one kind? Two kinds of features of unlike scale go through a norm.

Ba et al. write that the units of a fully connected layer "make similar contributions", and that those of a convolution
do not: units near the boundary of an image have other statistics than the rest. Here two kinds are made on purpose.
The 32 outer pixels of a digit are multiplied by a scale, and the 32 inner ones, which are needed for the label, are
not. The first operation is a norm over all 64, the rest a perceptron with the same norm. Where the small features do
not get through, the error is that of a network whose inner pixels are erased, which is measured too.

Each norm has its best learning rate at each scale, by the training loss. Without a norm the features are divided by one
number, so that the same rates suit. Float64 shows whether rounding is the reason.
"""

import functools
import math

import datasets
import torch
from figures import NAMES
from torch import nn

import syncnorm
from experiments.claim import FAILS, HOLDS, Claim, Verdict, only_if
from experiments.evaluation import best_rate, loss_and_error, percent
from experiments.loop import train
from experiments.models import FEATURE_NORMS, perceptron
from experiments.panel import WIDTH, panel
from syncnorm.report import Table

SCALES = (1, 3, 10, 30, 100, 1000, math.inf)  # of the outer pixels; at infinity the inner ones are erased
ALIKE = 3  # times: a claim that needs more than that depends on the scale
RATES = (0.01, 0.03, 0.1, 0.3)
NORMS = {  # GroupNorm's two groups are the two kinds
    norm: FEATURE_NORMS.get(norm, functools.partial(syncnorm.GroupNorm, 2))
    for norm in ("none", "bn", "gn", "ln", "rms")
}
TEST_IMAGES = 297
POINTS = 20  # of the curve of the error
ERASED = "inner\nerased"


def cases(quick):
    scales, rates, steps = (SCALES[::2], RATES[1::2], 160) if quick else (SCALES, RATES, 500)
    last = max(filter(math.isfinite, scales))
    runs = [(norm, scale, "float32") for norm in NORMS for scale in scales] + [("ln", last, "float64")]
    return [
        ({"norm": norm, "scale": scale, "dtype": dtype, "lr": lr, "steps": steps}, 0.0012 * steps)
        for norm, scale, dtype in runs
        for lr in rates
    ]


def two_kinds(images, scale):
    """Return the pixels of (N, 1, 8, 8) digits as (N, 64): the 32 outer ones, scaled, then the 32 inner ones."""
    from_centre = torch.arange(8) - 3.5
    inner = (from_centre[:, None] ** 2 + from_centre**2 < 10).flatten()
    pixels = images.flatten(1)
    outer, inner = pixels[:, ~inner], pixels[:, inner]
    return torch.cat([outer, 0 * inner] if math.isinf(scale) else [scale * outer, inner], dim=1)


def measure(seed, norm, scale, dtype, lr, steps):
    (inputs, labels), (test_inputs, test_labels) = [
        (two_kinds(images.to(getattr(torch, dtype)), scale), labels) for images, labels in datasets.load()
    ]
    size = inputs.square().mean().sqrt() if norm == "none" else 1
    torch.manual_seed(seed)
    model = nn.Sequential(NORMS[norm](64), perceptron(64, 10, NORMS[norm], nn.ReLU, widths=(100, 100))).to(inputs.dtype)
    errors = {}

    def test(step):
        if (step + 1) % (steps // POINTS) == 0:
            errors[step + 1] = loss_and_error(model, test_inputs / size, test_labels)[1]

    losses = train(model, inputs / size, labels, steps=steps, batch=64, lr=lr, seed=seed, after_step=test)
    return {"last loss": sum(losses[-20:]) / 20, "error by step": errors, "test error": errors[steps]}


def error(data, norm, scale, dtype="float32"):
    """Return the test error in percent at the best rate."""
    case = {"norm": norm, "scale": scale, "dtype": dtype}
    return percent(data.value("test error", lr=best_rate(data, "last loss", **case), **case), TEST_IMAGES)


def finite_scales(data):
    return [scale for scale in data.all("scale") if math.isfinite(scale)]


def worse_from(data, norm):
    """Return the scale from which on the error is clearly above that at scale 1; infinity if there is none."""
    first, *others = finite_scales(data)
    base = error(data, norm, first)
    start = math.inf
    for scale in reversed(others):
        if not error(data, norm, scale).clearly_above(base):
            break
        start = scale
    return start


NOTE = (
    "Test error in percent, by the scale of the outer pixels. The two groups of GroupNorm are the outer and the inner "
    "pixels. Without a norm all pixels are divided by one number."
)


def judge(data):
    scales = finite_scales(data)
    last, ln, bn = scales[-1], worse_from(data, "ln"), worse_from(data, "bn")
    if math.isinf(ln) or bn <= last:
        held = FAILS
    elif ln <= ALIKE:
        held = HOLDS
    else:
        held = only_if(f"the scales differ by a factor of {ln} or more")
    columns = ["norm", *(f"{scale} times" for scale in scales), "inner erased"]
    rows = [[NAMES[norm], *(error(data, norm, scale).text(1) for scale in data.all("scale"))] for norm in NORMS]
    text = {(norm, scale): error(data, norm, scale).text(1, " %") for norm in NORMS for scale in data.all("scale")}
    return Verdict(
        held,
        f"With outer pixels {last} times larger, the test error is {text['ln', last]} with LayerNorm and "
        f"{text['bn', last]} with BatchNorm, after {text['ln', 1]} and {text['bn', 1]} with equal scales. "
        f"Without a norm it is {text['none', last]}, with LayerNorm in float64 "
        f"{error(data, 'ln', last, 'float64').text(1, ' %')}, and with LayerNorm and erased inner pixels "
        f"{text['ln', math.inf]}.",
        Table("", columns, [rows], names=1, note=NOTE),
    )


def draw(plt, data):
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.9), layout="constrained")
    ticks = [f"{scale:g}" if math.isfinite(scale) else ERASED for scale in data.all("scale")]
    curves = {norm: (ticks, [error(data, norm, scale) for scale in data.all("scale")]) for norm in NORMS}
    axes[0].axvspan(len(ticks) - 1.5, len(ticks) - 0.5, color="#EEEEEE", zorder=0)  # is no scale
    panel(axes[0], curves, xlabel="scale of the outer pixels (times)", ylabel="test error (%)")
    case = {"scale": finite_scales(data)[-1], "dtype": "float32"}
    by_step = {}
    for norm in NORMS:
        lr = best_rate(data, "last loss", norm=norm, **case)
        steps, values = data.curve("error by step", norm=norm, lr=lr, **case)
        by_step[norm] = steps, [percent(value, TEST_IMAGES) for value in values]
    panel(axes[1], by_step, xlabel="steps (number)", ylabel="test error (%)", title=f"scale {case['scale']}")
    return figure


CLAIM = Claim(
    name="mixed-features",
    title="Features of two kinds",
    sentence="LayerNorm assumes features of one kind.",
    source="after [Ba et al., 2016](https://arxiv.org/abs/1607.06450), section 6.7, who say it of the units of a layer",
    experiment=(
        "A perceptron that starts with a norm learns digits. Their 32 outer pixels are multiplied by a scale. The "
        "inner ones, which are needed for the label, are not."
    ),
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Left: the test error against the scale of the outer pixels, with each norm, and the error if the inner pixels "
        "are erased. Right: the test error by step at the largest scale."
    ),
)
