"""Hashes of questions, which tell whether two runs used the same questions."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports torch, which is not needed to read records of runs
    from pgpo_lightning.core.types import Question


def question_sha256(question: "Question") -> str:
    """Return a hash of a question: of its messages, system message included, and its gold answer."""
    text = json.dumps([question.messages(), question.answer], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def joint_sha256(hashes: Iterable[str]) -> str:
    """Return a hash of several questions in their order, from the hash of each.

    Example:
        >>> joint_sha256(["a", "b"]) == joint_sha256(["b", "a"])
        False
    """
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def training_sha256(questions: "Iterable[Question]") -> str:
    """Return a hash of training questions in their order: of all that model, verifier and teacher see, without `source`.

    Args:
        questions: Of the training split.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> from pgpo_lightning.core.types import Question
        >>> one, moved = Question("1+1", "2", source="a.jsonl:1"), Question("1+1", "2", source="b.jsonl:7")
        >>> guided = Question("1+1", "2", privileged_context="It is two.")
        >>> training_sha256([one]) == training_sha256([moved]) != training_sha256([guided])
        True
    """
    return joint_sha256(question_sha256(question) + _beside(question) for question in questions)


def _beside(question: "Question") -> str:
    parts: list[Any] = [question.privileged_context, question.other_columns()]
    parts += [] if question.tools is None else [question.tools]
    text = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
