"""Contrastive Evidence Policy Optimization (CEPO, arXiv 2605.19436): RLSD whose evidence is a contrast of two teachers.

By difference from RLSD: the evidence of a token is ``log T+ - log T-``, the teacher's log-probability after the right answer
minus that after a wrong one, instead of ``log T - log S``. The teacher runs over a response twice, with the same weights.
"""

from torch import Tensor

from pgpo_lightning.core.types import Question, Sample
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.objectives.configs import EvidenceConfig, PolicyGradientConfig
from pgpo_lightning.objectives.policy_gradient import CreditedPolicyGradient
from pgpo_lightning.teachers.contrast import Contrast
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.mini_batches import TokenInputs
from pgpo_lightning.training.objective import Preparation, Route, split_taught


class ContrastedPolicyGradient(CreditedPolicyGradient):
    """GRPO whose token advantages follow what a right answer says of a token and a wrong one does not.

    Args:
        teaching: The self-teacher.
        evidence: The evidence and its weight.
        config: See :class:`PolicyGradientObjective`.
        num_generations: See :class:`PolicyGradientObjective`.
        updates: See :class:`PolicyGradientObjective`.
    """

    contrasted = True

    def __init__(
        self,
        teaching: SelfTeaching,
        evidence: EvidenceConfig | None = None,
        *,
        config: PolicyGradientConfig | None = None,
        num_generations: int = 8,
        updates: int = 1,
    ) -> None:
        evidence = evidence or EvidenceConfig()
        super().__init__(
            teaching,
            evidence.mixing,
            evidence.mixing_steps,
            evidence.clip,
            config=config,
            num_generations=num_generations,
            updates=updates,
        )
        self.without_wrong_answer = evidence.without_wrong_answer
        self.contrast = Contrast(teaching, evidence.shown, num_generations)

    def attach(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give samples the prompts with the right and with the wrong answer, in place; return scalars to log."""
        scalars = self.contrast.attach(samples, given.teacher, wrong=self.current_mixing > 0)
        if self.without_wrong_answer == "grpo" and self.current_mixing > 0:
            for sample in samples:
                if sample.contrast_ids is None:
                    sample.reprompt_ids = sample.reprompt = None
        return scalars

    def routes(self, samples: list[Sample]) -> list[Route]:
        """Return the samples with the right answer alone, those with both prompts, and those without a teacher."""
        taught, others = split_taught([sample for sample in samples if self.in_loss(sample)])
        both = [sample for sample in taught if sample.contrast_ids is not None]
        alone = [sample for sample in taught if sample.contrast_ids is None]
        return [
            Route(alone, self.credited_loss, taught=True),
            Route(both, self.contrasted_loss, taught=True, contrasted=True),
            Route(others, self.token_loss),
        ]

    def contrasted_loss(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the clipped policy-gradient loss of every token, ``(n,)``, with the credit of the contrast.

        Raises:
            ValueError: If the tokens have no second log-probability.
        """
        if given.contrast is None:
            raise ValueError("Expected `contrast` of the tokens, from a route that is contrasted, but got none.")
        return self.credited(tokens, given, tokens.log_p_teacher - given.contrast)

    def check_questions(self, questions: list[Question]) -> None:
        """Look for the right answers.

        Raises:
            ValueError: If no training question has one.
        """
        if questions and all(question.answer is None or not str(question.answer).strip() for question in questions):
            raise ValueError(
                "Expected training questions with an `answer`, which CEPO's teacher reads, but none has one."
            )
