"""The two prompts of CEPO's teacher (arXiv 2605.19436): the same template with a right and with a wrong answer.

What the context does to the teacher's style is the same in both, so that it cancels in their difference.
"""

from dataclasses import fields
from typing import Literal

from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.teachers.base import Teacher
from pgpo_lightning.teachers.configs import RepromptConfig
from pgpo_lightning.teachers.reprompt import RepromptBuilder
from pgpo_lightning.teachers.self_teaching import SelfTeaching

Shown = Literal["answer", "response"]
"""What the teacher reads: answers alone, or whole responses."""

UNREAD_CHARACTERS = 50
"""Of a rejected response in which the verifier found no answer, so many characters stand for it, as in the code of the paper."""

_READ = {"max_reprompt_len", "reprompt_template", "solution_template"}
_READ_WITH_RESPONSES = {"dont_reprompt_on_self_success", "remove_thinking_from_demonstration"}


def check_reprompt(reprompt: RepromptConfig, shown: Shown) -> None:
    """Refuse settings of the reprompt that a contrast does not read.

    Args:
        reprompt: The settings.
        shown: What the teacher reads.

    Raises:
        ValueError: Names the field.
    """
    read = _READ | _READ_WITH_RESPONSES if shown == "response" else _READ
    for field in fields(reprompt):
        if field.name not in read and getattr(reprompt, field.name) != field.default:
            raise ValueError(
                f"Expected no `reprompt.{field.name}` with `evidence.shown` {shown}, where it would have no effect, but got "
                f"{getattr(reprompt, field.name)!r}. Leave it out."
            )


class Contrast:
    """Gives samples the two prompts.

    Args:
        teaching: The self-teacher.
        shown: What it reads.
        num_generations: Rollouts per question.
    """

    def __init__(self, teaching: SelfTeaching, shown: Shown, num_generations: int) -> None:
        self.teaching, self.shown, self.num_generations = teaching, shown, num_generations

    def attach(self, samples: list[Sample], teacher: Teacher, wrong: bool = True) -> dict[str, float]:
        """Set `reprompt_ids` of every sample whose question has a right answer, and `contrast_ids` where there is a wrong one.

        Args:
            samples: This rank's, whole groups; changed in place.
            teacher: Sees the rollouts of the step.
            wrong: Whether the prompt with the wrong answer is wanted.

        Returns:
            Scalars to log.
        """
        teacher.observe(samples)
        count = dict.fromkeys(("right", "both", "trimmed"), 0)
        for start in range(0, len(samples), self.num_generations):
            group = samples[start : start + self.num_generations]
            fitted: dict[str, tuple[list[int] | None, str | None, bool]] = {}
            for sample in group:
                right, rejected = self.texts(sample, group)
                for text in (right, rejected):
                    if text is not None and text not in fitted:
                        fitted[text] = self._fit(sample, text)
                ids, sample.reprompt, cut = (None, None, False) if right is None else fitted[right]
                sample.reprompt_ids, sample.contrast_ids = ids, None
                if wrong and ids is not None and rejected is not None:
                    sample.contrast_ids, _, cut_too = fitted[rejected]
                    cut |= cut_too
                count["right"] += ids is not None
                count["both"] += sample.contrast_ids is not None
                count["trimmed"] += cut
        total = max(1, len(samples))
        return {
            "self_distillation/reprompt_sample_fraction": count["right"] / total,
            "self_distillation/contrasted_fraction": count["both"] / total,
            "self_distillation/reprompt_trimmed_fraction": count["trimmed"] / total,
            "self_distillation/empty_target_batch": float(not any(gather(count["right"] > 0))),
        }

    def texts(self, sample: Sample, group: list[Sample]) -> tuple[str | None, str | None]:
        """Return the right and the wrong text that a sample's teacher reads, ``None`` where there is none.

        Args:
            sample: One of the group.
            group: All rollouts of its question. Of equal rewards the first counts.
        """
        builder = self.teaching.builder
        others = group
        if self.shown == "response" and builder.dont_reprompt_on_self_success:
            others = [other for other in group if other is not sample]
        accepted = [other for other in others if other.verdict.reward >= builder.success_reward_threshold]
        rejected = [other for other in others if other.verdict.reward < builder.success_reward_threshold]
        right, wrong = _answer(sample), None
        if self.shown == "response" and accepted:
            right = self._response(max(accepted, key=lambda other: other.verdict.reward), builder) or right
        if rejected:
            worst = min(rejected, key=lambda other: other.verdict.reward)
            if self.shown == "response":
                wrong = self._response(worst, builder)
            else:
                wrong = (worst.verdict.answer or "").strip() or worst.rollout.text.strip()[:UNREAD_CHARACTERS]
        return right, wrong or None

    def _response(self, sample: Sample, builder: RepromptBuilder) -> str:
        without = builder.remove_thinking_from_demonstration
        return (self.teaching.encoder.answer(sample.rollout) if without else sample.rollout.text).strip()

    def _fit(self, sample: Sample, text: str) -> tuple[list[int] | None, str | None, bool]:
        encoder = self.teaching.encoder
        return self.teaching.builder.fit(sample, text, None, encoder.messages, encoder.tokens, encoder.text)


def _answer(sample: Sample) -> str | None:
    answer = sample.rollout.question.answer
    return None if answer is None else str(answer).strip() or None
