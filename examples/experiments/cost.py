"""How long do norms take? Forward and backward of each, by turns in one process, on the same number of values.

Each norm has the layout that it is made for: BatchNorm and GroupNorm take images, LayerNorm and RMSNorm features. They
are measured in other layouts too, so that norms can be compared on the same tensor. The time of a copy of the tensor
is the unit that makes machines comparable.

A norm costs what its implementation costs. So there are three: this library's, PyTorch's, and the formula composed of
PyTorch's operations, for all norms in the same way. In one process this library's GroupNorm, LayerNorm and RMSNorm
call PyTorch's functions, so these rows tell what noise there is. The operations whose gradients autograd computes are
counted, since a norm of one operation reads its input fewer times than one composed of several.

A ReLU follows each norm as an operation of its own, in place. BatchNorm has a form that computes it in the same pass;
the others have none. Memory is that of all tensors that autograd keeps for backward, the input among them. A tensor
in place of the input counts likewise, as when formulas keep the centred input.

Times on a CPU are those that the process spends on one core, so that other processes disturb them less. Memory is not
returned to the system, which would add page faults to some layers and not to others.

Zhang and Sennrich time the training of whole models, of which a norm is only a part.
"""

import time

import torch
from figures import NAMES
from spread import Value
from words import plural

from experiments.claim import FAILS, HOLDS, Claim, Published, Verdict, only_if
from experiments.cost_numbers import BATCH, IMPLEMENTATIONS, SMALL, Costs, ratio, table
from experiments.norm_layers import MADE_FOR, VALUES, kept, layers, nodes, of_layer, tensors
from experiments.panel import WIDTH, grouped_bars
from syncnorm.bench import memory
from syncnorm.bench.timing import Effort, interleave, on_device, wall
from syncnorm.communicators import LocalCommunicator
from syncnorm.report import COLOURS

STYLES = {
    "ours": (COLOURS["vermillion"], ""),
    "torch": (COLOURS["sky blue"], "//"),
    "composed": (COLOURS["grey"], ".."),
}


def cases(quick):
    sizes = [("cpu", BATCH["cpu"], 5)] if quick else [("cpu", BATCH["cpu"], 30), ("cpu", SMALL, 6)]
    if torch.cuda.is_available():
        sizes.append(("cuda", BATCH["cuda"], 3 if quick else 8))
    return [
        ({"device": device, "dtype": "float32", "batch": batch, "seconds": seconds}, seconds + 4)
        for device, batch, seconds in sizes
    ]


def measure(seed, device, dtype, batch, seconds):
    memory.keep()  # else tensors of some sizes pay for page faults, and those of others do not
    device, dtype = torch.device(device), getattr(torch, dtype)
    torch.manual_seed(seed)
    values = {layout: tensor.to(dtype) for layout, tensor in tensors(batch, device, seed).items()}
    candidates, metrics = {"copy": values["NCHW"].clone}, {}
    for name, layer in layers().items():
        layer.to(device, dtype)
        x = of_layer(name, values[name.layout]).detach().requires_grad_()
        candidates |= {name.metric(part): run for part, run in runs(layer, x).items()}
        metrics |= {
            name.metric("kept"): kept(layer, x) / x.numel(),
            name.metric("nodes"): nodes(layer(x)),
        }
    sampler = on_device(device) if device.type == "cuda" else wall(time.process_time)
    timings = interleave(candidates, LocalCommunicator(), Effort(101, 5e-4, seconds), sampler)
    noisy = sum(timing.noisy for timing in timings.values()) / len(timings)
    nanoseconds = {name: 1e9 * timing.median / (batch * VALUES) for name, timing in timings.items()}
    return metrics | nanoseconds | {"noisy": 100 * noisy}


def runs(layer, x):
    """Return what runs forward, backward and both."""
    y = layer(x)
    dy = torch.randn_like(y)
    wanted = [x, *layer.parameters()]
    return {
        "forward": lambda: layer(x),
        "backward": lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True),
        "both": lambda: torch.autograd.grad(layer(x), wanted, dy),
    }


def judge(data):
    here = Costs(data, "cpu")
    return Verdict(held_by(data), finding(here), table(data))


