"""Call a verifier, and turn its result into a ``Verdict`` or its failure into one error that names the question."""

import copy
import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from decimal import Decimal
from numbers import Real
from typing import Any, TypeAlias

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.texts import is_text, shown
from pgpo_lightning.core.types import Question, Verdict
from pgpo_lightning.rewards.event_loop import run_coroutine
from pgpo_lightning.rewards.isolation import process_state_kept, signals_recorded

Verifier: TypeAlias = Callable[[Question, str], Verdict | float | tuple[float, str]]
"""A function, or an object of a class with ``__call__``, that judges one decoded response (no special tokens).

An ``async def`` serves too. For ``grade_batch`` see :mod:`pgpo_lightning.rewards.batches`.
"""

LARGEST_REWARD = 1e16
"""Largest absolute reward: the sum of squares of thousands of them is finite in float32."""

SMALLEST_REWARD = 2.0**-126
"""Smallest absolute reward that is not 0: smaller numbers lose digits in float32, and some devices flush them to 0."""


def grade(verifier: Verifier, question: Question, response: str) -> Verdict:
    """Call a verifier and return its result as a ``Verdict`` with a finite reward.

    The verifier gets a copy of the question, and changes that it makes to the process are undone. An ``async def`` is run to its
    end. Rewards with an absolute value below ``SMALLEST_REWARD`` become 0.

    Raises:
        VerifierError: If the verifier raises anything (``SystemExit`` and ``KeyboardInterrupt`` too) or returns anything but a
            number of at most ``LARGEST_REWARD``, ``(reward, feedback)`` or a Verdict.
        BaseException: The exception of a signal handler (Ctrl-C), even if the verifier catches it.
    """

    def call() -> Any:
        returned = verifier(copied(question), response)
        return run_coroutine(returned) if inspect.iscoroutine(returned) else returned

    # A verifier may catch an interrupt (`except:`) or raise one itself. Only the exception of a signal handler ends the run.
    with signals_recorded() as heard:
        result = verdict_or_error(verifier, question, call, process_state_kept)
    if heard:
        raise heard[0]
    if isinstance(result, VerifierError):
        raise result
    return result


def verdict_or_error(
    verifier: Verifier,
    question: Question,
    call: Callable[[], Any],
    guard: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Verdict | VerifierError:
    """Return the verdict that a call gives, or its failure as an error that names the question.

    Args:
        verifier: Is named in the error.
        question: Is named in the error.
        call: Returns a verifier's result.
        guard: Context of the call; what it raises is the verifier's failure too.
    """
    try:
        with guard():
            returned = call()
            verdict, why = _verdict(returned)
    except BaseException as error:
        failure = VerifierError(
            f"Verifier {name(verifier)} raised {type(error).__name__} on {asked(question)}: {shown(error, str)}"
        )
        failure.__cause__ = error
        return failure
    if verdict is None:
        return VerifierError(
            f"Expected verifier {name(verifier)} to return a finite number, (reward, feedback) or a Verdict, but got "
            f"{shown(returned)} on {asked(question)}{why}."
        )
    return verdict


def check_question(verifier: Verifier, question: Question) -> None:
    """Call the verifier's method ``check_question``, if it has one, before anything is sampled.

    Raises:
        ValueError: From the verifier, if it cannot grade the question.
    """
    check = getattr(verifier, "check_question", None)
    if callable(check):
        check(question)


def name(verifier: Verifier) -> str:
    """Return a verifier's name for a message."""
    return getattr(verifier, "__qualname__", None) or type(verifier).__qualname__


def where(question: Question) -> str:
    """Return the place of a question, for a message."""
    return f"question {question.index} of {question.source or 'an unnamed source'}"


def asked(question: Question) -> str:
    """Return a question's place and the start of its prompt, for a message."""
    return f"{where(question)} ({shown(question.prompt, lambda prompt: repr(str(prompt)[:80]))})"


def copied(question: Question) -> Question:
    """Return a question with copied containers, so that a verifier cannot change the original."""
    own = copy.copy(question)
    for attribute, value in vars(question).items():
        setattr(own, attribute, _containers(value))
    return own


def _containers(value: Any) -> Any:
    if type(value) is dict:
        return {key: _containers(each) for key, each in value.items()}
    if type(value) is list:
        return [_containers(each) for each in value]
    return value


def _verdict(result: Any) -> tuple[Verdict | None, str]:
    """Return a verifier's result as a Verdict, or None and the reason, if it needs one."""
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()  # or Python warns that it was never awaited
        return None, ": it is an awaitable. Give an `async def` function, so that it is awaited"
    if inspect.isgenerator(result):
        return None, ": it contains `yield`. Return the reward instead"
    parts = (result, None) if not isinstance(result, (tuple, Verdict)) else result
    curves: dict[str, float] = {}
    if isinstance(parts, Verdict):
        curves = parts.curves
        if not isinstance(curves, dict) or any(_number(each) is None for each in curves.values()):
            return None, ": its curves are numbers by name"
        parts = (parts.reward, parts.feedback, parts.answer)
    elif len(parts) != 2:
        return None, ""
    reward, texts = _number(parts[0]), parts[1:]
    if reward is None or not all(isinstance(text, str | None) for text in texts):
        return None, ""
    if not abs(reward) <= LARGEST_REWARD:
        return None, f": rewards have an absolute value of at most {LARGEST_REWARD:g}" if math.isfinite(reward) else ""
    for text in texts:
        if text is not None and not is_text(text):
            return None, ": its text has a lone surrogate, which tokenizers refuse"
    numbers = {str(key): _number(each) or 0.0 for key, each in curves.items()}
    feedback, answer = (*texts, None)[:2]
    return Verdict(0.0 if abs(reward) < SMALLEST_REWARD else reward, feedback, answer, numbers), ""


def _number(value: Any) -> float | None:
    """Return a real number as a float, infinite if it is too large; None if it is not a number."""
    if not isinstance(value, (Real, Decimal)) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a number of NumPy or torch
    if not isinstance(value, (Real, Decimal)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:  # a signalling NaN
        return math.nan
