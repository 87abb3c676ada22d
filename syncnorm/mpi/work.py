"""A started collective: the Work of torch.distributed, and its future."""

# torch calls these methods. They have its names and are documented there.
# ruff: noqa: D102
# mypy: disable-error-code="override, assignment, no-untyped-call, no-any-return"

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Lock
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ..errors import DesyncError
from ..job.desync import raise_desync
from . import unfinished
from .health import Health
from .library import MPI, raise_mpi_error, ranks_in_the_job, takes_threads
from .timeout import overdue, wait_until

__all__ = ["NO_TIME", "MpiFuture", "MpiWork", "Started"]

ISSUES_COLLECTIVES = True  # lets `syncnorm.job.desync` recognize these functions

NO_TIME = timedelta(0)
MOMENT = 0.01  # seconds in which most works complete; watching them in a thread would slow the backward pass

Started = tuple[MPI.Request, Callable[[], Any]]  # a request, and a function to call when it is complete


class MpiWork(dist.Work):
    """A collective in progress: non-blocking MPI requests, and functions that process the memory they fill.

    It is kept alive until MPI is done with it, even if nothing waits for it and its group is destroyed.

    Args:
        name: the collective and its rank and group, for errors.
        started: requests, each with a function to call when all are complete.
        result: the tensors that `result` and `get_future` return.
        timeout: time after which `wait` raises.
        comm: the communicator of the participating ranks.
        health: the health of the group.
        record: the profiler's record, which ends with the collective.
    """

    def __init__(
        self,
        name: str,
        started: Sequence[Started],
        result: list[Tensor],
        timeout: timedelta,
        comm: MPI.Comm,
        health: Health,
        record: Any = None,
    ):
        super().__init__()
        self.name = name
        self.comm = comm
        self.health = health
        self.started = started
        self.tensors = result
        self.timeout = timeout
        self.over = False  # MPI is done with it
        self.error: BaseException | None = None
        self.status = MPI.Status()
        self.record = record
        self.advancing = Lock()  # because a thread makes progress for futures
        unfinished.hold(self._advance, self)

    def _advance(self) -> bool:
        """Make progress without blocking, and return whether MPI is done with the requests."""
        if not self.over and self.advancing.acquire(blocking=False):
            try:
                if not self.over:
                    self._test()
            finally:
                self.advancing.release()
        return self.over

    def _test(self) -> None:
        started = self.started
        try:
            if len(started) == 1:
                over = started[0][0].Test(self.status)
            else:
                over = MPI.Request.Testall([request for request, _ in started])
            if not over:
                return
            if self.error is None:
                for _, finish in started:
                    finish()
        except Exception as error:
            self._fail(error, f"{self.name}: {error}")
            if len(started) > 1:
                unfinished.hold(lambda: False, started)  # only one request failed; the others may continue
        self.over = True
        self.started = ()
        unfinished.release(self)
        if self.record is not None:
            self.record.__exit__(None, None, None)

    def _fail(self, error: BaseException, what: str) -> None:
        """End with an error. Later calls on this communicator could be matched with different calls of the peers."""
        self.error = error
        if isinstance(error, MPI.Exception | TimeoutError):
            self.health.fail(what)

    def is_completed(self) -> bool:
        """Make progress without blocking, and return whether the collective has completed or failed."""
        return self._advance() or self.error is not None

    def is_success(self) -> bool:
        """Return whether the collective has completed without an error."""
        return self.is_completed() and self.error is None

    def exception(self) -> BaseException | None:
        """Return the error that `wait` raises, or None if there is none so far."""
        return self.error

    def wait(self, timeout: timedelta = NO_TIME) -> bool:
        """Wait for the result and return True. Raise MPI's error, or DesyncError."""
        if not self.is_completed():
            self.health.check()
            try:
                wait_until(self.is_completed, timeout or self.timeout, self.name)
            except TimeoutError as error:
                self._fail(error, str(error))
        try:
            if isinstance(self.error, TimeoutError):
                raise_desync(self.error, str(self.error), ranks_in_the_job(self.comm))
            if isinstance(self.error, MPI.Exception):
                raise_mpi_error(self.error, self.name, self.comm)
        except DesyncError as desync:  # the ranks are queried only once
            self.error = desync
        if self.error is not None:
            raise self.error
        return True

    def result(self) -> list[Tensor]:
        """Wait, and return the tensors that the collective wrote."""
        self.wait()
        return self.tensors

    def get_future(self) -> Future[list[Tensor]]:
        """Return a future of the result."""
        return MpiFuture(self)

    def _source_rank(self) -> int:
        source: int = self.status.Get_source()
        return source


class MpiFuture(Future[list[Tensor]]):
    """The future of a work.

    A callback runs in the thread that adds it, after that thread has waited for the work. Collectives issued by
    callbacks, such as PowerSGD's, therefore have the same order on all ranks. C++ code, such as
    DistributedDataParallel's, waits without running Python. So a thread watches works that do not complete within a
    moment, if MPI supports threads.
    """

    def __init__(self, work: MpiWork):
        super().__init__()
        self.work = work
        self.settling = Lock()
        until = time.monotonic() + MOMENT
        while not self._settled() and time.monotonic() < until:
            os.sched_yield()
        if not self._settled():
            if not takes_threads():
                self._settle()
            else:
                self.deadline = time.monotonic() + work.timeout.total_seconds()
                unfinished.watch(self._settled_in_time)

    def _settled_in_time(self) -> bool:
        if not self._settled() and time.monotonic() > self.deadline:
            self.work._fail(error := TimeoutError(overdue(self.work.name, self.work.timeout)), str(error))
        return self._settled()

    def _settled(self) -> bool:
        """Return whether the work has completed or failed, without waiting for it."""
        if self.work.is_completed():
            self._settle()
        return super().done()

    def _settle(self) -> None:
        with self.settling:
            if super().done():
                return
            try:
                self.work.wait()
            except Exception as error:
                self.set_exception(error)  # type: ignore[arg-type]
            else:
                self.set_result(self.work.tensors)

    def done(self) -> bool:
        return self._settled()

    def wait(self) -> list[Tensor]:
        self._settle()
        return super().wait()

    def value(self) -> list[Tensor]:
        self._settled()
        return super().value()

    def then(self, callback: Callable[[Future[list[Tensor]]], Any]) -> Future[Any]:
        self._settle()
        return super().then(callback)

    def add_done_callback(self, callback: Callable[[Future[list[Tensor]]], None]) -> None:
        self._settle()
        super().add_done_callback(callback)