def held_by(data):
    """Return where the order is RMSNorm, BatchNorm, LayerNorm; else where it is so for RMSNorm and LayerNorm."""
    here = Costs(data, "cpu")
    tried = [(here, "ours", ""), (here, "composed", "all norms are composed of PyTorch's operations")]
    tried.append((here, "torch", "BatchNorm is PyTorch's too"))
    if "cuda" in data.all("device"):
        tried.append((Costs(data, "cuda"), "ours", "they run on a GPU"))
    for costs, implementation, condition in tried:
        if costs.rises(implementation, "rms", "bn", "ln"):
            return only_if(condition) if condition else HOLDS
    for costs, implementation, condition in tried:
        if costs.rises(implementation, "rms", "ln"):
            return only_if(f"it is about LayerNorm and RMSNorm alone{', and ' * bool(condition)}{condition}")
    return FAILS


def finding(here):
    times = ", ".join(f"{here.value(norm).text(2)} with {NAMES[norm]}" for norm in ("rms", "bn", "ln"))
    composed = ", ".join(f"{here.value(norm, 'composed').text(2)} with {NAMES[norm]}" for norm in ("rms", "bn", "ln"))
    counts = {norm: here.value(norm, what="nodes").mean for norm in ("rms", "ln")}
    return (
        f"Forward and backward on a CPU take, in nanoseconds per value, {times}; a copy takes {here.copy().text(2)}. "
        f"Composed of PyTorch's operations they take {composed}. "
        f"On a CPU this library's RMSNorm and LayerNorm are PyTorch's functions, which autograd sees as "
        f"{plural(round(counts['rms']), 'operation')} and {plural(round(counts['ln']), 'operation')}: the "
        "implementation decides, not the formula."
    )


def draw(plt, data):
    devices = data.all("device")
    figure, grid = plt.subplots(
        len(devices), 2, figsize=(WIDTH, 3.7 * len(devices)), layout="constrained", squeeze=False
    )
    for axes, device in zip(grid, devices, strict=True):
        costs = Costs(data, device)
        for axis, what, ylabel in zip(
            axes,
            ("both", "kept"),
            (f"forward and backward, {device}\n(ns per value)", "kept for backward (bytes per value)"),
            strict=True,
        ):
            heights = {NAMES[norm]: {name: costs.value(norm, name, what) for name in STYLES} for norm in MADE_FOR}
            grouped_bars(axis, heights, ylabel=ylabel, styles=STYLES, names=IMPLEMENTATIONS)
        axes[0].axhline(costs.copy().mean, color="#555555", linewidth=1, linestyle="--")
        at_the_edge = axes[0].get_yaxis_transform()
        axes[0].text(1.01, costs.copy().mean, "a copy", size=8, va="center", transform=at_the_edge)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def less_time(implementation):
    """Return a function of the data: how much less time RMSNorm takes than LayerNorm on a CPU."""

    def text(data):
        here = Costs(data, "cpu")
        share = ratio(here.value("rms", implementation), here.value("ln", implementation))
        less = Value(tuple(100 * (1 - number) for number in share.numbers))
        return f"{less.text(0)} % less" if less.mean >= 0 else f"{share.text(1)} times as much"

    return text


def fused(data):
    """Return how much less memory BatchNorm keeps, and how much less time it takes, if it computes its ReLU itself."""
    here = Costs(data, "cpu")
    memory, seconds = (
        ratio(*(here.value("bn", f"ours{ending} ReLU", what) for ending in (" with", ", then"))).mean
        for what in ("kept", "both")
    )
    return f"{100 * (1 - memory):.0f} % less, in {100 * seconds:.0f} % of the time"


PUBLISHED = "7 % to 64 % less ([Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467))"
DIFFERS = "the training time of whole models there, a layer by itself on one core here"

CLAIM = Claim(
    name="cost",
    title="The cost of a norm",
    sentence="BatchNorm costs a medium amount of time, LayerNorm more, and RMSNorm less.",
    source="[Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467) for RMSNorm against LayerNorm; texts that "
    "compare norms for BatchNorm",
    experiment="Forward and backward of each norm are timed by turns on the same number of float32 values, each norm "
    "in the layout that it is made for, on one core.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Left: the time of forward and backward by norm and implementation, beside that of a copy. "
        "Right: the bytes that each keeps for backward, its input included."
    ),
    published=(
        Published("time of RMSNorm against LayerNorm, this library", PUBLISHED, less_time("ours"), DIFFERS),
        Published(
            "time of RMSNorm against LayerNorm, composed of operations", PUBLISHED, less_time("composed"), DIFFERS
        ),
        Published(
            "memory that BatchNorm and its activation keep if they are one operation",
            "up to 50 % less, in 100.8 % to 102 % of the time "
            "([Rota Bulò et al., 2018](https://arxiv.org/abs/1712.02616), abstract)",
            fused,
            "whole networks, in place, on GPUs there; one layer, not in place, with a ReLU here",
        ),
    ),
    undisturbed=True,
)
