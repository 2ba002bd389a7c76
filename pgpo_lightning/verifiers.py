r"""Verifiers: from a question and the text of a response to a reward.

A verifier is any callable ``(question, response) -> Verdict | float | (reward, feedback)``, so a function of your own,
given by its import path, is as good as the two classes here: :class:`MultipleChoice` for options (SciKnowEval) and
:class:`BoxedAnswer` for mathematics. :func:`grade` calls one and turns whatever it returns into a ``Verdict``.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from numbers import Real
from subprocess import PIPE, Popen
from threading import Lock
from typing import Any, Literal, TypeAlias

from pgpo_lightning.records import Question, Verdict
from pgpo_lightning.settings import Count, Positive, checked

Verifier: TypeAlias = Callable[[Question, str], Verdict | float | tuple[float, str]]
"""A function, or an object of a class with ``__call__``, that judges one decoded response (no special tokens)."""

Variant: TypeAlias = Literal["reference", "strict", "lenient"]


class VerifierError(RuntimeError):
    """A verifier raised, or returned something that is not a finite reward."""


@checked
class MultipleChoice:
    r"""Compare the chosen option with ``question.answer``: 1.0 if they are the same letter, else 0.0.

    Args:
        variant: How the choice is read. ``reference`` (the SDPO code) takes what stands between the last ``<answer>``
            (or the start) and the next ``</answer>`` (or the end): a bare letter counts, ``(A)``, ``A.``, ``a`` do not.
            ``strict`` wants exactly one answer block, at the end, with one letter in it. ``lenient`` takes the last
            statement of an option: a letter of either case that opens an answer block, a ``\boxed{}`` or the response
            and is followed by a mark or nothing (``(A)``, ``A.``, ``a``, ``A: text``, ``\boxed{\text{A}}``), or stands
            after "answer is" or "answer:"; several options at once ("A or B") are no statement.
        options: The letters that a row of the data may have as its answer.

    Raises:
        ValueError: If an argument is not valid, or, when called, if the gold answer is not one of ``options``.

    Example:
        >>> verifier = MultipleChoice("lenient")
        >>> verifier(Question("Which gas is noble?", answer="B"), "Not (A). The answer is (B), argon.")
        Verdict(reward=1.0, feedback=None, answer='B')
    """

    def __init__(self, variant: Variant = "reference", options: str = "ABCD") -> None:
        if not re.fullmatch("[A-Z]{2,}", options) or len(set(options)) < len(options):
            raise ValueError(f"Expected argument `options` to be different capital letters, but got {options!r}.")
        self.variant, self.options = variant, options
        self._strict = re.compile(rf"<answer>\s*([{options}])\s*</answer>\s*\Z")
        # The repeats are bounded because two unbounded ones in a row cost a square on a long run of white space.
        upper, either, mark = f"[{options}]", f"[{options}{options.lower()}]", r"[\s(*\"\[$]{0,9}"
        opening = rf"{mark}(?:\\(?:text|textbf|mathrm|mathbf)\{{[\s(]{{0,9}})?"
        closed = r"(?=[).:}*\"\]$]|\s{0,9}(?:\n|</|\Z))"
        alone = rf"(?![\"\s)*]{{0,9}}(?:,|/|&|and\b|or\b){mark}(?:and\b|or\b)?{mark}{upper}\b)"
        start = rf"(?:\A|<answer>|\\boxed\s{{0,9}}\{{){opening}({either}){closed}{alone}"
        sentence = r"(?i:\banswer)[\s*]{0,9}(?:\bis\b|:)[\s:*]{0,9}"
        sentence += rf"{opening}(?:({either}){closed}|({upper})(?![\w'’-])){alone}"
        self._statements = [re.compile(start), re.compile(sentence)]

    def __call__(self, question: Question, response: str) -> Verdict:
        """Grade one response; ``question.answer`` is the gold letter."""
        gold = question.answer
        if not isinstance(gold, str) or len(gold) != 1 or gold not in self.options:
            raise ValueError(f"Expected the answer of {_where(question)} to be in {self.options!r}, but got {gold!r}.")
        return Verdict(reward=float((answer := self._read(response)) == gold), answer=answer)

    def _read(self, response: str) -> str | None:
        if self.variant == "reference":
            answer = response.split("<answer>")[-1].split("</answer>")[0].strip()
            return answer if 0 < len(answer) <= 16 else None  # a longer text is no vote but a lost thread
        if self.variant == "strict":
            match = self._strict.search(response)
            return match[1] if match and response.count("<answer>") == response.count("</answer>") == 1 else None
        found = [match for pattern in self._statements for match in pattern.finditer(response)]
        letters = [(match.start(group), match[group]) for match in found if (group := match.lastindex)]
        return max(letters)[1].upper() if letters else None


@checked
class BoxedAnswer:
    r"""Compare the last complete ``\boxed{...}`` with ``question.answer``: 1.0 if they are equal, else 0.0.

    Equal texts (after removing LaTeX spacing, ``$``, thousands separators and the like) and plain decimal numbers are
    decided here, exactly: ``0.50`` is ``.5``, but ``0.333333`` is not ``0.3333333``. Everything else (fractions, roots,
    symbols, sets, intervals, equations, matrices) goes to math-verify, in a process of its own.

    Args:
        feedback: Whether a wrong answer gets a line of feedback, which does not depend on the gold answer.
        max_chars: A box with more characters than this is wrong without a look at its content.
        timeout: An answer that takes math-verify more seconds than this, such as ``9^{9^9}``, is wrong.

    Raises:
        ValueError: If an argument is not positive, or, when called, if the question has no gold answer.

    Example:
        >>> BoxedAnswer(feedback=True)(Question("2 * 12?", answer=24), r"It is \boxed{48}.")
        Verdict(reward=0.0, feedback='The final answer 48 is wrong.', answer='48')
    """

    def __init__(self, feedback: bool = False, max_chars: Count = 200, timeout: Positive = 3.0) -> None:
        self.feedback, self.max_chars, self.timeout = feedback, max_chars, timeout

    def __call__(self, question: Question, response: str) -> Verdict:
        """Grade one response; ``question.answer`` (text or number) is the gold answer without a box around it."""
        gold = "" if question.answer is None else _normalise(str(question.answer))
        if not gold:
            raise ValueError(f"Expected {_where(question)} to have a gold answer, but got {question.answer!r}.")
        box = _last_box(response, self.max_chars)
        answer = _normalise(box) if len(box) <= self.max_chars else None
        if answer and _equal(gold, answer, self.timeout):
            return Verdict(reward=1.0, answer=answer)
        feedback = f"The final answer {answer} is wrong." if answer else r"No final answer in \boxed{} was found."
        if answer is None:
            feedback = f"The final answer is longer than {self.max_chars} characters."
        return Verdict(reward=0.0, feedback=feedback if self.feedback else None, answer=answer or None)


def grade(verifier: Verifier, question: Question, response: str) -> Verdict:
    """Call a verifier and return its judgement as a ``Verdict`` with a finite reward.

    Raises:
        VerifierError: If the verifier raises or returns anything but a finite number, ``(reward, feedback)``, a Verdict.
    """
    name = getattr(verifier, "__qualname__", type(verifier).__qualname__)
    where = f"{_where(question)} ({str(question.prompt)[:80]!r})"
    try:
        result: Any = verifier(question, response)
    except Exception as error:
        raise VerifierError(f"Verifier {name} raised {type(error).__name__} on {where}: {error}") from error
    parts: Any = (result, None) if isinstance(result, Real) else result
    verdict = Verdict(*parts) if isinstance(parts, tuple) and len(parts) == 2 else result
    if (
        not isinstance(verdict, Verdict)
        or not (isinstance(verdict.reward, Real) and math.isfinite(verdict.reward))
        or not isinstance(verdict.feedback, str | None)
        or not isinstance(verdict.answer, str | None)
    ):
        wanted = "a finite number, (reward, feedback) or a Verdict"
        raise VerifierError(f"Expected verifier {name} to return {wanted}, but got {result!r} on {where}.")
    return Verdict(float(verdict.reward), verdict.feedback, verdict.answer)


def _where(question: Question) -> str:
    return f"question {question.index} of {question.source or 'an unnamed source'}"


def _last_box(response: str, max_chars: int) -> str:
    """Return the content of the last closed box, cut at ``max_chars + 1`` characters, or an empty text."""
    for opening in reversed(list(re.finditer(r"\\boxed\s*\{", response))):
        depth = 1
        # The limit also keeps thousands of boxes that never close from costing a full scan each.
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
    # math-verify adds neighbouring numbers: "12 12" would be 24.
    return gold == answer or (not re.search("[0-9] [0-9]", answer) and _math.equal(gold, answer, timeout))


class _MathProcess:
    """math-verify in a process of its own, which an alarm kills when a comparison takes too long.

    Nothing bounds math-verify: ``9^{9^9}``, ``(e^{12})^{20}`` or twenty nested braces take minutes, and signals in this
    process would reach its main thread only, and not before a big integer is finished.
    """

    code = r"""
