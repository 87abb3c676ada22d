"""The operators of torch.nn.SyncBatchNorm, which torch has for GPUs alone, in plain PyTorch for CPU tensors."""

import torch


def define():
    """Define them in this process; keep the result as long as they are needed."""
    library = torch.library.Library("aten", "IMPL")
    for operator in (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt):
        library.impl(f"batch_norm_{operator.__name__}", operator, "CPU")
    return library


def _axes(x):
    return [axis for axis in range(x.dim()) if axis != 1]


def _wide(values, x):
    return values.view(-1, *[1] * (x.dim() - 2))


def stats(input, eps):
    x = input.float()
    return x.mean(_axes(x)), (x.var(_axes(x), correction=0) + eps).rsqrt()


def gather_stats_with_counts(input, mean, invstd, running_mean, running_var, momentum, eps, counts):
    counts = counts.unsqueeze(1)
    total = counts.sum()
    mean_of_all = (mean * counts).sum(0) / total
    squares = ((invstd**-2 - eps + mean.square()) * counts).sum(0) / total
    variance = squares - mean_of_all.square()
    running_mean.lerp_(mean_of_all, momentum)
    running_var.lerp_(variance * total / (total - 1), momentum)
    return mean_of_all, (variance + eps).rsqrt()


def elemt(input, weight, bias, mean, invstd, eps):
    y = (input - _wide(mean, input)) * _wide(invstd * weight, input) + _wide(bias, input)
    return y.to(input.dtype)


def backward_reduce(grad_out, input, mean, invstd, weight, input_g, weight_g, bias_g):
    sum_dy = grad_out.float().sum(_axes(input))
    sum_dy_xmu = (grad_out * (input - _wide(mean, input))).float().sum(_axes(input))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def backward_elemt(grad_out, input, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    total = count.sum()
    centred = (input - _wide(mean, input)) * _wide(invstd.square() * sum_dy_xmu / total, input)
    return ((grad_out - _wide(sum_dy / total, input) - centred) * _wide(invstd * weight, input)).to(input.dtype)
