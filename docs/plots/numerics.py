"""Draw the error of batch normalization against the mean of its input, and print it as a table.

    python docs/plots/numerics.py [--out FILE]    (default: docs/figures/numerics.png)

For each mean/std, float32 data are normalized in training mode by torch's F.batch_norm, by the textbook formula
E[x²] - E[x]² in float32, and by syncnorm on 4 ranks with unequal shards. The oracle is one process in float64, on the
same float32 data. The errors are the largest absolute error of y, and the largest error of the input gradient over its
largest value.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

import syncnorm
from syncnorm.testing import run_ranks

MEANS = [0.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6]
SIZES = [20, 4, 0, 8]  # samples of each rank
SHAPE = (sum(SIZES), 8, 16, 16)
EPS = 1e-5
COLOURS = {"E[x²] - E[x]², float32": "#999999", "torch F.batch_norm": "#D55E00", "syncnorm, 4 ranks": "#0072B2"}
METHODS = list(COLOURS)


def data(mean):
    """Return x of standard deviation 1 and this mean, and a random gradient of y, both (N, C, H, W) float32."""
    generator = torch.Generator().manual_seed(0)
    x, grad_output = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    return (x + mean).float(), grad_output.float()


def step(norm, x, grad_output):
    """Return y and the gradient of x."""
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(grad_output)
    return y.detach().double(), x.grad.double()


def torchs(x):
    """Normalize as torch does."""
    return F.batch_norm(x, None, None, training=True, eps=EPS)


def textbook(x):
    """Normalize by the mean of squares less the square of the mean."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x * x).mean((0, 2, 3), keepdim=True) - mean * mean
    return (x - mean) / (variance.clamp_min(0) + EPS).sqrt()


def on_a_rank():
    """Return y and the gradient of this rank's shard, for each mean."""
    rank = syncnorm.communicator().rank

    def ours(x):
        return syncnorm.functional.sync_batch_norm(x, None, None, training=True, eps=EPS)

    return [step(ours, *(whole.split(SIZES)[rank] for whole in data(mean))) for mean in MEANS]


def errors():
    """Return for each method the errors of y and those of the gradient, one for each mean."""
    shards = run_ranks(on_a_rank, len(SIZES), timeout=90)
    found = {method: ([], []) for method in METHODS}
    for i, mean in enumerate(MEANS):
        x, grad_output = data(mean)
        results = {
            "E[x²] - E[x]², float32": step(textbook, x, grad_output),
            "torch F.batch_norm": step(torchs, x, grad_output),
            "syncnorm, 4 ranks": tuple(torch.cat([shard[i][j] for shard in shards]) for j in (0, 1)),
        }
        y, grad = step(torchs, x.double(), grad_output.double())
        for method, result in results.items():
            found[method][0].append((result[0] - y).abs().max().item())
            found[method][1].append(((result[1] - grad).abs().max() / grad.abs().max()).item())
    return found


def table(found):
    """Return the errors in Markdown."""
    head = "".join(f" {method}: y | {method}: gradient |" for method in METHODS)
    lines = [f"| mean/std |{head}", "|---|" + "---:|" * 2 * len(METHODS)]
    for i, mean in enumerate(MEANS):
        lines.append(f"| {mean:g} |" + "".join(f" {y[i]:.1e} | {g[i]:.1e} |" for y, g in found.values()))
    return "\n".join(lines)


def draw(found, file):
    """Draw both errors, each method with a colour that the colour-blind can tell, labelled at its line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    places = [mean or 1.0 for mean in MEANS]
    for axis, kind, title in zip(
        axes, (0, 1), ("output: largest error", "input gradient: largest relative error"), strict=True
    ):
        for method, both in found.items():
            axis.loglog(places, both[kind], "o-", color=COLOURS[method], label=method)
        axis.set_title(title)
        axis.set_xlabel("mean / standard deviation of the input")
        axis.set_xticks(places, ["0", *(f"$10^{i}$" for i in range(1, len(MEANS)))])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "figures" / "numerics.png")
    out = parser.parse_args().out
    measured = errors()
    draw(measured, out)
    print(table(measured))
