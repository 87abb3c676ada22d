"""Does RMSNorm match LayerNorm, and does it matter whether epsilon is inside of its root?

A Transformer of bytes is trained with each norm, with the same initial weights and the same order of the samples for
each seed. So the norms are compared seed by seed, too. LayerNorm does two things that RMSNorm does not: it subtracts
the mean, and it adds a bias. LayerNorm without a bias tells which of them makes a difference, if there is one.

    inside of the root     x / sqrt(mean(x²) + eps)        torch.nn.RMSNorm, LLaMA
    outside of the root    x / (sqrt(mean(x²)) + eps)

The paper trains recurrent models of translation, image retrieval and others, and a Transformer of translation, until
they converge. Here a small Transformer is trained for one or two passes over a small text. Whether RMSNorm is faster is
not measured here.
"""

import functools
from typing import NamedTuple

import torch
import transformer
from figures import STYLES
from spread import Value

from experiments.claim import FAILS, HOLDS, Claim, Published, Verdict, only_if
from experiments.dots import dots
from experiments.panel import WIDTH, panel
from experiments.text import bits, curve_of, late, samples_of, train_on_text
from syncnorm.report import Table

CONTEXT, BATCH, AT_ONCE, RATE = 64, 16, 128, 0.005
USUAL, LARGE = 1e-6, 1e-2  # epsilon
MARGIN = 0.01  # of LayerNorm's bits: a smaller difference is a match
VARIANTS = {
    "ln": transformer.LayerNorm,
    "ln, no bias": functools.partial(transformer.LayerNorm, bias=False),
    "rms": transformer.RMSNorm,
    "rms, outside": functools.partial(transformer.RMSNorm, eps_outside=True),
}
VARIANT_NAMES = {
    "ln": "LayerNorm",
    "ln, no bias": "LayerNorm without bias",
    "rms": "RMSNorm, epsilon inside",
    "rms, outside": "RMSNorm, epsilon outside",
}
SHORT = {"ln, no bias": "LayerNorm, no bias", "rms": "RMSNorm, inside", "rms, outside": "RMSNorm, outside"}


def cases(quick):
    steps = 120 if quick else 1000
    found = [(norm, USUAL) for norm in VARIANTS] + ([] if quick else [("rms", LARGE), ("rms, outside", LARGE)])
    return [({"norm": norm, "eps": eps, "steps": steps}, 0.019 * steps + 0.3) for norm, eps in found]


def measure(seed, norm, eps, steps):
    train, held_out = samples_of(CONTEXT)
    torch.manual_seed(seed)
    model = transformer.Transformer(2, 64, 4, CONTEXT, functools.partial(VARIANTS[norm], eps=eps))
    losses = train_on_text(model, train, steps=steps, batch=BATCH, lr=RATE, seed=seed)
    return {"loss": curve_of(losses), "bits": bits(model, held_out, AT_ONCE)}


def settings(data):
    """Return the norms and epsilons that were measured."""
    return list(dict.fromkeys((row["norm"], row["eps"]) for row in data.rows))


def number(data, norm, eps=USUAL):
    return data.value("bits", norm=norm, eps=eps)


class Difference(NamedTuple):
    """How many bits more one norm takes than another: seed by seed, and whether clearly more or fewer."""

    bits: Value
    clear: bool
    of: float  # the bits of the other

    @classmethod
    def between(cls, one, other):
        bits = Value(tuple(a - b for a, b in zip(one.numbers, other.numbers, strict=True)))
        return cls(bits, one.clearly_above(other) or other.clearly_above(one), other.mean)

    @property
    def bound(self):
        """The difference, with its spread, relative to the bits."""
        return (abs(self.bits.mean) + self.bits.spread) / self.of

    @property
    def matters(self):
        return self.clear and abs(self.bits.mean) > MARGIN * self.of

    @property
    def text(self):
        return f"{self.bits.mean:+.4f} ± {self.bits.spread:.4f}"


