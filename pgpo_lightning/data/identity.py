"""Whether two runs have the same training questions: a hash of them."""

import json
from collections.abc import Iterable
from hashlib import sha256

from pgpo_lightning.held_out import joint_sha256, question_sha256
from pgpo_lightning.records import Question


def training_sha256(questions: Iterable[Question]) -> str:
    """Return what identifies training questions in their order: what model, verifier and teacher see of them, not where they lay.

    Args:
        questions: Of the training split.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> one, moved = Question("1+1", "2", source="a.jsonl:1"), Question("1+1", "2", source="b.jsonl:7")
        >>> told = Question("1+1", "2", privileged_context="It is two.")
        >>> training_sha256([one]) == training_sha256([moved]) != training_sha256([told])
        True
    """
    return joint_sha256(question_sha256(question) + _beside(question) for question in questions)


def _beside(question: Question) -> str:
    text = json.dumps([question.privileged_context, question.columns], default=str, sort_keys=True)
    return sha256(text.encode()).hexdigest()
