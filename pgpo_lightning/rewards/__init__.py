"""Verifiers: from a question and the text of a response to a reward.

A verifier is any callable ``(question, response) -> Verdict | float | (reward, feedback)``. A function of your own, given by
its import path, serves as well as the classes here: :class:`MultipleChoice` for options (SciKnowEval), :class:`BoxedAnswer` for
mathematics, :class:`CodeExecution` for programs, :class:`ToolUse` for tool calls and :class:`TRLReward` for TRL's reward
functions. :func:`grade` calls a verifier and turns whatever it returns into a ``Verdict``. Threads, coroutines and batches:
:mod:`pgpo_lightning.rewards.batches`.
"""

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.rewards.boxed_answer import BoxedAnswer
from pgpo_lightning.rewards.code import CodeExecution
from pgpo_lightning.rewards.grade import Verifier, grade
from pgpo_lightning.rewards.multiple_choice import MultipleChoice
from pgpo_lightning.rewards.tool_use import ToolUse
from pgpo_lightning.rewards.trl import TRLReward

__all__ = [
    "BoxedAnswer", "CodeExecution", "MultipleChoice", "TRLReward", "ToolUse", "Verifier", "VerifierError", "grade"
]  # fmt: skip
