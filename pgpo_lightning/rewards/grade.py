"""Call a verifier, and turn its result into a ``Verdict`` or its failure into one error that names the question."""

import copy
import inspect
import math
from collections.abc import Callable
from decimal import Decimal
from numbers import Real
from typing import Any, TypeAlias

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.texts import is_text, shown
from pgpo_lightning.core.types import Question, Verdict
from pgpo_lightning.rewards.isolation import process_state_kept, signals_recorded

Verifier: TypeAlias = Callable[[Question, str], Verdict | float | tuple[float, str]]
"""A function, or an object of a class with ``__call__``, that judges one decoded response (no special tokens)."""

LARGEST_REWARD = 1e16
"""Largest absolute reward: the sum of squares of thousands of them is finite in float32."""

SMALLEST_REWARD = 2.0**-126
"""Smallest absolute reward that is not 0: smaller numbers lose digits in float32, and some devices flush them to 0."""


def grade(verifier: Verifier, question: Question, response: str) -> Verdict:
    """Call a verifier and return its result as a ``Verdict`` with a finite reward.

    The verifier gets a copy of the question, and changes that it makes to the process are undone. Rewards with an absolute value
    below ``SMALLEST_REWARD`` become 0.

    Raises:
        VerifierError: If the verifier raises anything (``SystemExit`` and ``KeyboardInterrupt`` too) or returns anything but a
            number of at most ``LARGEST_REWARD``, ``(reward, feedback)`` or a Verdict.
        BaseException: The exception of a signal handler (Ctrl-C), even if the verifier catches it.
    """
    # A verifier may catch an interrupt (`except:`) or raise one itself. Only the exception of a signal handler ends the run.
    failure: BaseException | None = None
    with signals_recorded() as heard:
        try:
            with process_state_kept():
                return_value = verifier(_copy(question), response)
                verdict, why = _verdict(return_value)
        except BaseException as error:
            failure = error
    if heard:
        raise heard[0]
    if failure is not None:
        kind = type(failure).__name__
        raise VerifierError(
            f"Verifier {name(verifier)} raised {kind} on {_asked(question)}: {shown(failure, str)}"
        ) from failure
    if verdict is None:
        raise VerifierError(
            f"Expected verifier {name(verifier)} to return a finite number, (reward, feedback) or a Verdict, but got "
            f"{shown(return_value)} on {_asked(question)}{why}."
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


def _asked(question: Question) -> str:
    return f"{where(question)} ({shown(question.prompt, lambda prompt: repr(str(prompt)[:80]))})"


def _copy(question: Question) -> Question:
    """Return a question with copied containers, so that a verifier cannot change the original."""
    copied = copy.copy(question)
    for attribute, value in vars(question).items():
        setattr(copied, attribute, _containers(value))
    return copied


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
        return None, ": it is an `async def`. Give a plain function, which may call `asyncio.run`"
    if inspect.isgenerator(result):
        return None, ": it contains `yield`. Return the reward instead"
    parts = (result, None) if not isinstance(result, (tuple, Verdict)) else result
    if isinstance(parts, Verdict):
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
    return Verdict(0.0 if abs(reward) < SMALLEST_REWARD else reward, *texts), ""


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
