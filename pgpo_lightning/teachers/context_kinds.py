"""Kinds of teacher contexts that are worse than a sibling's success, made from the same rollouts.

Each shows what one part of a context is worth: they are controls of ``pgpo probe``, and a run can be trained with them
(:class:`ContextMixture`). A kind changes what the teacher reads. Responses, rewards and the loss stay those of the rollouts.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.run_settings import ConfigGroup
from pgpo_lightning.core.seeding import derive_seed
from pgpo_lightning.core.settings import Count, Filled, checked
from pgpo_lightning.core.types import Question, Rollout, Sample
from pgpo_lightning.rewards.grade import Verifier, grade

ContextKind = Literal[
    "sibling", "answer", "first-step", "numbers", "contradiction", "wrong", "other", "other-feedback", "template"
]
"""`sibling`: the context as configured. `template`: the same responses have a teacher, which reads the template alone. For the
others see :data:`KINDS`."""

_STEP = re.compile(r"\n|;|[.!?](?=\s)")
"""The end of a step in a worked solution: a line, a clause or a sentence."""


@partial(checked, prefix="reprompt.contexts.")
@dataclass(frozen=True)
class ContextMixture(ConfigGroup):
    """Gives every batch, or every block of batches, one of several kinds of teacher contexts.

    Each kind gets one block in every round of as many blocks as there are kinds; the order within a round is drawn from the
    run's seed. All ranks have the same kind in the same step. Logs `context/<kind>`, 1 for the kind of the batch and 0 for the
    others.

    Args:
        kinds: Which kinds, each once: ``sibling`` (as configured), ``answer`` (a success without its steps), ``first-step`` (a
            success cut off after its first step), ``numbers`` (a success with other numbers), ``contradiction`` (a success
            followed by a failure), ``wrong`` (a failure in place of a success), ``other`` (the next question's success, with
            `demonstration_source` none its feedback), ``other-feedback`` (another response's feedback in place of one's own),
            ``template`` (the template alone, for the responses that would have a context).
        block: Batches of one kind that follow each other.

    Raises:
        ValueError: If a setting is out of range, or a kind is there twice; names the field.
    """

    kinds: Annotated[tuple[ContextKind, ...], Filled()]
    block: Count = 1

    def __post_init__(self) -> None:
        """Refuse a kind that is there twice."""
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"Expected each of `reprompt.contexts.kinds` once, but got {', '.join(self.kinds)}.")

    def kind(self, seed: int, step: int) -> ContextKind:
        """Return the kind of a batch.

        Args:
            seed: Of the run.
            step: Batches trained on so far.
        """
        turn, place = divmod(step // self.block, len(self.kinds))
        order = random.Random(derive_seed(seed, "contexts", turn)).sample(self.kinds, len(self.kinds))
        return order[place]


def others(samples: list[Sample], threshold: float, verifier: Verifier) -> list[Sample]:
    """Give every question the responses to the next question, which keeps the form and removes the content."""
    groups = _groups(samples)
    if len(groups) < 2:  # no other question
        return [_rewarded(sample, threshold - 1) for sample in samples]
    swapped = []
    for group, next_group in zip(groups, groups[1:] + groups[:1], strict=True):
        for sample, other in zip(group, next_group, strict=True):
            # Otherwise the question's own feedback would stand in for the other's.
            question = replace(sample.rollout.question, privileged_context=other.rollout.question.privileged_context)
            rollout = replace(other.rollout, question=question)
            swapped.append(Sample(rollout, replace(other.verdict)))
    return swapped


def wrong(samples: list[Sample], threshold: float, verifier: Verifier) -> list[Sample]:
    """Swap successes and failures."""
    return [_rewarded(sample, threshold - 1 if sample.verdict.reward >= threshold else threshold) for sample in samples]


def answers(samples: list[Sample], threshold: float, verifier: Verifier) -> list[Sample]:
    """Shorten successes to the shortest ending that the verifier accepts: the answer without its steps."""
    endings: dict[tuple[int, str], str] = {}

    def shortened(sample: Sample) -> str:
        key = (sample.rollout.question.index, sample.rollout.text)
        if key not in endings:
            endings[key] = _ending(sample.rollout.question, sample.rollout.text, threshold, verifier)
        return endings[key]

    return _retold(samples, threshold, shortened)


def first_steps(samples: list[Sample], threshold: float, verifier: Verifier) -> list[Sample]:
    """Cut successes off after their first step: a line, a clause or a sentence. One without a second step shows nothing."""

    def begun(sample: Sample) -> str:
        end = _STEP.search(sample.rollout.text.lstrip())
        return sample.rollout.text.lstrip()[: end.end()].rstrip() if end is not None else ""

    return _retold(samples, threshold, begun)


def other_numbers(samples: list[Sample], threshold: float, verifier: Verifier) -> list[Sample]:
    """Replace the numbers in successes by random ones of equally many digits, which keeps the form and removes the content."""

    def renumbered(sample: Sample) -> str:
        draws = random.Random(f"{sample.rollout.question.index}/{sample.rollout.text}")

        def drawn(found: re.Match[str]) -> str:
            digits = len(found[0])
            return str(draws.randrange(10 ** (digits - 1), 10**digits))

        return re.sub(r"\d+", drawn, sample.rollout.text)

    return _retold(samples, threshold, renumbered)


def contradictions(samples: list[Sample], threshold: float, verifier: Verifier) -> list[Sample]:
    """Put a failure after every success, if the question has one."""
    failures: dict[int, str] = {}
    for sample in samples:
        if sample.verdict.reward < threshold and sample.rollout.text.strip():
            failures.setdefault(sample.rollout.question.index, sample.rollout.text)

    def contradicted(sample: Sample) -> str:
        failure = failures.get(sample.rollout.question.index)
        return sample.rollout.text if failure is None else f"{sample.rollout.text}\n\n{failure}"

    return _retold(samples, threshold, contradicted)


def other_feedback(samples: list[Sample], threshold: float, verifier: Verifier) -> list[Sample]:
    """Give every response the feedback of the next response to its question; none where only one has feedback."""
    shown = []
    for group in _groups(samples):
        told = [sample for sample in group if sample.verdict.feedback]
        following = {id(a): b.verdict.feedback for a, b in zip(told, told[1:] + told[:1], strict=True)}
        for sample in group:
            feedback = following[id(sample)] if id(sample) in following and len(told) > 1 else None
            # Otherwise the question's own feedback would stand in for it.
            question = replace(sample.rollout.question, privileged_context=None)
            rollout = replace(sample.rollout, question=question)
            shown.append(Sample(rollout, replace(sample.verdict, feedback=feedback)))
    return shown


KINDS: dict[str, Callable[[list[Sample], float, Verifier], list[Sample]]] = {
    "answer": answers,
    "first-step": first_steps,
    "numbers": other_numbers,
    "contradiction": contradictions,
    "wrong": wrong,
    "other": others,
    "other-feedback": other_feedback,
}
"""Functions from samples (whole groups of equal size), success threshold and verifier to what the teacher's prompts are made
from: copies in the same order, which belong to the same questions."""


def read_by_teacher(
    kind: str,
    samples: list[Sample],
    threshold: float,
    verifier: Verifier,
    answer: Callable[[Rollout], str] | None = None,
) -> list[Sample]:
    """Return what the teacher's prompts are made from: copies in order, or the samples themselves for `sibling`, `template`.

    Args:
        kind: `sibling`, `template`, or a key of :data:`KINDS`.
        samples: Whole groups of equal size.
        threshold: Rewards of at least this count as success.
        verifier: Judges parts of responses.
        answer: Returns the text of a response without thinking, which the kinds then change; null leaves thinking in.
    """
    if kind in ("sibling", "template"):
        return samples
    if answer is not None:
        samples = [Sample(replace(sample.rollout, text=answer(sample.rollout)), sample.verdict) for sample in samples]
    return KINDS[kind](samples, threshold, verifier)


def _retold(samples: list[Sample], threshold: float, text: Callable[[Sample], str]) -> list[Sample]:
    """Return the samples with other texts in place of those of successes."""
    return [
        Sample(
            replace(sample.rollout, text=text(sample)) if sample.verdict.reward >= threshold else sample.rollout,
            sample.verdict,
        )
        for sample in samples
    ]


def _rewarded(sample: Sample, reward: float) -> Sample:
    return Sample(sample.rollout, replace(sample.verdict, reward=reward))


def _ending(question: Question, text: str, threshold: float, verifier: Verifier) -> str:
    """Return the shortest accepted ending that starts after white space, or the whole text if none is accepted."""
    for start in reversed([space.end() for space in re.finditer(r"\s+", text)]):
        ending = text[start:]
        try:
            if grade(verifier, question, ending).reward >= threshold:
                return ending
        except VerifierError:
            continue  # a verifier may fail on a part of a response
    return text


def _groups(samples: list[Sample]) -> list[list[Sample]]:
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.rollout.question.index].append(sample)
    return list(groups.values())
