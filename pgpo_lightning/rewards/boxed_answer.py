r"""Verifier of mathematics: the answer in the last ``\boxed{}`` of a response."""

import math
import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from numbers import Integral, Real
from typing import Annotated

from pgpo_lightning.core.settings import Count, Range, checked
from pgpo_lightning.core.texts import shown
from pgpo_lightning.core.types import Question, Verdict
from pgpo_lightning.rewards import symbolic
from pgpo_lightning.rewards.grade import where


@checked
class BoxedAnswer:
    r"""Compare the last complete ``\boxed{...}`` with ``question.answer``: 1.0 if they are equal, else 0.0.

    Equal texts (after removing LaTeX spacing, ``$``, thousands separators and the like) and plain decimal numbers are compared
    here, exactly: ``0.50`` equals ``.5``, but ``0.333333`` does not equal ``0.3333333``. Everything else (fractions, roots,
    symbols, sets, intervals, equations, matrices) is compared by math-verify, in a separate process.

    Args:
        feedback: Whether a wrong answer gets a line of feedback, which does not depend on the gold answer.
        max_chars: A box with more characters than this is wrong, whatever its content.
        timeout: An answer for which math-verify needs more seconds than this, such as ``9^{9^9}``, is wrong.

    Raises:
        ValueError: If an argument is out of range, or, when called, if the gold answer is neither a text nor a finite number.

    Example:
        >>> BoxedAnswer(feedback=True)(Question("2 * 12?", answer=24), r"It is \boxed{48}.")
        Verdict(reward=0.0, feedback='The final answer 48 is wrong.', answer='48')
    """

    def __init__(
        self,
        feedback: bool = False,
        max_chars: Count = 200,
        timeout: Annotated[float, Range(above=0, most=symbolic.LONGEST_TIMEOUT)] = 3.0,
    ) -> None:
        self.feedback, self.max_chars, self.timeout = feedback, max_chars, timeout

    def check_question(self, question: Question) -> None:
        """Raise if the gold answer is neither a text nor a finite number, or is empty after normalisation.

        Raises:
            ValueError: Names the row.
        """
        _gold(question)

    def __call__(self, question: Question, response: str) -> Verdict:
        """Grade one response; ``question.answer`` (text or number) is the gold answer without a box around it."""
        gold = _gold(question)
        box = _last_box(response, self.max_chars)
        answer = _normalise(box) if len(box) <= self.max_chars else None
        if answer and _equal(gold, answer, self.timeout):
            return Verdict(reward=1.0, answer=answer)
        feedback = f"The final answer {answer} is wrong." if answer else r"No final answer in \boxed{} was found."
        if answer is None:
            feedback = f"The final answer is longer than {self.max_chars} characters."
        return Verdict(reward=0.0, feedback=feedback if self.feedback else None, answer=answer or None)


def _gold(question: Question) -> str:
    gold = question.answer
    text = ""
    if isinstance(gold, str):
        text = _normalise(gold)
    elif isinstance(gold, Fraction) or (isinstance(gold, Integral) and not isinstance(gold, bool)):
        text = str(gold)
    elif isinstance(gold, (Real, Decimal)) and not isinstance(gold, bool) and math.isfinite(gold):
        text = format(Decimal(str(gold)), "f")  # math-verify would read the e of 1e-07 as Euler's number
    if not text:
        raise ValueError(
            f"Expected {where(question)} to have a gold answer, a text or a finite number, but got "
            f"{type(gold).__name__} {shown(gold)}. Correct the row, set `answer_column`, or use a "
            "`verifier` that can grade it."
        )
    return text


def _last_box(response: str, max_chars: int) -> str:
    """Return the content of the last closed box, cut at ``max_chars + 1`` characters, or an empty text."""
    for opening in reversed(list(re.finditer(r"\\boxed\s*\{", response))):
        depth = 1
        # The limit also bounds the time for thousands of boxes that never close.
        window = response[opening.end() : opening.end() + max_chars + 1]
        for brace in re.finditer(r"\\.|[{}]", window, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return window[: brace.start()]
        if len(window) > max_chars:
            return window
    return ""


def _normalise(text: str) -> str:
    text = re.sub(r"\\?\$|\\!", "", text.replace("−", "-"))
    text = re.sub(r"(?<=[0-9])(?:\\,|\{,\})(?=[0-9]{3}(?![0-9]))", ",", text)
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|(?<!\\)\\[,;: ]|~", " ", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = " ".join(text.split()).rstrip(". ")
    return text.replace(",", "") if re.fullmatch(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text) else text


@lru_cache(maxsize=4096)
def _equal(gold: str, answer: str, timeout: float) -> bool:
    if gold != answer and all(re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", text) for text in (gold, answer)):
        return Decimal(gold) == Decimal(answer)
    # math-verify adds adjacent numbers: "12 12" would be 24.
    return gold == answer or (
        not re.search("[0-9] [0-9]", answer) and symbolic.math_process.equal(gold, answer, timeout)
    )
