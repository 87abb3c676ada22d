"""The state of a training, in a file that rank 0 writes and reads for all ranks."""

import io
import warnings

import torch
from common import on_all_ranks, on_rank_0, write

KINDS = {  # what an optimizer keeps for each parameter: a number, or a tensor like it
    torch.optim.SGD: {"momentum_buffer": torch.empty_like},
    torch.optim.Adam: {
        "step": lambda parameter: torch.empty(()),
        "exp_avg": torch.empty_like,
        "exp_avg_sq": torch.empty_like,
    },
}


def save(path, training, model, optimizer, losses, group):
    """Write the state of a training after len(losses) steps, on rank 0. All ranks call it.

    If that is not possible, or a number is not finite, the program ends on all ranks, and the file stays as it was.
    """
    on_rank_0(group, "--checkpoint", _save, path, training, model, optimizer, losses)


def load(path, training, model, optimizer, losses, group):
    """Read the state of a training into model, optimizer and losses; return how many steps it has behind it.

    Rank 0 reads the file and sends it to the others, so that all go on from the same step, whether their hosts see that
    file, another one or none. Without a file there it is step 0. If the file is not of this training, or not whole, the
    program ends on all ranks. All ranks call it; two broadcasts.
    """
    content = _broadcast(on_rank_0(group, "--checkpoint", _read, path), group, losses.device)
    if content is None:
        return 0
    return on_all_ranks(group, "--checkpoint", _restore, content, path, training, model, optimizer, losses)


def _save(path, training, model, optimizer, losses):
    state = {"training": training, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss": losses}
    try:
        for name, tensor in _tensors(state).items():
            _check_finite(name, tensor)
    except ValueError as error:
        raise ValueError(f"{error} after step {len(losses)}; not written: {path}") from error
    memory = io.BytesIO()
    torch.save(state, memory)
    write(path, memory.getbuffer())


def _read(path):
    """Return the content of the file, None if there is none."""
    if not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"expected a file, got a folder or device: {path}")
    return path.read_bytes()


def _broadcast(content, group, device):
    """Return rank 0's content, bytes or None, on every rank."""
    size = torch.tensor(-1 if content is None else len(content), device=device)
    group.broadcast(size)
    if size < 0:
        return None
    received = torch.empty(int(size), dtype=torch.uint8, device=device)
    if content:
        received.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    group.broadcast(received)
    return received.cpu().numpy().tobytes()


def _restore(content, path, training, model, optimizer, losses):
    """Bring what a file holds into model, optimizer and losses, if all of it fits; return the number of steps."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(content), map_location=losses.device, weights_only=True)
    except Exception as error:  # of torch's readers, each raises its own
        reason = f"torch.load cannot read it ({type(error).__name__})"
        raise ValueError(f"expected a checkpoint, got a file that is none or not whole: {reason}: {path}") from error
    try:
        steps = _check(state, training, model, optimizer, len(losses))
    except Exception as error:  # also what odd tensors raise at being looked at
        raise ValueError(f"{error!s:.400}: {path}") from error
    model.load_state_dict(state["model"])
    # all but the state of the parameters follows from the arguments, which are those of the file
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})
    losses[:steps] = state["loss"]
    return steps


def _check(state, training, model, optimizer, steps):
    """Return how many steps a loaded state has behind it, if it is one of this training, and fits."""
    if not (isinstance(state, dict) and state.keys() == {"training", "model", "optimizer", "loss"}):
        raise ValueError(f"expected a checkpoint of this example, got a {type(state).__name__} of something else")
    got = state["training"] if isinstance(state["training"], dict) else {}
    other = [name for name, value in training.items() if (type(got.get(name)), got.get(name)) != (type(value), value)]
    if other or got.keys() != training.keys():
        asked, found = ({name: values.get(name) for name in other} for values in (training, got))
        raise ValueError(f"expected a checkpoint of {asked}, got one of {found}")
    tensors, expected = _tensors(state), _expected(model, optimizer, state["loss"])
    for name in sorted(tensors.keys() ^ expected.keys()):
        raise ValueError(f"expected a checkpoint {'with' if name in expected else 'without'} {name}")
    for name, tensor in tensors.items():
        if _kind(tensor) != _kind(expected[name]):
            raise ValueError(f"expected {name} to be {_kind(expected[name])}, got {_kind(tensor)}")
        _check_finite(name, tensor)
    done = len(state["loss"])
    if not 0 < done < steps:
        raise ValueError(f"expected a checkpoint of less than {steps} steps, got one of {done}")
    return done


def _tensors(state):
    """Return the tensors of a state by name.

    Raises:
        ValueError: it has not the form of one.
    """
    optimizer = state["optimizer"].get("state") if isinstance(state["optimizer"], dict) else None
    parts = {"model": state["model"]}
    if isinstance(optimizer, dict):
        parts |= {f"optimizer.{index}": values for index, values in optimizer.items()}
    if not all(isinstance(values, dict) for values in (optimizer, *parts.values())):
        raise ValueError("expected a checkpoint with the states of a model and an optimizer, got something else")
    named = {f"{part}.{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
    return {"loss": state["loss"], **named}


def _expected(model, optimizer, loss):
    """Return tensors of the shapes and types that those of a state must have, by name."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        f"optimizer.{index}.{name}": like(parameter)
        for index, parameter in enumerate(parameters)
        for name, like in KINDS[type(optimizer)].items()
    }
    steps = len(loss) if isinstance(loss, torch.Tensor) and loss.ndim == 1 else 0
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"loss": torch.empty(steps, dtype=torch.float64), **named, **kept}


def _kind(value):
    """Say what a value is, as far as one tensor can stand for another."""
    if type(value) is not torch.Tensor or value.layout != torch.strided:
        return f"a {type(value).__name__} of another kind"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _check_finite(name, tensor):
    if not tensor.isfinite().all():
        raise ValueError(f"expected finite numbers, got nan or inf in {name}")
