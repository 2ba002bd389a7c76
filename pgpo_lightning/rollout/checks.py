"""Checks of objects from user code: batches of a DataLoader, rollouts of an engine."""

from typing import Any

from torch import Tensor

from pgpo_lightning.core.texts import shown
from pgpo_lightning.core.types import Question, Rollout


def check_kind(batch: Any) -> None:
    """Check that a batch is a list of questions.

    Raises:
        ValueError: If it is not; says how to return one.
    """
    if not isinstance(batch, (list, tuple)) or not all(isinstance(each, Question) for each in batch):
        found = (
            next((each for each in batch if not isinstance(each, Question)), batch)
            if isinstance(batch, list)
            else batch
        )
        raise ValueError(
            "Expected a batch to be a list of pgpo_lightning.core.types.Question, but got "
            f"{type(found).__name__} {shown(found)}. Give `collate_fn=list` to the DataLoader and a Question per row, or use "
            "FileQuestions."
        )


def check_batch(batch: Any) -> None:
    """Check that a batch is a list of different questions.

    Raises:
        ValueError: If it is not; says how to return one.
    """
    check_kind(batch)
    if len({question.index for question in batch}) < len(batch):
        raise ValueError(
            "Expected questions with different `index`, by which rollouts find their siblings, but some of a batch have the "
            f"same: {[question.index for question in batch]}. Set `index` of each Question to its place in the data."
        )


def check_rollouts(rollouts: Any, questions: list[Question], n: int, engine: str) -> None:
    """Check that an engine returned `n` complete rollouts per question, with rollouts of one question adjacent.

    Args:
        rollouts: What the engine returned.
        questions: The questions that it was given.
        n: Requested responses per question.
        engine: Name of the engine, for messages.

    Raises:
        ValueError: If it did not; says what is wrong.
    """
    wanted = f"Expected {engine}.generate to return "
    if not isinstance(rollouts, list) or not all(isinstance(rollout, Rollout) for rollout in rollouts):
        raise ValueError(f"{wanted}a list of Rollout, but got {shown(rollouts)}.")
    expected = [question.index for question in questions for _ in range(n)]
    if [rollout.question.index for rollout in rollouts] != expected:
        raise ValueError(
            f"{wanted}{n} rollouts for each of {len(questions)} questions, those to one question next to each other, but got "
            f"{len(rollouts)}, to questions {[rollout.question.index for rollout in rollouts][:16]}."
        )
    for rollout in rollouts:
        length, log_probs = len(rollout.response_ids), rollout.log_probs
        if not length:
            raise ValueError(
                f"{wanted}responses of at least one token, the end of the sequence included, but one to question "
                f"{rollout.question.index} has none."
            )
        if not isinstance(log_probs, Tensor) or log_probs.shape != (length,):
            got = tuple(log_probs.shape) if isinstance(log_probs, Tensor) else type(log_probs).__name__
            raise ValueError(
                f"{wanted}`log_probs` as a tensor of shape ({length},), one number per token of the response, but got {got}."
            )
