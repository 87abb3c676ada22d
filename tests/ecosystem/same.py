"""What a conversion must not change: one training step and one evaluation of a model, compared in float64."""

import copy
import re
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

import syncnorm

SAMPLES = 2  # of each rank
WORLD_SIZE = 2
RATES = re.compile("drop")  # attributes that hold a rate of dropout
DROPS = re.compile("Drop|StochasticDepth")  # classes whose `p` is one


class Step(NamedTuple):
    """What a training step gives."""

    outputs: list
    input_grads: list
    grads: dict
    buffers: dict


def prepare(model):
    """Return the model in float64, without anything random in it, and with parameters that hide nothing.

    Some models start with norms whose weight is zero, so that no gradient reaches what is before them.
    """
    for layer in model.modules():
        for name, value in vars(layer).items():
            if RATES.search(name) and isinstance(value, float):
                setattr(layer, name, 0.0)
        if DROPS.search(type(layer).__name__) and hasattr(layer, "p"):
            layer.p = 0.0
        if isinstance(layer, _BatchNorm):
            with torch.no_grad():
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    if tensor is not None:
                        tensor.copy_(torch.rand_like(tensor) * 0.5 + (tensor is not layer.bias) * 0.5)
    return model.double()


def call(model, input):
    """Call the model with one tensor or keyword arguments. Return the tensors of floats that it has per sample."""
    samples = len(tree_leaves(input)[0])
    leaves = tree_leaves(model(**input) if isinstance(input, dict) else model(input))
    outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    outputs = [output for output in outputs if output.ndim and len(output) == samples]
    assert outputs, "the model returns nothing per sample"
    return outputs


def train(model, input, part=slice(None)):
    """Make a training step on a part of the samples. The upstream gradients are random, and those of all samples."""
    model.train().zero_grad()
    input = tree_map(lambda x: x[part].clone().requires_grad_(x.is_floating_point()), input)
    outputs = call(model, input)
    generator = torch.Generator().manual_seed(1)
    shapes = [(SAMPLES * WORLD_SIZE, *output.shape[1:]) for output in outputs]
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64)[part] for shape in shapes]
    pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return Step(
        [output.detach() for output in outputs],
        [x.grad for x in tree_leaves(input) if x.requires_grad],
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
    )


def evaluate(model, input):
    """Return the outputs of the model in eval mode."""
    with torch.no_grad():
        return [output.clone() for output in call(model.eval(), input)]


def part_of(whole, rank):
    """Return the step of one process as a rank should have it: gradients of parameters and buffers are of all ranks."""
    part = slice(rank * SAMPLES, (rank + 1) * SAMPLES)
    return whole._replace(outputs=[x[part] for x in whole.outputs], input_grads=[x[part] for x in whole.input_grads])


def summed_over_ranks(step):
    """Return a rank's step with the gradients of the parameters of all ranks."""
    for grad in step.grads.values():
        dist.all_reduce(grad)
    return step


def assert_same(actual, expected, what):
    """Compare lists or dicts of tensors, relative to the largest value: some gradients cancel to zero."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{what}: {actual.keys() ^ expected.keys()}"
        actual, expected = list(actual.values()), list(expected.values())
    assert len(actual) == len(expected), f"{what}: {len(actual)} tensors instead of {len(expected)}"
    largest = max((x.abs().max().item() for x in expected if x.numel()), default=0.0)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9 * largest, msg=lambda m: f"{what}: {m}")


def assert_same_step(actual, expected, what):
    """Compare two training steps."""
    for name in Step._fields:
        assert_same(getattr(actual, name), getattr(expected, name), f"{what}, {name}")


def classes(model):
    """Return the exact class of each module by its name."""
    return {name: type(layer) for name, layer in model.named_modules()}


def check(build, input, convert=syncnorm.convert_sync_batchnorm):
    """Compare a model with its conversion on this rank, one of two. Return how many of its norms were fused.

    Args:
        build: returns the model.
        input: what it takes: a tensor, or a dict of keyword arguments. Axis 0 is that of the samples.
        convert: the conversion, which takes a model, a process group and fuse.
    """
    torch.manual_seed(0)
    model = prepare(build())
    before = classes(model)
    rank = dist.get_rank()
    part = slice(rank * SAMPLES, (rank + 1) * SAMPLES)
    evaluated = evaluate(model, input)
    trained = train(copy.deepcopy(model), input)

    alone = convert(copy.deepcopy(model), syncnorm.new_subgroups(1), fuse="auto")
    assert_same(evaluate(alone, input), evaluated, "eval")
    assert_same_step(train(alone, input), trained, "training on one rank")

    fused = convert(model, None, fuse="auto")
    assert_same_step(summed_over_ranks(train(fused, input, part)), part_of(trained, rank), "training on two ranks")
    norms = [layer for layer in fused.modules() if isinstance(layer, syncnorm.SyncBatchNorm)]
    number = sum(layer.activation is not None for layer in norms)

    reverted = syncnorm.revert_sync_batchnorm(fused)
    assert classes(reverted) == before, "reverted to other classes"
    reverted.load_state_dict(alone.state_dict())
    assert_same(evaluate(reverted, input), evaluate(alone, input), "eval of the reverted model")
    return len(norms), number
