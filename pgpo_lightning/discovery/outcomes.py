"""What became of each run: when it found its first success, or how far it got without one."""

from collections.abc import Sequence
from dataclasses import dataclass

from pgpo_lightning.discovery.attempts import Attempt

AXES = ("generations", "tokens", "seconds")
"""What a run spends: attempts; tokens through the model, of sampling and of updates; wall-clock seconds."""


@dataclass(frozen=True)
class Outcome:
    """The time of one run to its first success, censored if there is none.

    Attributes:
        method: Name of the method.
        question: Index of the question.
        seed: Seed of the study.
        found: Whether there was a success.
        spent: By axis: until the first success, else until the end of the run. An attempt counts in its order within the batch
            (arXiv 2601.20802, definition 5.1). Tokens and seconds are those of all batches up to the one with the success, which
            are sampled as a whole, and of all updates before it.
        complete: Whether the run has ended.
    """

    method: str
    question: int
    seed: int
    found: bool
    spent: dict[str, float]
    complete: bool


def outcome(
    method: str, question: int, seed: int, attempts: Sequence[Attempt], budget: int, stop: bool = True
) -> Outcome:
    """Return the outcome of a run.

    Args:
        method: Name of the method.
        question: Index of the question.
        seed: Seed of the study.
        attempts: Of the run, in order.
        budget: Attempts beyond this are left out.
        stop: Whether a run ends with its first success.
    """
    attempts = attempts[:budget]
    first = next((attempt for attempt in attempts if attempt.success), None)
    last = first or (attempts[-1] if attempts else None)
    if last is None:
        return Outcome(method, question, seed, False, dict.fromkeys(AXES, 0.0), False)
    paid = [attempt for attempt in attempts if attempt.batch <= last.batch]
    # Without a success the last update was made too, and its next batch is what is missing.
    updates = [attempt for attempt in paid if attempt.batch < last.batch or first is None]
    spent = {
        "generations": float(last.number),
        "tokens": float(sum(a.tokens + a.prompt_tokens for a in paid) + sum(a.update_tokens for a in updates)),
        "seconds": sum(a.seconds for a in paid) + sum(a.update_seconds for a in updates),
    }
    return Outcome(
        method, question, seed, first is not None, spent, len(attempts) >= budget or (stop and first is not None)
    )