def judge(data):
    ln, inside = number(data, "ln"), number(data, "rms")
    norms, places = Difference.between(inside, ln), placement(data, USUAL)
    return Verdict(
        held(norms, places),
        f"Of held-out text a character takes {ln.text(3)} bits with LayerNorm and {inside.text(3)} with RMSNorm. Seed "
        f"by seed the difference is {norms.text} bits ({percent(norms)}); up to {100 * MARGIN:g} % is called a match. "
        + " ".join(
            f"An epsilon of {written(eps)} outside of the root instead of inside changes the bits by "
            f"{placement(data, eps).text}."
            for eps in data.all("eps")
        ),
        table(data),
    )


def placement(data, eps):
    """Return the difference that epsilon makes outside of the root instead of inside."""
    return Difference.between(number(data, "rms, outside", eps), number(data, "rms", eps))


def held(norms, places):
    """Return the verdict from the differences of RMSNorm from LayerNorm, and of epsilon outside from inside."""
    if norms.matters and norms.bits.mean > 0:
        return FAILS
    if places.matters:
        return only_if(f"epsilon is {'inside' if places.bits.mean > 0 else 'outside'} of the root")
    bound = max(norms.bound, places.bound)
    if bound > MARGIN or norms.clear or places.clear:
        return only_if(f"a difference of up to {100 * bound:.1f} % of the bits counts as a match")
    return HOLDS


def written(eps):
    return f"{eps:g}".replace("e-0", "e-")


def percent(difference):
    return f"{100 * difference.bits.mean / difference.of:+.2f} %"


def table(data):
    rows = [
        [
            VARIANT_NAMES[norm],
            written(eps),
            number(data, norm, eps).text(3),
            Difference.between(number(data, norm, eps), number(data, "ln")).text if norm != "ln" else "",
        ]
        for norm, eps in settings(data)
    ]
    columns = ["norm", "epsilon", "bits per character", "difference from LayerNorm, seed by seed"]
    return Table("", columns, [rows], names=1)


def draw(plt, data):
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.9), layout="constrained")
    curves = {norm: late(*data.curve("loss", norm=norm, eps=USUAL)) for norm in ("ln", "rms")}
    panel(left, curves, xlabel="step (number)", ylabel="training loss (nats per byte)")
    ln = number(data, "ln")
    found = [key for key in settings(data) if key[0] != "ln"]
    dots(
        right,
        {key: {"bits": Difference.between(number(data, *key), ln).bits} for key in found},
        {"bits": ("held-out text", "o")},
        xlabel="difference from LayerNorm (bits)",
        names={(norm, eps): f"{SHORT[norm]}\n$\\epsilon$ = {written(eps)}" for norm, eps in found},
        styles={(norm, eps): STYLES["rms" if norm.startswith("rms") else "ln"] for norm, eps in found},
    )
    right.axvspan(-MARGIN * ln.mean, MARGIN * ln.mean, color="#EEEEEE", zorder=0)
    right.axvline(0, color="#999999", linewidth=0.8, zorder=1)
    return figure


CLAIM = Claim(
    name="rms-norm",
    title="RMSNorm in place of LayerNorm",
    sentence="RMSNorm matches LayerNorm, and the place of its epsilon makes no difference.",
    source="[Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467)",
    experiment="A Transformer is trained to predict the next byte of a text, with LayerNorm and with RMSNorm.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Left: the training loss of a Transformer against the step, with LayerNorm and with RMSNorm. Right: how many "
        "bits per character of held-out text each norm and epsilon takes more than LayerNorm, seed by seed. The grey "
        "band is 1 % of LayerNorm's bits."
    ),
    published=(
        Published(
            "RMSNorm compared with LayerNorm",
            "comparable quality, 7 % to 64 % less time ([abstract](https://arxiv.org/abs/1910.07467))",
            lambda data: f"{percent(Difference.between(number(data, 'rms'), number(data, 'ln')))} bits per character",
            "a small Transformer of bytes; time is not measured here",
        ),
    ),
)
