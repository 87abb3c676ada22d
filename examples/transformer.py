"""Train a small Transformer on English text, byte by byte, with LayerNorm, RMSNorm or synchronized BatchNorm.

One process, four ranks on Gloo (or NCCL where there is CUDA), four ranks on MPI, four tasks of Slurm's, with a global
batch of 16 each time:

    python examples/transformer.py --norm sync_bn --batch-per-rank 16
    torchrun --nproc-per-node 4 examples/transformer.py --norm sync_bn --batch-per-rank 4
    mpirun -n 4 python examples/transformer.py --norm sync_bn --batch-per-rank 4
    srun -n 4 python examples/transformer.py --norm sync_bn --batch-per-rank 4

The text is that of Python's own documentation (`pydoc_data.topics`, 0.4 to 0.7 MB, another in each version of Python),
or --data FILE. A sample is a paragraph, or a part of a longer one, so samples differ in length and are padded. What
counts is the valid bytes of the global batch: in the loss and, by a mask, in the statistics of `sync_bn`, over batch
and time. So the training does not depend on how the batch is split over ranks, whatever the norm.

**BatchNorm over time sees the future of the sequence**: while training, the statistics by which a byte is normalized
hold the bytes that come after it, and those of the other samples. In eval mode the running statistics stand in their
place, and the model is causal. The two can differ in how well they predict: the record has the bits per character of
held-out text in both. LayerNorm and RMSNorm take each position by itself, and have no such gap.

`bn` is the control: BatchNorm by the valid bytes of this rank alone, whose training does depend on the split.

Rank 0 writes a JSON record: the loss of each step over the global batch (nats per byte), the bits per character, the
speed, and what a step costs in collectives and bytes; then the model continues a text. With --checkpoint FILE it also
writes the state of the training from time to time; the same command with --resume goes on from there, on any number of
ranks with the same global batch. Rank 0 reads it for all: the other hosts need not see the file. A training whose loss
or weights are no longer finite ends, and leaves the last good checkpoint.

Shapes: N samples, T bytes of context, C channels.
"""

import copy
import functools
import math
import re
import zlib
from pathlib import Path

import torch
from common import my_device
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from training import option_parser, parsed, positive, run, training_loop

import syncnorm
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import TimedCommunicator

PROMPT = "The value of "
VALIDATION = 10  # one paragraph of so many is held out; the split is the same in every run
IGNORED = -100  # the target of a padded position


def paragraphs(file=None):
    """Return the paragraphs of the file, or of Python's documentation, each once, as bytes, in order.

    That documentation repeats itself: what is held out shall not be trained on.
    """
    if file is not None:
        text = file.read_bytes()
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    unique = dict.fromkeys(paragraph for paragraph in re.split(rb"\n\s*\n", text) if paragraph.strip())
    if len(unique) < VALIDATION:
        raise ValueError(
            f"expected a text of at least {VALIDATION} paragraphs with blank lines between, got {len(unique)}: {file}"
        )
    return list(unique)


