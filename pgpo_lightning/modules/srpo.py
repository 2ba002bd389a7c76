"""Sample-Routed Policy Optimisation (SRPO, arXiv 2604.02288): failures are distilled, everything else is reinforced."""

import random
from typing import Any

from torch import Tensor

from pgpo_lightning.core.settings import checked
from pgpo_lightning.core.types import Sample
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.modules.grpo import GRPO
from pgpo_lightning.modules.sdpo import SDPO
from pgpo_lightning.modules.self_teaching import apart
from pgpo_lightning.training.mini_batches import TokenInputs


@checked
class SRPO(SDPO, GRPO):
    """SDPO's loss for failed responses that have a teacher, GRPO's for all others.

    With c = 1 for a success and m = 1 for a response that has a teacher, ``z = (1 - c) m`` and the loss of a token is
    ``z w SDPO + (1 - z) GRPO``. Advantages are over the whole group, distilled responses included. The paper divides by the
    tokens of all responses, which is ``loss_agg_mode: token-mean``; with the default of this collection every response counts
    the same instead. The weights w are `allocation`'s with the signal ``teacher-certainty``; their mean is over the distilled
    tokens.

    Args:
        model: See :class:`OnPolicyModule`, as for everything not named in :class:`SDPO` or :class:`GRPO`.
        verifier: Judges a response, and may return feedback for the teacher of that very response.
        kwargs: See :class:`SDPO` and :class:`GRPO`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.question_weight_exponent is not None:
            raise ValueError(
                "Expected no `question_weight_exponent` with SRPO, because its advantages know the success rate already, but got "
                f"{self.question_weight_exponent}."
            )

    def prepare_rows(self, rows: list[Sample], rng: random.Random) -> dict[str, float]:
        """Give failures their teacher's prompt and all rows their advantage."""
        scalars = SDPO.prepare_rows(self, rows, rng)
        for row in rows:
            if row.verdict.reward >= self.success_reward_threshold:
                row.reprompt_ids = row.reprompt = None
        scalars |= GRPO.prepare_rows(self, rows, rng)
        for row in rows:
            if row.reprompt_ids is not None:
                row.old_log_probs = None  # SDPO's importance weight is that of the policy as it is now
        scalars["self_distillation/routed_fraction"] = sum(row.reprompt_ids is not None for row in rows) / len(rows)
        return scalars

    def parts(self, rows: list[Sample]) -> list[list[Sample]]:
        """Return the rows to distil and those to reinforce."""
        return apart(rows)

    def in_loss(self, row: Sample) -> bool:
        """Whether the row is distilled, or has an advantage."""
        return row.reprompt_ids is not None or GRPO.in_loss(self, row)

    def loss_tokens(self, rows: list[Sample]) -> int:
        """Tokens of all rows."""
        return GRPO.loss_tokens(self, rows)

    def objective(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return SDPO's or GRPO's loss of every token, shape ``(n,)``."""
        return (SDPO if given.taught else GRPO).objective(self, tokens, given)
