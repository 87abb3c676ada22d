"""Train on when ranks run out of batches: `join`, a context manager and a `Joinable` of torch.distributed."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .communicators import Communicator, communicator
from .communicators.uneven import UnevenGroup
from .modules import SyncBatchNorm
from .modules.process_group import ProcessGroupReference

__all__ = ["join"]

GRACE = 1.0  # seconds to wait for the error of a thread
SHARDED = "FullyShardedDataParallel", "FSDPModule"  # classes of modules that gather parameters in forward


class join(Joinable):  # noqa: N801  # as torch.no_grad
    """Let ranks run out of batches: they go on answering the collectives of the ranks that have some.

        with syncnorm.join(model):
            for x, target in batches:  # each rank may have a different number of them
                loss = loss_of(model(x), target)
                ...

    A rank that reaches the end of the block takes part in the others' collectives of SyncBatchNorm, with no values and
    no gradient, until all ranks have reached it. So statistics and gradients are those of the samples present at each
    step. At the end all ranks have the running statistics of a rank that took part in the last step. Collectives of the
    program, and those of norms whose features or space are split, are not answered.

    If the model is or contains DistributedDataParallel, the block also does what
    `torch.distributed.algorithms.join.Join` does for it: ranks without batches take part in its all-reduces too, and at
    the end all ranks have the last parameters. At each step these ranks receive the gradients of the others, so that a
    ZeroRedundancyOptimizer can update its shard. Each backward pass must follow one call of
    DistributedDataParallel, except under `no_sync`. Forward passes under `torch.no_grad`, such as those of an
    evaluation, are allowed in the block. Ranks without batches make no optimizer steps: optimizers with a state, such
    as momentum, differ between the ranks afterwards. Load the state of a rank that took part in the last step on all
    ranks, or make a new optimizer, before you go on.

    It is also a `Joinable`, the first one in your own `Join`:

        with Join([syncnorm.join(model), model, optimizer]):

    Args:
        model: with layers of SyncBatchNorm, which may be in different process groups. Wrappers are allowed, except
            FullyShardedDataParallel and torch.compile.
        *joinables: what else joins, such as a ZeroRedundancyOptimizer.
        enable: False: do nothing, for batches that are known to be even.
        divide_by_initial_world_size: DistributedDataParallel divides gradients by the number of all ranks. False: by
            the number of ranks that still have batches, which is right for mean losses of batches of equal size.
        throw_on_early_termination: raise RuntimeError on all ranks as soon as one has no batches left.

    Collectives: all ranks enter and leave the block. Entering divides each process group of the layers once. In the
    block each collective of a layer is preceded by an all-reduce of 9 float64 on the CPU. The layers compare their
    calls anew in the block and after it. Leaving it broadcasts the running statistics, if some rank ran out of batches.

    Raises:
        DesyncError: on all ranks, those without batches included, if the others are in different calls or layers, or
            if a rank does not come.
        ValueError: the model contains FullyShardedDataParallel, or a layer that has no parameters yet.
        TypeError: a communicator of a layer has no `split`.
        RuntimeError: the model is compiled, or already in such a block; another block has layers in the same process
            group; MPI does not support threads.

    See also: `torch.distributed.algorithms.join.Join`.
    """

    def __init__(
        self,
        model: nn.Module,
        *joinables: Joinable,
        enable: bool = True,
        divide_by_initial_world_size: bool = True,
        throw_on_early_termination: bool = False,
    ):
        super().__init__()
        self.model, self.enable = model, enable
        self._wrapped = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        self._others: list[Any] = [*self._wrapped, *joinables]
        self._options = {
            "divide_by_initial_world_size": divide_by_initial_world_size,
            "throw_on_early_termination": throw_on_early_termination,
        }
        self._join: Join | None = None
        self._groups: list[tuple[UnevenGroup, list[SyncBatchNorm]]] = []
        self._answers: list[_Answers] | None = None
        self._notified: Any = None  # kept, since C++ code does not keep the Python part of a Work
        self._stop: Callable[[], object] = _nothing

    def __enter__(self) -> join:
        if self.enable and self._others:
            try:
                self._join = Join([self, *self._others], **self._options)
            except BaseException:
                self._stop()
                raise
            self._join.__enter__()  # type: ignore[no-untyped-call]
        elif self.enable:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._join is not None:
                if kind is None:
                    self._answer()  # before the first step of torch's, in which the others may call a part of the model
                self._join.__exit__(kind, error, traceback)
            elif self.enable and kind is None:
                self._finish()
        except RuntimeError as failed:
            known = self._options["throw_on_early_termination"]
            for answers in [] if known else self._answers or []:  # they may know why
                answers.join(GRACE)
                if answers.error is not None and answers.error is not failed:
                    raise answers.error from failed
            raise
        finally:
            self._join = None
            self._stop()

    def join_hook(self, **_options: Any) -> JoinHook:
        """Start, and return what a `Join` calls on a rank that has no batches left."""
        self._start()
        return _Hook(self)

    @property
    def join_device(self) -> torch.device:
        """The device of the model."""
        tensor = next(itertools.chain(self.model.parameters(), self.model.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def join_process_group(self) -> Any:
        """The process group of the first of the others that join, else torch.distributed's default group."""
        return self._others[0].join_process_group if self._others else dist.group.WORLD

    @property
    def _join_config(self) -> Any:
        return self._config

    @_join_config.setter
    def _join_config(self, config: Any) -> None:
        self._config = config
        if config.enable and not config.is_first_joinable:
            self._stop()
            raise ValueError("expected syncnorm.join(model) as the first joinable of a Join, got it after another one")
        if not config.enable and hasattr(self, "_stop"):  # Join(enable=False) has called join_hook, too
            self._stop()

    def _start(self) -> None:
        """Let the layers use groups whose ranks may run out of batches. Collective."""
        _check(self.model)
        layers = [module for module in self.model.modules() if isinstance(module, SyncBatchNorm)]
        by_group: dict[int, tuple[Communicator, list[SyncBatchNorm]]] = {}
        for layer in layers:
            group = layer._group.resolve() or communicator()
            if isinstance(group, UnevenGroup):
                raise RuntimeError("expected a model that is not in syncnorm.join, got one that is already")
            if group.size > 1:
                by_group.setdefault(id(group), (group, []))[1].append(layer)
        throws = self._options["throw_on_early_termination"] and not self._others
        self._groups = [(UnevenGroup(group, throws=throws), of_group) for group, of_group in by_group.values()]
        self._answers = None
        references = []
        for uneven, of_group in self._groups:
            for reference in {id(layer._group): layer._group for layer in of_group}.values():
                reference.substitute(uneven)
                references.append(reference)
        groups = [uneven for uneven, _ in self._groups]
        self._stop = weakref.finalize(self, _end, groups, references, self._register_hooks())

    def _register_hooks(self) -> list[RemovableHandle | _Receiving]:
        this = weakref.ref(self)

        def notify(module: nn.Module, _args: Any) -> None:
            joinable = this()
            if joinable is None or not joinable._join_config.enable:  # not in a Join
                return
            joinable._notified = work = Join.notify_join_context(joinable)
            if isinstance(module, DistributedDataParallel):  # which does so where it is the first joinable
                module.reducer._set_forward_pass_work_handle(work, bool(module._divide_by_initial_world_size))

        handles: list[RemovableHandle | _Receiving] = [
            next(iter(self._wrapped), self.model).register_forward_pre_hook(notify)
        ]
        for module in self._wrapped:
            handles += [*_announce_no_backward(module), _Receiving(module)]
        return handles

    def _answer(self) -> None:
        """Start to answer the collectives of the ranks that have batches, each group in a thread of its own.

        This thread may have to answer those of DistributedDataParallel, which come in between.
        """
        if self._answers is None:
            self._answers = [_Answers(group, self.join_device) for group, _ in self._groups]
            for answers in self._answers:
                answers.start()

    def _finish(self) -> None:
        """Answer until no rank has batches, and take the running statistics of a rank that made the last step."""
        self._answer()
        for answers in self._answers or []:
            answers.join()
        self._raise_errors()
        for group, layers in self._groups:
            answered = group.all_gather_object(group.answered)
            if max(answered) > 0:
                for layer in layers:
                    for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked):
                        if buffer is not None:
                            group.broadcast(buffer, answered.index(min(answered)))
        self._stop()

    def _raise_errors(self) -> None:
        for answers in self._answers or []:
            if answers.error is not None:
                raise answers.error