class Samples:
    """A text cut into samples of at most `context` bytes: paragraphs, and equal parts of longer ones.

    Each byte is predicted once, from those before it in its sample and the one before the sample.
    """

    def __init__(self, paragraphs, context, device):
        cuts = [0]
        for paragraph in paragraphs:
            length = len(paragraph) + 2  # with the blank line that ends it
            parts = math.ceil(length / context)
            begin = cuts[-1]
            cuts += [begin + length * part // parts for part in range(1, parts + 1)]
        text = b"\n" + b"".join(paragraph + b"\n\n" for paragraph in paragraphs)
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        cuts = torch.tensor(cuts)
        self.starts, self.lengths = cuts[:-1], cuts.diff()
        self.context = context

    def __len__(self):
        return len(self.starts)

    @property
    def characters(self):
        """The number of characters, if the text is UTF-8: of bytes that do not continue one."""
        return int((self.text[1:] & 0xC0 != 0x80).sum())

    def batch(self, which):
        """Return inputs and targets (N, T) int64 of the samples `which`, (N,), and the mask of what is no padding."""
        device = self.text.device
        places = torch.arange(self.context + 1)
        taken = (self.starts[which, None] + places).clamp_max(len(self.text) - 1)
        tokens = self.text[taken.to(device)].long()  # (N, T + 1)
        mask = (places[:-1] < self.lengths[which, None]).to(device)
        return tokens[:, :-1].masked_fill(~mask, 0), tokens[:, 1:].masked_fill(~mask, IGNORED), mask


class BatchNorm(syncnorm.SyncBatchNorm):
    """BatchNorm of (N, T, C) over batch and time, by the positions that the mask, (N, T), names."""

    def forward(self, x, mask):
        return super().forward(x.transpose(1, 2), mask=mask).transpose(1, 2)


class LayerNorm(syncnorm.LayerNorm):
    """LayerNorm of each position by itself, whatever the mask."""

    def forward(self, x, mask):
        return super().forward(x)


class RMSNorm(syncnorm.RMSNorm):
    """RMSNorm of each position by itself, whatever the mask."""

    def forward(self, x, mask):
        return super().forward(x)


class Attention(nn.Module):
    """Causal self-attention. Padding comes after what is valid, so no valid position attends to it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, C / heads) each
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads, norm):
        super().__init__()
        self.attention_norm, self.attention = norm(width), Attention(width, heads)
        self.mlp_norm = norm(width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x, mask):
        x = x + self.attention(self.attention_norm(x, mask))
        return x + self.down(gelu(self.up(self.mlp_norm(x, mask))))


class Transformer(nn.Module):
    """Bytes (N, T) int64 and their mask (N, T) -> logits (N, T, 256) of the byte after each.

    The norms have the only biases. One before a BatchNorm has no gradient but rounding errors, which Adam would make
    steps of the full learning rate of, different ones for each split of the batch.
    """

    def __init__(self, layers, width, heads, context, norm):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, norm) for _ in range(layers))
        self.norm = norm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.2)  # so that attention and MLP soon weigh as much

    def forward(self, tokens, mask):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]  # (N, T, C)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x, mask))


def nats(logits, targets):
    """Return the cross-entropy of logits (N, T, 256), summed over the valid targets, (N, T)."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def bits_per_character(model, samples, batch_per_rank, group):
    """Return the bits by which the model, in the mode that it is in, predicts a character of the samples.

    Each rank takes its share of each global batch, of the last one perhaps none. In train mode the batch statistics are
    those of the global batch.
    """
    total = torch.zeros((), dtype=torch.float64, device=samples.text.device)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))  # mixes parts of one paragraph
    for batch in order.split(batch_per_rank * group.size):
        inputs, targets, mask = samples.batch(batch[group.rank * batch_per_rank :][:batch_per_rank])
        total += nats(model(inputs, mask), targets)
    return group.all_reduce(total).item() / math.log(2) / samples.characters


