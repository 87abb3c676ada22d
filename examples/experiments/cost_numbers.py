"""What the costs of norms come to: the times of a device and size, and the table of all of them."""

import itertools

from figures import NAMES
from spread import Value

from experiments.norm_layers import FEATURES, MADE_FOR, VALUES, Name
from syncnorm.bench.timing import NOISY
from syncnorm.report import Table

PASSES = ("forward", "backward", "both")
BATCH = {"cpu": 32, "cuda": 256}
SMALL = 2  # images, whose values fit into the cache of a core
RESOLUTION = 0.05  # of a time: what the place of the tensors in memory may change
IMPLEMENTATIONS = {"ours": "this library", "torch": "PyTorch", "composed": "composed of operations"}
LAYOUTS = {"NCHW": "images, NCHW", "NHWC": "images, channels last", "features": "features"}


class Costs:
    """The numbers of a device and size."""

    def __init__(self, data, device, batch=None):
        self.data, self.settings = data, {"device": device, "batch": batch or BATCH[device]}

    def value(self, norm, implementation="ours", what="both", layout=None):
        """Return nanoseconds per value, or bytes; by default in the layout that the norm is made for."""
        return self.data.value(Name(norm, implementation, layout or MADE_FOR[norm]).metric(what), **self.settings)

    @property
    def measured(self):
        return bool(self.data.where(**self.settings).rows)

    def names(self):
        """Return the Names of all layers."""
        metrics = self.data.where(**self.settings).all("metric")
        return list(dict.fromkeys(Name(*metric.split("/")[:3]) for metric in metrics if "/" in metric))

    def copy(self):
        return self.data.value("copy", **self.settings)

    def compared(self, norm, implementation):
        """Return the time with the spread that the place of tensors in memory gives it, at least."""
        value = self.value(norm, implementation)
        return value._replace(resolution=RESOLUTION * value.mean)

    def rises(self, implementation, *norms):
        """Return whether each of the norms takes clearly more time than the one before it."""
        values = [self.compared(norm, implementation) for norm in norms]
        return all(more.clearly_above(less) for less, more in itertools.pairwise(values))


def ratio(value, other):
    """Return the quotients of two Values, seed by seed."""
    return Value(tuple(one / two for one, two in zip(value.numbers, other.numbers, strict=True)))


def table(data):
    """Return the table of all layers on all devices."""
    devices = data.all("device")
    rows = [row for device in devices for row in rows_of(data, device)]
    columns = ["device, norm" if len(devices) > 1 else "norm", "implementation", "input"]
    columns += [f"{part} (ns per value)" for part in PASSES]
    in_cache = [f"both, batch of {SMALL} (copies)"] if SMALL in data.all("batch") else []
    columns += ["both (copies)", *in_cache, "kept (bytes per value)", "operations"]
    disturbed = max(data.where(metric="noisy").all("value"))
    note = (
        f"An image has {VALUES} values. A batch has {BATCH['cpu']} images, or {BATCH['cuda']} on a GPU. Features are "
        f"as many values, {FEATURES} a position. Copies: the time of forward and backward over that of a copy. "
        f"Operations: those whose gradients autograd computes. Of the timings of a run, up to {disturbed:.0f} % were "
        f"disturbed: their quartiles are a factor of {NOISY} apart."
    )
    return Table("", columns, [rows], names=3, note=note)


def rows_of(data, device):
    """Return a row for each layer on a device, the norms in the order of the claim."""
    costs, several = Costs(data, device), len(data.all("device")) > 1
    sizes = [costs, *[Costs(data, device, SMALL)] * (SMALL in data.all("batch"))]
    rows = []
    for norm, implementation, layout in sorted(costs.names(), key=lambda name: list(MADE_FOR).index(name.norm)):
        what = {"norm": norm, "implementation": implementation, "layout": layout}
        times = [costs.value(**what, what=part).text(2) for part in PASSES]
        kept, operations = (costs.value(**what, what=name).mean for name in ("kept", "nodes"))
        copies = [ratio(of.value(**what), of.copy()).text(1) if of.measured else "" for of in sizes]
        words = implementation.replace("ours", "this library")
        words = IMPLEMENTATIONS.get(implementation, words)
        name = f"{device}, {NAMES[norm]}" if several else NAMES[norm]
        rows.append([name, words, LAYOUTS[layout], *times, *copies, f"{kept:.1f}", f"{operations:.0f}"])
    return rows
