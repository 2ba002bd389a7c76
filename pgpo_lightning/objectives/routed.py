"""Sample-Routed Policy Optimisation (SRPO, arXiv 2604.02288): failures are distilled, everything else is reinforced."""

from pgpo_lightning.core.types import Sample
from pgpo_lightning.objectives.distillation import DistillationObjective
from pgpo_lightning.objectives.policy_gradient import PolicyGradientObjective
from pgpo_lightning.training.objective import Objective, Preparation, Route, split_taught


class RoutedObjective(Objective):
    """SDPO's loss for failed responses that have a teacher, GRPO's for all others.

    Args:
        distillation: The loss of the first; its self-teacher is the routed objective's.
        policy_gradient: The loss of the others. Advantages are over the whole group, distilled responses included.
    """

    def __init__(self, distillation: DistillationObjective, policy_gradient: PolicyGradientObjective) -> None:
        self.distillation, self.policy_gradient = distillation, policy_gradient
        self.teaching = distillation.teaching
        self.divergence = distillation.divergence
        self.loss_is_divergence = distillation.loss_is_divergence
        self.token_weights = distillation.token_weights

    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give failures their teacher's prompt and all samples their advantage."""
        scalars = self.distillation.prepare(samples, given)
        for sample in samples:
            if sample.verdict.reward >= self.distillation.teaching.builder.success_reward_threshold:
                sample.reprompt_ids = sample.reprompt = None
        scalars |= self.policy_gradient.prepare(samples, given)
        for sample in samples:
            if sample.reprompt_ids is not None:
                sample.old_log_probs = None  # SDPO's importance weight is that of the policy as it is now
        routed = sum(sample.reprompt_ids is not None for sample in samples) / len(samples)
        return scalars | {"self_distillation/routed_fraction": routed}

    def in_loss(self, sample: Sample) -> bool:
        """Whether the sample is distilled, or has an advantage."""
        return sample.reprompt_ids is not None or self.policy_gradient.in_loss(sample)

    def routes(self, samples: list[Sample]) -> list[Route]:
        """Return the samples to distil and those to reinforce."""
        distilled, reinforced = split_taught([sample for sample in samples if self.in_loss(sample)])
        return [
            Route(distilled, self.distillation.token_loss, taught=True),
            Route(reinforced, self.policy_gradient.token_loss),
        ]

    def normalizer(self, samples: list[Sample]) -> int:
        """Return the tokens of all samples."""
        return self.policy_gradient.normalizer(samples)