import json, logging, resource, signal, sys
from math_verify import LatexExtractionConfig, parse, verify

config = [LatexExtractionConfig(boxed_match_priority=0)]
read = lambda text: parse(r"\boxed{%s}" % text, config, fallback_mode="no_fallback", parsing_timeout=None)
replies, sys.stdout = sys.stdout, sys.stderr
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
    resource.setrlimit(resource.RLIMIT_AS, (2**32, resource.RLIM_INFINITY))
read(r"\frac{1}{2}")  # the first parse is slow
print("ready", file=replies, flush=True)
for line in sys.stdin:
    gold, answer, timeout = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    equal = verify(read(gold), read(answer), timeout_seconds=None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(int(equal), file=replies, flush=True)
"""

    def __init__(self) -> None:
        self.lock = Lock()
        self.process: Any = None  # it ends with this one, when its input closes

    def equal(self, gold: str, answer: str, timeout: float) -> bool:
        with self.lock:
            reply = ""
            try:
                # In a fork of this process `poll` says that the parent's helper has ended, so the fork starts its own.
                if self.process is None or self.process.poll() is not None:
                    self.process = Popen([sys.executable, "-c", self.code], stdin=PIPE, stdout=PIPE, text=True)  # noqa: S603
                    if self.process.stdout.readline() != "ready\n":
                        raise RuntimeError("Expected math-verify to start in its own process, but see the error above.")
                print(json.dumps([gold, answer, timeout]), file=self.process.stdin, flush=True)
                reply = self.process.stdout.readline()
            finally:
                # Without a reply the alarm went off. Or Ctrl-C came here: what is still to come would answer the next call.
                if not reply:
                    self.stop()
            return reply == "1\n"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_math = _MathProcess()
