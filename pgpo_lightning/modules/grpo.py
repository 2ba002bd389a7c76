"""Group Relative Policy Optimisation (GRPO), the baseline: a clipped policy gradient with the group's mean as baseline."""

from typing import Any

import torch
from torch import Tensor

from pgpo_lightning.core.settings import Fraction, NonNegative, Positive, checked
from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.policy_gradient import clipped_policy_loss, group_advantages
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.training.mini_batches import TokenInputs


@checked
class GRPO(OnPolicyModule):
    """Reinforces the better responses of each group.

    Args:
        model: See :class:`OnPolicyModule`, as for everything not named here.
        verifier: Judges a response.
        norm_adv_by_std_in_grpo: Divide advantages by the group's standard deviation.
        clip_ratio_low: Clip range below 1. Without effect on the first of several updates, where the ratio is 1.
        clip_ratio_high: Clip range above 1.
        clip_ratio_c: Dual clip; null for none.
        kwargs: See :class:`OnPolicyModule`.
    """

    std_correction = 1
    """A group's standard deviation has n less this in the denominator."""

    def __init__(
        self,
        *args: Any,
        norm_adv_by_std_in_grpo: bool = False,
        clip_ratio_low: Fraction = 0.2,
        clip_ratio_high: NonNegative = 0.28,
        clip_ratio_c: Positive | None = 3.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if clip_ratio_c is not None and clip_ratio_c <= 1 + clip_ratio_high:
            raise ValueError(f"Expected `clip_ratio_c` to exceed 1 + `clip_ratio_high`, but got {clip_ratio_c}.")
        if self.num_generations < 2:
            raise ValueError(f"Expected `num_generations` of at least 2 for a group, but got {self.num_generations}.")
        self.norm_adv_by_std_in_grpo = norm_adv_by_std_in_grpo
        self.clip_ratio_low = clip_ratio_low
        self.clip_ratio_high = clip_ratio_high
        self.clip_ratio_c = clip_ratio_c

    def prepare_rows(self, rows: list[Sample], rng: Any) -> dict[str, float]:
        """Give every row its advantage, and before several updates the log-probabilities of the sampling policy."""
        rewards = torch.tensor([row.verdict.reward for row in rows], dtype=torch.float32).view(-1, self.num_generations)
        advantages = group_advantages(rewards, self.norm_adv_by_std_in_grpo, self.std_correction).view(-1)
        for row, advantage in zip(rows, advantages, strict=True):
            row.advantage = advantage.item()
        if self.updates_per_batch * self.num_iterations > 1:
            sampled = [row for row in rows if self.in_loss(row) and not row.demonstration]
            for row, log_probs in self.policy_log_probs(sampled, rows):
                row.old_log_probs = log_probs.cpu()
        groups = (rewards.amax(1) > rewards.amin(1)).float().mean().item()
        everyone = torch.cat(gather(advantages))
        return {"critic/advantages/std": everyone.std().item(), "critic/informative_groups": groups}

    def in_loss(self, row: Sample) -> bool:
        """Whether the row has an advantage: without one it has no gradient either."""
        return row.advantage != 0

    def loss_tokens(self, rows: list[Sample]) -> int:
        """Tokens of all rows."""
        return sum(row.length for row in rows)

    def objective(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the clipped policy-gradient loss of every token, shape ``(n,)``."""
        old = given.old_log_probs(tokens)
        return clipped_policy_loss(
            tokens.log_p_student, old, given.advantage, self.clip_ratio_low, self.clip_ratio_high, self.clip_ratio_c
        )