class _Hook(JoinHook):
    def __init__(self, of: join):
        self._of = of

    def main_hook(self) -> None:
        """Answer the collectives of a step, in the background."""
        self._of._answer()
        self._of._raise_errors()

    def post_hook(self, is_last_joiner: bool) -> None:
        """End, when no rank has batches left."""
        self._of._finish()


class _Answers(threading.Thread):
    """Answers the collectives of one group.

    Attributes:
        error: with which it has ended, if any.
    """

    def __init__(self, group: UnevenGroup, device: torch.device):
        super().__init__(name="syncnorm.join", daemon=True)
        self.group, self.device = group, device
        self.error: BaseException | None = None

    def run(self) -> None:
        """Answer until no rank has batches."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            self.group.answer(self.device)
        except BaseException as error:
            self.error = error


def _check(model: nn.Module) -> None:
    for path, module in model.named_modules():
        classes = {kind.__name__ for kind in type(module).__mro__}
        if sharded := classes.intersection(SHARDED):
            raise ValueError(
                f"expected a model without {sharded.pop()} in syncnorm.join, got one: ranks without batches cannot "
                "take part in its collectives"
            )
        if "OptimizedModule" in classes:
            raise RuntimeError(
                "expected a model that is not compiled in syncnorm.join, got one of torch.compile: how many ranks have "
                "batches is only known when it runs"
            )
        if isinstance(module, SyncBatchNorm) and getattr(module, "has_uninitialized_params", bool)():
            raise ValueError(
                f"expected layers that have parameters in syncnorm.join, got a lazy one, {path or 'the model'}: call "
                "the model once before"
            )


def _announce_no_backward(module: DistributedDataParallel) -> list[RemovableHandle]:
    """Let forward passes without gradients announce that no backward pass follows, as those of `no_sync` do."""
    kept: list[bool] = []

    def before(_module: nn.Module, _args: Any) -> None:
        kept.append(module.require_backward_grad_sync)
        module.require_backward_grad_sync &= torch.is_grad_enabled()

    def after(_module: nn.Module, _args: Any, _output: Any) -> None:
        module.require_backward_grad_sync = kept.pop()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


class _Receiving:
    """Lets a rank without batches keep the gradients of the others, when it takes part in their all-reduces.

    DistributedDataParallel drops them, and torch's own join hook for a ZeroRedundancyOptimizer expects them.
    """

    def __init__(self, module: DistributedDataParallel):
        self._attributes = vars(module)
        self._attributes["_match_all_reduce_for_bwd_pass"] = functools.partial(self._receive, module.reducer)

    def remove(self) -> None:
        del self._attributes["_match_all_reduce_for_bwd_pass"]

    @staticmethod
    def _receive(reducer: Any) -> None:
        buckets = reducer._get_zeros_like_grad_buckets()
        reduced = [reducer._run_comm_hook(bucket) for bucket in buckets]
        for bucket, future in zip(buckets, reduced, strict=True):
            value = future.wait()
            bucket.buffer().copy_(value[0] if isinstance(value, list | tuple) else value)
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                parameter.grad = gradient.view_as(parameter).clone()


def _end(
    groups: list[UnevenGroup], references: list[ProcessGroupReference], handles: list[RemovableHandle | _Receiving]
) -> None:
    for group in groups:
        group.close()
    for reference in references:
        reference.substitute(None)
    for handle in handles:
        handle.remove()


def _nothing() -> None:
    """Stop what has not started."""
