"""All responses of a step to a verifier: one after another, in threads, as coroutines at the same time, or as one batch.

A verifier takes part in one of four ways:

- A plain function ``(question, response)`` is called for one response after another, each call isolated from the process
  (:mod:`pgpo_lightning.rewards.isolation`). It needs not be thread-safe.
- With ``reward.workers`` n, n threads call it. The process is protected once around all calls.
- An ``async def`` is awaited for all responses at the same time, or for ``reward.workers`` of them.
- A verifier with a method ``grade_batch(rollouts, step)`` gets all responses of this rank in one call. ``rollouts`` are
  :class:`~pgpo_lightning.core.types.Rollout`, with the question, the text and the token ids; ``step`` counts the batches that
  were trained on. It returns one result per rollout, each as from a plain verifier, or an exception where that response alone
  has failed. It may be an ``async def``.

The results have the order of the rollouts. They do not depend on which call ends first, if the verifier itself does not.
"""

import asyncio
import inspect
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.texts import shown
from pgpo_lightning.core.types import Question, Rollout, Verdict
from pgpo_lightning.rewards.event_loop import run_coroutine
from pgpo_lightning.rewards.grade import Verifier, asked, copied, grade, name, verdict_or_error, where
from pgpo_lightning.rewards.isolation import process_state_kept, signals_recorded

Graded = Verdict | VerifierError


def is_batched(verifier: Verifier) -> bool:
    """Whether the verifier has a method ``grade_batch``."""
    return callable(getattr(verifier, "grade_batch", None))


def is_async(verifier: Verifier) -> bool:
    """Whether the verifier is an ``async def``."""
    return inspect.iscoroutinefunction(verifier) or inspect.iscoroutinefunction(getattr(verifier, "__call__", None))  # noqa: B004


def check_workers(verifier: Verifier, workers: int | None) -> None:
    """Raise if `reward.workers` would have no effect.

    Raises:
        ValueError: If the verifier gets all responses in one call.
    """
    if workers is not None and is_batched(verifier):
        raise ValueError(
            f"Expected no `reward.workers` with verifier {name(verifier)}, whose `grade_batch` gets all responses in one "
            f"call, but got {workers}. Remove it."
        )


def graded(
    verifier: Verifier, rollouts: list[Rollout], workers: int | None = None, step: int = 0
) -> Generator[Graded, None, None]:
    """Yield the verdict on every rollout, or the error that names its question, in the order of the rollouts.

    Args:
        verifier: See the module.
        rollouts: Of this rank.
        workers: Threads that call a plain verifier, or coroutines of an asynchronous one at the same time; null for one after
            another, or all at once.
        step: Batches trained on so far.

    Raises:
        VerifierError: If threads or a batch leave the process changed in a way that cannot be undone, or return another number
            of results than rollouts.
        BaseException: The exception of a signal handler (Ctrl-C).
    """
    if not rollouts:
        return
    if is_batched(verifier):
        yield from grade_in_one_call(verifier, rollouts, step, _guarded(verifier, rollouts))
    elif is_async(verifier):
        yield from _at_the_same_time(verifier, rollouts, workers)
    elif workers is not None and workers > 1:
        yield from _in_threads(verifier, rollouts, workers)
    else:
        for rollout in rollouts:
            try:
                result: Graded = grade(verifier, rollout.question, rollout.text)
            except VerifierError as error:
                result = error
            yield result


def grade_in_thread(verifier: Verifier, rollout: Rollout) -> Graded:
    """Call a plain verifier without a guard of its own, so that threads can."""
    question = rollout.question
    return verdict_or_error(verifier, question, lambda: verifier(copied(question), rollout.text))


def _in_threads(verifier: Verifier, rollouts: list[Rollout], workers: int) -> Iterator[Graded]:
    with _guarded(verifier, rollouts):
        pool = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        try:
            for future in [pool.submit(grade_in_thread, verifier, rollout) for rollout in rollouts]:
                yield future.result()
        finally:
            # Threads that still run may change the process, which is restored after them.
            pool.shutdown(wait=True, cancel_futures=True)


