"""Verifier of multiple-choice questions, such as those of SciKnowEval."""

import re
from typing import Literal, TypeAlias

from pgpo_lightning.core.settings import checked
from pgpo_lightning.core.texts import shown
from pgpo_lightning.core.types import Question, Verdict
from pgpo_lightning.rewards.grade import where

Variant: TypeAlias = Literal["reference", "strict", "lenient"]


@checked
class MultipleChoice:
    r"""Compare the chosen option with ``question.answer``: 1.0 if they are the same letter, else 0.0.

    Args:
        variant: How the choice is read. ``reference`` (the SDPO code) reads the text between the last ``<answer>`` (or the
            start) and the next ``</answer>`` (or the end). A bare letter counts; ``(A)``, ``A.``, ``a`` do not. ``strict``
            requires exactly one answer block, at the end, with one letter. ``lenient`` reads the last statement of an
            option: a letter of either case that opens an answer block, a ``\boxed{}`` or the response and is followed by
            punctuation or nothing (``(A)``, ``A.``, ``a``, ``A: text``, ``\boxed{\text{A}}``), or that follows "answer is"
            or "answer:". Several options at once ("A or B") are not a statement.
        options: The letters that may be a gold answer.

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
        # The repeats are bounded, because two unbounded ones in a row take quadratic time on long white space.
        upper, either, mark = f"[{options}]", f"[{options}{options.lower()}]", r"[\s(*\"\[$]{0,9}"
        opening = rf"{mark}(?:\\(?:text|textbf|mathrm|mathbf)\{{[\s(]{{0,9}})?"
        closed = r"(?=[).:}*\"\]$]|\s{0,9}(?:\n|</|\Z))"
        alone = rf"(?![\"\s)*]{{0,9}}(?:,|/|&|and\b|or\b){mark}(?:and\b|or\b)?{mark}{upper}\b)"
        start = rf"(?:\A|<answer>|\\boxed\s{{0,9}}\{{){opening}({either}){closed}{alone}"
        sentence = r"(?i:\banswer)[\s*]{0,9}(?:\bis\b|:)[\s:*]{0,9}"
        sentence += rf"{opening}(?:({either}){closed}|({upper})(?![\w'’-])){alone}"
        self._statements = [re.compile(start), re.compile(sentence)]

    def check_question(self, question: Question) -> None:
        """Raise if the gold answer is not one of the options.

        Raises:
            ValueError: Names the row.
        """
        gold = question.answer
        if not isinstance(gold, str) or len(gold) != 1 or gold not in self.options:
            raise ValueError(
                f"Expected the answer of {where(question)} to be in {self.options!r}, but got {shown(gold)}. Correct the row, "
                "or set `answer_column` of the data or the `options` of MultipleChoice."
            )

    def __call__(self, question: Question, response: str) -> Verdict:
        """Grade one response; ``question.answer`` is the gold letter."""
        self.check_question(question)
        return Verdict(reward=float((answer := self._read(response)) == question.answer), answer=answer)

    def _read(self, response: str) -> str | None:
        if self.variant == "reference":
            answer = response.split("<answer>")[-1].split("</answer>")[0].strip()
            return answer if 0 < len(answer) <= 16 else None  # a longer text is not a vote
        if self.variant == "strict":
            match = self._strict.search(response)
            return match[1] if match and response.count("<answer>") == response.count("</answer>") == 1 else None
        found = [match for pattern in self._statements for match in pattern.finditer(response)]
        letters = [(match.start(group), match[group]) for match in found if (group := match.lastindex)]
        return max(letters)[1].upper() if letters else None
