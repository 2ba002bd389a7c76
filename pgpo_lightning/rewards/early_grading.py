"""Grading of finished responses while others are still being sampled.

It pays off for verifiers that wait or compute elsewhere: processes of their own (:class:`~pgpo_lightning.rewards.CodeExecution`),
servers, sandboxes. Python code that computes in this process would only take turns with the sampling. So a verifier takes part
only if it is not called for one response after another (:mod:`pgpo_lightning.rewards.batches`), and if its class says so with
``while_sampling = True`` or `reward.while_sampling` is set. It then

- is called in other threads than the main one, with torch's usual gradient mode and no autocast;
- must not draw from the global random generators or change the process, which would change what is sampled;
- with ``grade_batch`` gets the responses of a step in several calls, in the order in which they were finished. A result must not
  depend on what else is in a call. An exception of the call is the failure of its responses alone.

Verdicts are collected in the order of the rollouts, so rewards, feedback and the first error are those of grading afterwards.
"""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, Protocol

from pgpo_lightning.core.types import Rollout
from pgpo_lightning.rewards.batches import (
    Graded,
    grade_async,
    grade_in_one_call,
    grade_in_thread,
    is_async,
    is_batched,
    process_guarded,
)
from pgpo_lightning.rewards.grade import Verifier, name


def grades_early(verifier: Verifier, workers: int | None, wanted: bool | None, engine: Any) -> bool:
    """Return whether responses are graded while others are being sampled.

    Args:
        verifier: Judges them.
        workers: `reward.workers`.
        wanted: `reward.while_sampling`; null for what the verifier says.
        engine: Samples them.

    Raises:
        ValueError: If it is wanted and has no effect.
    """
    said = bool(getattr(verifier, "while_sampling", False))
    if not (said if wanted is None else wanted):
        return False
    if not (is_batched(verifier) or is_async(verifier) or (workers or 1) > 1):
        what = "`reward.while_sampling` true" if wanted else f"`while_sampling` of the class {type(verifier).__name__}"
        raise ValueError(
            f"Expected a verifier that judges several responses at the same time with {what}, but {name(verifier)} is called for "
            "one after another. Set `reward.workers` to at least 2, make it an `async def`, or give it a `grade_batch`."
        )
    if wanted and not getattr(engine, "hands_over", False):
        raise ValueError(
            f"Expected an engine that hands over responses as they are finished with `reward.while_sampling` true, but "
            f"{type(engine).__name__} returns all of them at the end. Set it to null."
        )
    return bool(getattr(engine, "hands_over", False))


