"""Self-Distilled Policy Optimisation (SDPO, arXiv 2601.20802). PGPO (arXiv 2606.03620) is this module plus a callback.

The student answers a question. The same model, shown what came of it (a correct sibling answer, an error message), is the
self-teacher; token by token the student is pulled towards it, on the very responses that it sampled.
"""

import random
from typing import Annotated, Any

import torch
from torch import Tensor

from pgpo_lightning.core.settings import Count, Fraction, Positive, Range, checked, either
from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.divergence import Divergence, Softening
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.token_weights import Allocation, question_weights
from pgpo_lightning.modules.self_teaching import SelfTeaching
from pgpo_lightning.training.mini_batches import TokenInputs


@checked
class SDPO(SelfTeaching):
    """Distils the feedback-conditioned self-teacher into the student.

    The loss of a step with B rollouts is ``1/B sum_i 1/L_i sum_t w_it D(S_it, T_it)``, over the rollouts that
    have a teacher: a successful sibling's answer, feedback of their own, or both.

    Args:
        model: See :class:`OnPolicyModule`, as for everything not named here.
        verifier: Judges a response, and may return feedback for the teacher of that very response.
        divergence_alpha: 0 is the forward KL(T||S), 1 the reverse KL(S||T), between them the generalised Jensen-Shannon
            divergence. Default 0.5.
        alpha: SDPO's own name of `divergence_alpha`.
        full_logit_distillation: Compare distributions; if false only the sampled token's log-probabilities (needs alpha 1).
        distillation_topk: Compare over the student's k likeliest tokens only; null for the full vocabulary.
        distillation_add_tail: With top-k, put the rest into one bucket (default) instead of renormalising.
        allocation: Weights of tokens or responses by their information or the teacher's certainty (DW-SDPO), of mean 1; null
            for equal weights.
        question_weight_exponent: Weigh questions by their success rate p: ``(p (1 - p))^exponent``, of mean 1
            (:func:`~pgpo_lightning.losses.token_weights.question_weights`; SC-SDPO has 0.5; 0 to 10). Divisors of the loss stay
            what they are. Null for equal weights.
        entry_clip: Bound, in nats, of what a single vocabulary entry adds to the divergence of a token
            (:func:`~pgpo_lightning.losses.divergence.clipped_divergence`; 0.05 in OPSD). Null for none.
        softening: Mix the student into the teacher's distribution where they disagree (DemoPSD; needs divergence_alpha 1). Null
            for the teacher as it is.
        kwargs: See :class:`~pgpo_lightning.modules.self_teaching.SelfTeaching` for teacher and reprompts, and
            :class:`OnPolicyModule`.
    """

    def __init__(
        self,
        *args: Any,
        divergence_alpha: Fraction | None = None,
        alpha: Fraction | None = None,
        full_logit_distillation: bool = True,
        distillation_topk: Count | None = None,
        distillation_add_tail: bool | None = None,
        allocation: Allocation | None = None,
        question_weight_exponent: Annotated[float, Range(least=0, most=10)] | None = None,
        entry_clip: Positive | None = None,
        softening: Softening | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.divergence_alpha = either("divergence_alpha", divergence_alpha, "alpha", alpha, default=0.5)
        if not full_logit_distillation and self.divergence_alpha != 1:
            raise ValueError(
                "Expected `divergence_alpha` 1 with `full_logit_distillation` false, because sampled tokens only give the "
                f"reverse KL, but got {self.divergence_alpha}."
            )
        for name, value in (
            ("distillation_topk", distillation_topk),
            ("entry_clip", entry_clip),
            ("softening", softening),
        ):
            if value is not None and not full_logit_distillation:
                raise ValueError(f"Expected no `{name}` with `full_logit_distillation` false: it would have no effect.")
        if distillation_add_tail is not None and distillation_topk is None:
            raise ValueError("Expected `distillation_topk` with `distillation_add_tail`: without it there is no tail.")
        if softening is not None:
            if self.divergence_alpha != 1:
                raise ValueError(
                    "Expected `divergence_alpha` 1 with `softening`, whose loss is the reverse KL from the softened target, but "
                    f"got {self.divergence_alpha}."
                )
            for name, value in (("distillation_topk", distillation_topk), ("entry_clip", entry_clip)):
                if value is not None:
                    raise ValueError(
                        f"Expected no `{name}` with `softening`, which is over all tokens, but got {value}."
                    )
        if question_weight_exponent is not None and self.num_generations < 2:
            raise ValueError(
                "Expected `num_generations` of at least 2 with `question_weight_exponent`, because a single response has no "
                f"success rate between 0 and 1, but got {self.num_generations}."
            )
        self.question_weight_exponent = question_weight_exponent
        self.allocation = allocation
        self.full_logit_distillation = full_logit_distillation
        if full_logit_distillation:
            self.divergence = Divergence(
                self.divergence_alpha, distillation_topk, distillation_add_tail is not False, entry_clip, softening
            )

    @property
    def measured(self) -> Divergence:
        """The objective's, or the reverse KL, whose gradient that of sampled tokens is on average."""
        return self.divergence or Divergence(1.0)

    def prepare_rows(self, rows: list[Sample], rng: random.Random) -> dict[str, float]:
        """Give every row that has a demonstration or feedback its teacher's prompt, and every question its weight."""
        scalars = super().prepare_rows(rows, rng)
        if self.question_weight_exponent is not None:
            n = self.num_generations
            rewards = torch.tensor([row.verdict.reward for row in rows], dtype=torch.float64).view(-1, n)
            rates = (rewards >= self.success_reward_threshold).double().mean(1)
            weights = question_weights(rates, torch.cat(gather(rates)), self.question_weight_exponent)
            for row, weight in zip(rows, weights.repeat_interleave(n).tolist(), strict=True):
                row.weight = weight
            scalars["self_distillation/weighted_questions"] = (weights > 0).double().mean().item()
        return scalars

    def in_loss(self, row: Sample) -> bool:
        """Whether the row has a teacher, and a weight."""
        return row.reprompt_ids is not None and row.weight > 0

    def loss_tokens(self, rows: list[Sample]) -> int:
        """Tokens of the rows that have a teacher."""
        return sum(row.length for row in rows if row.reprompt_ids is not None)

    def objective(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the divergence of every token, shape ``(n,)``, or the policy-gradient form of it.

        The latter has the per-token advantage log T - log S; its expected gradient is that of KL(S||T).
        """
        if self.full_logit_distillation:
            return tokens.divergence
        return (tokens.log_p_student - tokens.log_p_teacher).detach() * tokens.log_p_student