@torch.no_grad()
def continuation(model, context, length, seed, device):
    """Return the prompt and `length` bytes more that the model, in eval mode, draws after it. No collective."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    text = list(f"\n{PROMPT}".encode())
    for _ in range(length):
        tokens = torch.tensor([text[-context:]], device=device)
        logits = model(tokens, None)[0, -1]
        text.append(int(torch.multinomial(logits.softmax(0).cpu(), 1, generator=generator)))
    return bytes(text[1:]).decode(errors="replace")


def arguments(words=None):
    parser = option_parser(__doc__, steps=300, lr=0.005)
    norms = ["ln", "rms", "sync_bn", "bn"]
    parser.add_argument("--norm", choices=norms, default="sync_bn", help="bn, per rank, is the control")
    parser.add_argument("--layers", type=positive, default=2, metavar="N", help="blocks (default: 2)")
    parser.add_argument("--width", type=positive, default=64, metavar="N", help="channels (default: 64)")
    parser.add_argument("--heads", type=positive, default=4, metavar="N", help="of attention (default: 4)")
    parser.add_argument("--context", type=positive, default=64, metavar="N", help="bytes, at least 4 (default: 64)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="a text (default: Python's documentation)")
    parser.add_argument("--sample", type=int, default=200, metavar="N", help="bytes to write at the end (default: 200)")
    args = parsed(parser, words)
    if args.width % args.heads:
        parser.error(f"expected a --width that --heads {args.heads} divides, got {args.width}")
    if args.context < 4:  # a sample of a single byte has no variance
        parser.error(f"expected a --context of at least 4, got {args.context}")
    return args


@functools.lru_cache(maxsize=1)
def data(file, context, device, kind=Samples):
    """Return the samples to train on and to validate with, split the same way in every run, and their checksum.

    kind: (paragraphs, context, device) -> samples.
    """
    text = paragraphs(file)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = len(text) // VALIDATION
    valid = kind([text[i] for i in order[:held_out]], context, device)
    train = kind([text[i] for i in order[held_out:]], context, device)
    return train, valid, zlib.crc32(b"\n\n".join(text))


def train(args, group, track=iter):
    """Train on the ranks of the group; return the model and a record. `track` passes the steps on and may show them."""
    device = my_device()
    samples, _, crc = data(args.data, args.context, device)

    torch.manual_seed(args.seed)
    norm_group = TimedCommunicator(group)
    norm = {
        "ln": LayerNorm,
        "rms": RMSNorm,
        "sync_bn": lambda width: BatchNorm(width, process_group=norm_group),
        "bn": lambda width: BatchNorm(width, process_group=LocalCommunicator()),
    }[args.norm]
    shape = {name: getattr(args, name) for name in ("layers", "width", "heads", "context")}
    model = Transformer(**shape, norm=norm).to(device, getattr(torch, args.dtype))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    tokens = 0  # valid bytes of all global batches

    def loss_of(net, batch, share):
        nonlocal tokens
        valid_bytes = samples.lengths[batch].sum().item()  # of all ranks, which each of them knows
        tokens += valid_bytes
        inputs, targets, mask = samples.batch(batch[share])
        return nats(net(inputs, mask), targets) * (group.size / valid_bytes)  # DDP divides by the number of ranks

    about = {**shape, "crc_of_text": crc}
    record = training_loop(args, group, model, norm_group, optimizer, loss_of, len(samples), about, track)
    seconds = record["seconds_per_step"] * (args.steps - record["resumed_at_step"])
    return model, record | {
        "data": str(args.data or "pydoc_data.topics"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_second": tokens / seconds,
    }


def evaluate(model, args, group):
    """Return the bits per character on the held-out text, in eval and in train mode. All ranks call it."""
    _, valid, _ = data(args.data, args.context, next(model.parameters()).device)
    in_train_mode = bits_per_character(copy.deepcopy(model).train(), valid, args.batch_per_rank, group)
    bits = bits_per_character(model.eval(), valid, args.batch_per_rank, group)
    return {"valid_bits_per_character": bits, "valid_bits_per_character_in_train_mode": in_train_mode}


def evaluate_and_continue(model, args, group):
    """Return what `evaluate` does and, on rank 0, a text that the model writes."""
    record = evaluate(model, args, group)
    if group.rank == 0:
        device = next(model.parameters()).device
        record["sample"] = continuation(model, args.context, args.sample, args.seed, device)
    return record


def summary(record):
    before = (
        "{valid_bits_per_character:.3f} bits per character ({valid_bits_per_character_in_train_mode:.3f} by the "
        "statistics of the batch), {tokens_per_second:.0f} tokens/s".format(**record)
    )
    return before, f"\n\n{record['sample']}" if record["sample"] != PROMPT else ""


def main():
    args = arguments()

    def load_data():
        data(args.data, args.context, my_device())

    run("transformer", args, load_data, train, evaluate_and_continue, summary)


if __name__ == "__main__":
    main()