async def grade_async(verifier: Verifier, rollout: Rollout) -> Graded:
    """Await an asynchronous verifier."""
    question = rollout.question
    try:
        returned: Any = await verifier(copied(question), rollout.text)  # type: ignore[misc]
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        return verdict_or_error(verifier, question, _raising(error))
    return verdict_or_error(verifier, question, lambda: returned)


def _at_the_same_time(verifier: Verifier, rollouts: list[Rollout], workers: int | None) -> Iterator[Graded]:
    async def one(rollout: Rollout, turn: asyncio.Semaphore) -> Graded:
        async with turn:
            return await grade_async(verifier, rollout)

    async def everyone() -> list[Graded]:
        turn = asyncio.Semaphore(workers or len(rollouts))
        return await asyncio.gather(*(one(rollout, turn) for rollout in rollouts))

    with _guarded(verifier, rollouts):
        results = run_coroutine(everyone())
    yield from results


def grade_in_one_call(
    verifier: Any, rollouts: list[Rollout], step: int, guard: AbstractContextManager[None] | None = None
) -> Iterator[Graded]:
    """Call ``grade_batch``, and yield what :func:`graded` does.

    Args:
        verifier: Has a method ``grade_batch``.
        rollouts: What it gets, in copies.
        step: Batches trained on so far.
        guard: Context of the call.
    """
    own = [
        replace(
            rollout,
            question=copied(rollout.question),
            prompt_ids=[*rollout.prompt_ids],
            response_ids=[*rollout.response_ids],
        )
        for rollout in rollouts
    ]
    failure: BaseException | None = None
    results: list[Any] = []
    with guard or nullcontext():
        try:
            returned = verifier.grade_batch(own, step)
            results = list(run_coroutine(returned) if inspect.iscoroutine(returned) else returned)
        except BaseException as error:
            failure = error
    if failure is not None:
        message = (
            f"Verifier {name(verifier)} raised {type(failure).__name__} on {_all_of(rollouts)}: {shown(failure, str)}"
        )
        for _ in rollouts:
            error_of_all = VerifierError(message)
            error_of_all.__cause__ = failure
            yield error_of_all
        return
    if len(results) != len(rollouts):
        raise VerifierError(
            f"Expected `grade_batch` of verifier {name(verifier)} to return {len(rollouts)} results, but got {len(results)} on "
            f"{_all_of(rollouts)}. Return one for each rollout, in their order."
        )
    for rollout, result in zip(rollouts, results, strict=True):
        call = _raising(result) if isinstance(result, BaseException) else _returning(result)
        yield verdict_or_error(verifier, rollout.question, call)


@contextmanager
def _guarded(verifier: Verifier, rollouts: list[Rollout]) -> Iterator[None]:
    """Protect the process around several calls together."""
    with signals_recorded() as heard, process_guarded(verifier, lambda: f" on {_all_of(rollouts)}", heard):
        yield
    if heard:
        raise heard[0]


@contextmanager
def process_guarded(verifier: Verifier, where: Callable[[], str], heard: list[BaseException]) -> Iterator[None]:
    """Restore what a verifier changes of the process.

    Args:
        verifier: Is named in the error.
        where: Text behind its name.
        heard: Exceptions that come before an error of the verifier.

    Raises:
        VerifierError: If a change cannot be undone.
    """
    guard = process_state_kept()
    guard.__enter__()
    try:
        yield
    finally:
        try:
            guard.__exit__(None, None, None)
        except (RuntimeError, OSError) as error:
            if not heard:
                raise VerifierError(f"Verifier {name(verifier)} failed{where()}: {error}") from error


def _all_of(rollouts: list[Rollout]) -> str:
    questions: dict[str, Question] = {where(rollout.question): rollout.question for rollout in rollouts}
    first = next(iter(questions.values()))
    return f"{len(rollouts)} responses to {len(questions)} questions, the first {asked(first)}"


def _raising(error: BaseException) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


def _returning(value: Any) -> Callable[[], Any]:
    return lambda: value
