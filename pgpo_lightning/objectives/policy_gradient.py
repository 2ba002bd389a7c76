"""Clipped policy gradients: GRPO's, and RLSD's, whose advantages a self-teacher spreads over the tokens of a response."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.policy_gradient import (
    clipped_policy_loss,
    credited_advantages,
    group_advantages,
    kl_estimate,
)
from pgpo_lightning.objectives.configs import PolicyGradientConfig, check_no_reference
from pgpo_lightning.teachers.base import Teacher
from pgpo_lightning.teachers.build import make_teacher
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.mini_batches import TokenInputs
from pgpo_lightning.training.objective import Objective, Preparation, Route, split_taught


class PolicyGradientObjective(Objective):
    """GRPO: each response is reinforced by its reward's distance from the mean of its group.

    With `policy_gradient.kl_to_reference` every token also has that multiple of the KL estimate to the initial model in its loss,
    in responses without an advantage too. Like the rest of the loss it gets the importance weight of its token.

    Args:
        config: Advantages and clipping.
        num_generations: Rollouts per question.
        updates: Optimizer steps per batch; with several, the sampling policy's log-probabilities are kept.
        divide_by_std: Whether advantages are divided by the group's standard deviation where the configuration leaves it open.

    Raises:
        ValueError: If settings contradict each other; names the field.
    """

    def __init__(
        self,
        config: PolicyGradientConfig | None = None,
        *,
        num_generations: int = 8,
        updates: int = 1,
        divide_by_std: bool = False,
    ) -> None:
        self.config = config = config or PolicyGradientConfig()
        if num_generations < 2:
            raise ValueError(f"Expected `num_generations` of at least 2 for a group, but got {num_generations}.")
        given = config.norm_adv_by_std_in_grpo
        self.divide_by_std = divide_by_std if given is None else given
        if config.std == "population" and not self.divide_by_std:
            raise ValueError(
                "Expected `policy_gradient.norm_adv_by_std_in_grpo` with `policy_gradient.std` population, but got false: it "
                "would have no effect."
            )
        self.num_generations = num_generations
        self.updates = updates

    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give every sample its advantage, and before several updates the log-probabilities of the sampling policy."""
        rewards = torch.tensor([sample.verdict.reward for sample in samples], dtype=torch.float32)
        rewards = rewards.view(-1, self.num_generations)
        correction = 1 if self.config.std == "sample" else 0
        advantages = group_advantages(rewards, self.divide_by_std, correction).view(-1)
        for sample, advantage in zip(samples, advantages, strict=True):
            sample.advantage = advantage.item()
        if self.updates > 1:
            sampled = [sample for sample in samples if self.in_loss(sample) and not sample.demonstration]
            for sample, log_probs in given.learner.log_probs(sampled, samples):
                sample.old_log_probs = log_probs.cpu()
        scalars = self._compare_with_reference(samples, given) if self.has_reference else {}
        groups = (rewards.amax(1) > rewards.amin(1)).float().mean().item()
        everyone = torch.cat(gather(advantages))
        return scalars | {"critic/advantages/std": everyone.std().item(), "critic/informative_groups": groups}

    @property
    def has_reference(self) -> bool:
        """Whether the loss has a KL divergence from the initial model."""
        return self.config.kl_to_reference > 0

    def make_teacher(self, student: PreTrainedModel, loading: dict[str, Any], longest: int) -> Teacher | None:
        """Return the reference, if there is one: the student's weights, or its adapter, as they are now."""
        reference = make_teacher("frozen", student, 0.0) if self.has_reference else None
        return reference or super().make_teacher(student, loading, longest)

    def _compare_with_reference(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give every sample its log-probabilities under the reference."""
        estimates = []
        for sample, log_probs in given.learner.log_probs(samples, samples, of_teacher=True):
            sample.reference_log_probs = log_probs.cpu()
            estimates.append(kl_estimate(sample.rollout.log_probs, sample.reference_log_probs))
        return {"actor/kl_loss": torch.cat(estimates).mean().item()}

    def in_loss(self, sample: Sample) -> bool:
        """Whether the sample has an advantage, or there is a reference: without both it has no gradient."""
        return sample.advantage != 0 or self.has_reference

    def routes(self, samples: list[Sample]) -> list[Route]:
        """Return one route, without a teacher."""
        return [Route([sample for sample in samples if self.in_loss(sample)], self.token_loss)]

    def normalizer(self, samples: list[Sample]) -> int:
        """Return the tokens of all samples."""
        return sum(sample.length for sample in samples)

    def token_loss(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the clipped policy-gradient loss of every token, shape ``(n,)``."""
        loss = self.clipped(tokens, given, given.advantage)
        if given.reference is None:
            return loss
        return loss + self.config.kl_to_reference * kl_estimate(tokens.log_p_student, given.reference)

    def clipped(self, tokens: TokenStatistics, given: TokenInputs, advantages: Tensor) -> Tensor:
        """Return the clipped loss of every token for these advantages, shape ``(n,)`` each."""
        config, old = self.config, given.old_log_probs(tokens)
        return clipped_policy_loss(
            tokens.log_p_student, old, advantages, config.clip_ratio_low, config.clip_ratio_high, config.clip_ratio_c
        )


class CreditedPolicyGradient(PolicyGradientObjective):
    """RLSD (arXiv 2604.03128): a token's advantage grows where the self-teacher's evidence points the same way.

    Args:
        teaching: The self-teacher.
        mixing: Weight of the teacher's evidence at the first step, lambda.
        mixing_steps: Batches over which it falls to 0, linearly; null to keep it.
        evidence_clip: How far the evidence moves a factor from 1.
        config: See :class:`PolicyGradientObjective`.
        num_generations: See :class:`PolicyGradientObjective`.
        updates: See :class:`PolicyGradientObjective`.
    """

    teaching: SelfTeaching
    divergence = Divergence(0.5)  # for the log; the loss has none of its own

    def __init__(
        self,
        teaching: SelfTeaching,
        mixing: float = 0.5,
        mixing_steps: int | None = 50,
        evidence_clip: float = 0.2,
        *,
        config: PolicyGradientConfig | None = None,
        num_generations: int = 8,
        updates: int = 1,
    ) -> None:
        super().__init__(config, num_generations=num_generations, updates=updates)
        check_no_reference(self.config, "RLSD, which has a self-teacher")
        self.teaching = teaching
        self.mixing, self.mixing_steps, self.evidence_clip = mixing, mixing_steps, evidence_clip
        self.current_mixing = mixing
        """The weight of the teacher's evidence at this step."""

    def mixing_at(self, step: int) -> float:
        """Return the weight of the teacher's evidence after so many batches."""
        return self.mixing if self.mixing_steps is None else self.mixing * max(0.0, 1 - step / self.mixing_steps)

    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give every sample its advantage and, if it has a demonstration or feedback, its teacher's prompt."""
        self.current_mixing = self.mixing_at(given.step)
        scalars = self.attach(samples, given)
        scalars |= super().prepare(samples, given)
        return scalars | {"critic/advantages/mixing": self.current_mixing}

    def attach(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give samples their teacher's prompt, in place; return scalars to log."""
        return self.teaching.attach(samples, given.teacher, given.rng, seed=given.seed, step=given.step)

    def routes(self, samples: list[Sample]) -> list[Route]:
        """Return the samples with a teacher, and those without, which keep the advantage of their group."""
        taught, others = split_taught([sample for sample in samples if self.in_loss(sample)])
        return [Route(taught, self.credited_loss, taught=True), Route(others, self.token_loss)]

    def credited_loss(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the clipped policy-gradient loss of every token, ``(n,)``, with the teacher's credit."""
        return self.credited(tokens, given, tokens.log_p_teacher - tokens.log_p_student)

    def credited(self, tokens: TokenStatistics, given: TokenInputs, evidence: Tensor) -> Tensor:
        """Return the clipped loss of every token, ``(n,)``, whose advantage is credited by some evidence (nats, ``(n,)``)."""
        advantages = credited_advantages(given.advantage, evidence, self.current_mixing, self.evidence_clip)
        return self.clipped(tokens, given, advantages)
