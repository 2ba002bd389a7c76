"""Self-distillation (SDPO, arXiv 2601.20802): the student is pulled towards the self-teacher, token by token."""

import torch
from torch import Tensor

from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.token_weights import TokenWeights, question_weights
from pgpo_lightning.objectives.configs import DivergenceConfig
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.mini_batches import TokenInputs
from pgpo_lightning.training.objective import Objective, Preparation, Route


class DistillationObjective(Objective):
    """The divergence between student and self-teacher, over the samples that have a teacher.

    Args:
        teaching: The self-teacher.
        config: Which divergence.
        num_generations: Rollouts per question.
        token_weights: Weights of tokens or responses by their information; null for equal weights.
        question_weight_exponent: Weigh questions by their success rate (SC-SDPO); null for equal weights.

    Raises:
        ValueError: If settings contradict each other; names the field.
    """

    teaching: SelfTeaching

    def __init__(
        self,
        teaching: SelfTeaching,
        config: DivergenceConfig | None = None,
        *,
        num_generations: int = 8,
        token_weights: TokenWeights | None = None,
        question_weight_exponent: float | None = None,
    ) -> None:
        config = config or DivergenceConfig()
        if question_weight_exponent is not None and num_generations < 2:
            raise ValueError(
                "Expected `num_generations` of at least 2 with `question_weight_exponent`, because a single response has no "
                f"success rate between 0 and 1, but got {num_generations}."
            )
        self.teaching = teaching
        self.full_logits = self.loss_is_divergence = config.full_logit_distillation
        self.divergence = config.divergence
        self.num_generations = num_generations
        self.token_weights = token_weights
        self.question_weight_exponent = question_weight_exponent

    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give every sample that has a demonstration or feedback its teacher's prompt, and every question its weight."""
        scalars = self.teaching.attach(samples, given.teacher, given.rng, seed=given.seed, step=given.step)
        if self.question_weight_exponent is not None:
            n = self.num_generations
            rewards = torch.tensor([sample.verdict.reward for sample in samples], dtype=torch.float64).view(-1, n)
            rates = (rewards >= self.teaching.builder.success_reward_threshold).double().mean(1)
            weights = question_weights(rates, torch.cat(gather(rates)), self.question_weight_exponent)
            for sample, weight in zip(samples, weights.repeat_interleave(n).tolist(), strict=True):
                sample.weight = weight
            scalars["self_distillation/weighted_questions"] = (weights > 0).double().mean().item()
        return scalars

    def in_loss(self, sample: Sample) -> bool:
        """Whether the sample has a teacher, and a weight."""
        return sample.reprompt_ids is not None and sample.weight > 0

    def routes(self, samples: list[Sample]) -> list[Route]:
        """Return one route, with the teacher."""
        return [Route([sample for sample in samples if self.in_loss(sample)], self.token_loss, taught=True)]

    def normalizer(self, samples: list[Sample]) -> int:
        """Return the tokens of the samples that have a teacher."""
        return sum(sample.length for sample in samples if sample.reprompt_ids is not None)

    def token_loss(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the divergence of every token, shape ``(n,)``, or its policy-gradient form.

        The latter has the per-token advantage log T - log S; its expected gradient is that of KL(S||T).
        """
        if self.full_logits:
            return tokens.divergence
        return (tokens.log_p_student - tokens.log_p_teacher).detach() * tokens.log_p_student
