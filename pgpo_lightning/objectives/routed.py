"""Failures are distilled, everything else is reinforced.

Sample-Routed Policy Optimisation (SRPO, arXiv 2604.02288) decides for each response, I-SDPO (arXiv 2608.12957) for each question.
"""

from typing import Literal

from pgpo_lightning.core.types import Sample
from pgpo_lightning.objectives.configs import check_no_reference
from pgpo_lightning.objectives.distillation import DistillationObjective
from pgpo_lightning.objectives.policy_gradient import PolicyGradientObjective
from pgpo_lightning.training.objective import Objective, Preparation, Route, split_taught

RoutingUnit = Literal["sample", "group"]
"""What is routed: each failed response (SRPO), or the responses to a question if all of them failed (I-SDPO)."""


class RoutedObjective(Objective):
    """SDPO's loss for failed responses that have a teacher, GRPO's for all others.

    Args:
        distillation: The loss of the first; its self-teacher is the routed objective's.
        policy_gradient: The loss of the others. Advantages are over the whole group, distilled responses included.
        route: With ``group`` a failed response is distilled only if no response to its question succeeded.

    Raises:
        ValueError: If nothing could ever be distilled; names the field.
    """

    def __init__(
        self,
        distillation: DistillationObjective,
        policy_gradient: PolicyGradientObjective,
        route: RoutingUnit = "sample",
    ) -> None:
        builder = distillation.teaching.builder
        shows_successes = builder.demonstration_source in ("siblings", "own")
        without = not builder.include_environment_feedback and not builder.reprompt_without_context
        if route == "group" and shows_successes and without:
            raise ValueError(
                "Expected `reprompt.include_environment_feedback` true with `route` group, whose distilled questions have no "
                "success to show to the teacher, but got false. Set it, and give questions a `privileged_context` or feedback."
            )
        check_no_reference(policy_gradient.config, "SRPO, which has a self-teacher")
        self.distillation, self.policy_gradient, self.route = distillation, policy_gradient, route
        self.teaching = distillation.teaching
        self.divergence = distillation.divergence
        self.token_weights = distillation.token_weights

    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give failures their teacher's prompt and all samples their advantage."""
        scalars = self.distillation.prepare(samples, given)
        for sample in self._reinforced(samples):
            sample.reprompt_ids = sample.reprompt = None
        scalars |= self.policy_gradient.prepare(samples, given)
        for sample in samples:
            if sample.reprompt_ids is not None:
                sample.old_log_probs = None  # SDPO's importance weight is that of the policy as it is now
        routed = sum(sample.reprompt_ids is not None for sample in samples) / len(samples)
        return scalars | {"self_distillation/routed_fraction": routed}

    def _reinforced(self, samples: list[Sample]) -> list[Sample]:
        """Return the samples that get GRPO's loss, teacher or not."""
        threshold = self.distillation.teaching.builder.success_reward_threshold
        unit = 1 if self.route == "sample" else self.distillation.num_generations
        units = [samples[i : i + unit] for i in range(0, len(samples), unit)]
        return [each for some in units if any(s.verdict.reward >= threshold for s in some) for each in some]

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
