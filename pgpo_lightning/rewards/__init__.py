"""Verifiers: from a question and the text of a response to a reward.

A verifier is any callable ``(question, response) -> Verdict | float | (reward, feedback)``. A function of your own, given by
its import path, serves as well as the two classes here: :class:`MultipleChoice` for options (SciKnowEval) and
:class:`BoxedAnswer` for mathematics. :func:`grade` calls a verifier and turns whatever it returns into a ``Verdict``.
"""

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.rewards.boxed_answer import BoxedAnswer
from pgpo_lightning.rewards.grade import Verifier, grade
from pgpo_lightning.rewards.multiple_choice import MultipleChoice

__all__ = ["BoxedAnswer", "MultipleChoice", "Verifier", "VerifierError", "grade"]
