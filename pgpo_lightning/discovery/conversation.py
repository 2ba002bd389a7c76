"""The prompts of the multi-turn methods: what the base model reads before its next attempt (arXiv 2601.20802, section 5)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pgpo_lightning.core.types import Message, Question, Rollout, Sample, Verdict
from pgpo_lightning.discovery.attempts import Attempt
from pgpo_lightning.teachers.reprompt import RepromptBuilder, fill

SEPARATOR = "\n\n"
"""Between the feedback of different attempts."""


def feedback_turn(question: Question, attempts: Sequence[Attempt], builder: RepromptBuilder) -> list[Message]:
    """Return one user turn with the question and the feedback of all attempts; the attempts are not shown.

    The templates are those of the self-teacher, so that both methods read the same words.

    Args:
        question: What is asked.
        attempts: Earlier attempts, in order; those without feedback are left out.
        builder: Has the templates.
    """
    told = SEPARATOR.join(attempt.feedback for attempt in attempts if attempt.feedback)
    if not told:
        return question.messages()
    rollout = Rollout(question, [], [], torch.zeros(0), "", True)
    return builder.messages(Sample(rollout, Verdict(0.0)), None, told)


def turns(question: Question, attempts: Sequence[Attempt], builder: RepromptBuilder) -> list[Message]:
    """Return question, answer, feedback, answer, ... as turns of a conversation.

    Args:
        question: What is asked.
        attempts: Earlier attempts, in order.
        builder: Has the template of the feedback.
    """
    messages = question.messages()
    for attempt in attempts:
        told = fill(builder.feedback_template, feedback_raw=attempt.feedback or "").strip()
        messages += [{"role": "assistant", "content": attempt.text}, {"role": "user", "content": told}]
    return messages


def newest_that_fit(
    attempts: Sequence[Attempt],
    render: Callable[[Sequence[Attempt]], list[Message]],
    encode: Callable[..., list[int]],
    limit: int,
    start: int = 0,
    **given: Any,
) -> tuple[list[int], int]:
    """Return the token ids of a conversation, without its oldest attempts if it would be too long.

    Args:
        attempts: Earlier attempts, in order.
        render: From the attempts that are shown to messages.
        encode: From messages to token ids.
        limit: Most tokens.
        start: Attempts that were left out last time: an earlier attempt never fits again.
        given: Of `encode`, such as ``tools``.

    Returns:
        Token ids, and the number of attempts that are left out.

    Raises:
        ValueError: If the question alone is too long.
    """
    for left_out in range(start, len(attempts) + 1):
        ids = encode(render(attempts[left_out:]), **given)
        if len(ids) <= limit:
            return ids, left_out
    raise ValueError(
        f"Expected `conversation_tokens` to leave room for the question, but it is {limit} and the question has {len(ids)} "
        "tokens."
    )
