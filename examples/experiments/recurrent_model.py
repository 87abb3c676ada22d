"""Recurrent networks over bytes with a norm in the cell, on what the byte and what the state contribute to each step.

Shapes: N samples, T steps, H units, G = 1 (RNN) or 3 gates (GRU), C = G * H.
"""

import functools

import torch
import transformer
from torch import nn

import syncnorm
from experiments.models import FEATURE_NORMS
from syncnorm.communicators import LocalCommunicator

GATES = {"rnn": 1, "gru": 3}


class Pairs(transformer.Samples):
    """Samples whose batches end with the last step that two of their samples reach.

    At a step that one sample alone reaches, a batch has one value per channel, of which there is no variance.
    """

    def batch(self, which):
        steps = self.lengths[which].sort().values[-2:][0].item()
        inputs, targets, mask = super().batch(which)
        return inputs[:, :steps], targets[:, :steps], mask[:, :steps]


class EachPosition(nn.Module):
    """A norm of the two contributions, of each position by itself. Those of the bytes are normalized all at once."""

    def __init__(self, norm, channels):
        super().__init__()
        self.of_byte, self.of_state = norm(channels), norm(channels)

    def before(self, from_bytes):  # (N, T, C)
        return self.of_byte(from_bytes.flatten(0, 1)).view_as(from_bytes)

    def forward(self, from_byte, from_state, step, mask):  # (N, C) both
        return from_byte, self.of_state(from_state)


class OverBatch(nn.Module):
    """BatchNorm of the two contributions at each step, by the samples of the batch that reach it.

    Each step has running statistics of its own. A step beyond the last of them takes the last, as in Cooijmans et al.

    Args:
        channels: C.
        context: the number of steps of the samples that are trained on.
        gamma: the weights to start with.
        masked: leave padding out of the statistics.
    """

    def __init__(self, channels, context, gamma, masked=True):
        super().__init__()
        self.masked = masked
        self.weight = nn.Parameter(torch.full((2 * channels,), gamma))
        self.bias = nn.Parameter(torch.zeros(2 * channels))
        self.register_buffer("running_mean", torch.zeros(context, 2 * channels))
        self.register_buffer("running_var", torch.ones(context, 2 * channels))

    def before(self, from_bytes):
        return from_bytes

    def share(self):
        """Use the mean of the steps' running statistics at all steps, as a layer does that keeps one set of them."""
        for statistics in (self.running_mean, self.running_var):
            statistics.copy_(statistics.mean(0).expand_as(statistics))

    def forward(self, from_byte, from_state, step, mask):  # (N, C) both, mask (N,)
        at = min(step, len(self.running_mean) - 1)
        y = syncnorm.functional.sync_batch_norm(
            torch.cat([from_byte, from_state], 1),
            self.running_mean[at],
            self.running_var[at],
            self.weight,
            self.bias,
            self.training,
            process_group=LocalCommunicator(),
            mask=mask if self.masked else None,
        )
        return y.chunk(2, 1)


class Recurrent(nn.Module):
    """Bytes (N, T) int64 and their mask (N, T) -> logits (N, T, 256) of the byte after each.

        RNN: h = tanh(a + b + bias)
        GRU: h = z * h + (1 - z) * tanh(a + r * b + bias)        with the gates r and z = sigmoid(a + b + bias)

    where a = norm(W x) and b = norm(U h), each with its own weights for each gate.
    """

    def __init__(self, cell, width, norm):
        super().__init__()
        channels = GATES[cell] * width
        self.step = {"rnn": rnn_step, "gru": gru_step}[cell]
        self.of_byte = nn.Embedding(256, channels)  # W, of a byte that is 1 at one place of 256
        self.of_state = nn.Linear(width, channels, bias=False)
        self.norm = norm(channels)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.head = nn.Linear(width, 256)
        nn.init.normal_(self.of_byte.weight, std=0.5)
        for gate in self.of_state.weight.chunk(GATES[cell]):
            nn.init.orthogonal_(gate)

    def forward(self, tokens, mask):
        from_bytes = self.norm.before(self.of_byte(tokens)).unbind(1)
        state, states = self.head.weight.new_zeros(len(tokens), self.head.in_features), []
        for step, (from_byte, valid) in enumerate(zip(from_bytes, mask.unbind(1), strict=True)):
            contributions = self.norm(from_byte, self.of_state(state), step, valid)
            state = self.step(*contributions, self.bias, state)
            states.append(state)
        return self.head(torch.stack(states, 1))


def rnn_step(from_byte, from_state, bias, state):
    return torch.tanh(from_byte + from_state + bias)


def gru_step(from_byte, from_state, bias, state):
    width = state.shape[1]
    a, b = from_byte + bias, from_state
    reset, update = torch.sigmoid(a[:, : 2 * width] + b[:, : 2 * width]).chunk(2, 1)
    new = torch.tanh(a[:, 2 * width :] + reset * b[:, 2 * width :])
    return new + update * (state - new)


def norms(context):
    """Return {name: C -> norm of both contributions}, for samples of at most `context` steps."""
    each = {name: functools.partial(EachPosition, FEATURE_NORMS[name]) for name in ("none", "ln", "rms")}
    return each | {
        "bn": lambda channels: OverBatch(channels, context, gamma=0.1),
        "bn_1": lambda channels: OverBatch(channels, context, gamma=1.0),
        "bn_padded": lambda channels: OverBatch(channels, context, gamma=0.1, masked=False),
    }