class _Busy:
    """Wall seconds in which at least one call was running.

    Attributes:
        seconds: So far, without calls that are running.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock, self._running, self._since = Lock(), 0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._since = self._since if self._running else time.perf_counter()
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            self.seconds += 0.0 if self._running else time.perf_counter() - self._since


class _Caller(Protocol):
    def submit(self, rollout: Rollout, step: int) -> "Future[Graded]":
        """Have a rollout graded."""

    def close(self, wait: bool) -> None:
        """Drop what has not been started, and wait for what has."""


class _Threads:
    """Calls a plain verifier in threads."""

    def __init__(self, verifier: Verifier, workers: int, busy: _Busy) -> None:
        self.verifier, self.busy = verifier, busy
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="verifier")

    def submit(self, rollout: Rollout, step: int) -> "Future[Graded]":
        return self.pool.submit(self._one, rollout)

    def _one(self, rollout: Rollout) -> Graded:
        with self.busy:
            return grade_in_thread(self.verifier, rollout)

    def close(self, wait: bool) -> None:
        self.pool.shutdown(wait, cancel_futures=True)


class _Coroutines:
    """Awaits an asynchronous verifier, in an event loop in a thread of its own."""

    def __init__(self, verifier: Verifier, workers: int | None, busy: _Busy) -> None:
        self.verifier, self.busy, self.workers = verifier, busy, workers
        started: Future[asyncio.AbstractEventLoop] = Future()
        self.thread = Thread(target=lambda: asyncio.run(self._serve(started)), name="verifier-loop", daemon=True)
        self.thread.start()
        self.loop = started.result()

    async def _serve(self, started: "Future[asyncio.AbstractEventLoop]") -> None:
        self.turn = asyncio.Semaphore(self.workers) if self.workers else None
        self.end = asyncio.Event()
        started.set_result(asyncio.get_running_loop())
        await self.end.wait()  # what is still running then is cancelled

    def submit(self, rollout: Rollout, step: int) -> "Future[Graded]":
        return asyncio.run_coroutine_threadsafe(self._one(rollout), self.loop)

    async def _one(self, rollout: Rollout) -> Graded:
        if self.turn is None:
            with self.busy:
                return await grade_async(self.verifier, rollout)
        async with self.turn:
            with self.busy:
                return await grade_async(self.verifier, rollout)

    def close(self, wait: bool) -> None:
        self.loop.call_soon_threadsafe(self.end.set)
        if wait:
            self.thread.join()


class _Batches:
    """Calls ``grade_batch`` in a thread, each time with all that was finished during the last call."""

    def __init__(self, verifier: Verifier, busy: _Busy) -> None:
        self.verifier, self.busy = verifier, busy
        self.queue: SimpleQueue[tuple[Rollout, int, Future[Graded]] | None] = SimpleQueue()
        # A daemon, so that a call that takes long does not keep an interrupted process alive.
        self.thread = Thread(target=self._serve, name="verifier", daemon=True)
        self.thread.start()

    def submit(self, rollout: Rollout, step: int) -> "Future[Graded]":
        future: Future[Graded] = Future()
        self.queue.put((rollout, step, future))
        return future

    def _serve(self) -> None:
        while True:
            waiting = [self.queue.get()]
            with suppress(Empty):
                while True:
                    waiting.append(self.queue.get_nowait())
            part = [each for each in waiting if each is not None and each[2].set_running_or_notify_cancel()]
            if part:
                self._one(part)
            if None in waiting:
                return

    def _one(self, part: list[tuple[Rollout, int, "Future[Graded]"]]) -> None:
        try:
            with self.busy:
                results = list(grade_in_one_call(self.verifier, [rollout for rollout, _, _ in part], part[0][1]))
        except BaseException as error:  # raised where the verdicts are collected
            for _, _, future in part:
                future.set_exception(error)
            return
        for (_, _, future), result in zip(part, results, strict=True):
            future.set_result(result)

    def close(self, wait: bool) -> None:
        self.queue.put(None)
        if wait:
            self.thread.join()


class EarlyGrading:
    """The responses of a step that are being graded.

    Args:
        verifier: Judges them.
        workers: `reward.workers`.
    """

    def __init__(self, verifier: Verifier, workers: int | None) -> None:
        self._busy = _Busy()
        self._caller: _Caller
        if is_batched(verifier):
            self._caller = _Batches(verifier, self._busy)
        elif is_async(verifier):
            self._caller = _Coroutines(verifier, workers, self._busy)
        else:
            self._caller = _Threads(verifier, workers or 1, self._busy)
        self._known: dict[int, tuple[Rollout, Future[Graded]]] = {}  # by identity
        self.step = 0
        """Batches trained on so far."""

    @property
    def seconds(self) -> float:
        """Wall seconds in which the verifier was at work."""
        return self._busy.seconds

    def put(self, rollout: Rollout) -> None:
        """Have a rollout graded, unless it is already."""
        if id(rollout) not in self._known:
            self._known[id(rollout)] = rollout, self._caller.submit(rollout, self.step)

    def results(self, rollouts: list[Rollout]) -> Iterator[Graded]:
        """Yield the verdict on every rollout, or the error that names its question, in this order, once it is there.

        Raises:
            VerifierError: If a batch returns another number of results than rollouts.
        """
        for rollout in rollouts:
            self.put(rollout)
        for rollout in rollouts:
            yield self._known[id(rollout)][1].result()

    def close(self, wait: bool = True) -> None:
        """Grade nothing more.

        Args:
            wait: Whether to wait for calls that are running.
        """
        for _, future in self._known.values():
            future.cancel()
        self._caller.close(wait)


@contextmanager
def early_grading(verifier: Verifier, workers: int | None) -> Iterator[EarlyGrading]:
    """Context of the sampling and judging of a step. Afterwards no call is running, and the process is as it was before.

    After an interrupt (Ctrl-C) it does not wait for calls that are running.

    Raises:
        VerifierError: If the verifier has changed the process in a way that cannot be undone.
    """
    ended: list[BaseException] = []
    with process_guarded(verifier, lambda: "", ended):
        grading = EarlyGrading(verifier, workers)
        try:
            yield grading
        except BaseException as error:
            ended.append(error)
            grading.close(wait=isinstance(error, Exception))
            raise
        grading.close()
