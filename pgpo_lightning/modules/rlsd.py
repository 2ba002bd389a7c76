"""RLSD (arXiv 2604.03128): the verifier says in which direction a token goes, the self-teacher how far."""

import random
from typing import Any

from torch import Tensor

from pgpo_lightning.core.settings import Count, Fraction, checked
from pgpo_lightning.core.types import Sample
from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.policy_gradient import clipped_policy_loss, credited_advantages
from pgpo_lightning.modules.grpo import GRPO
from pgpo_lightning.modules.self_teaching import SelfTeaching, apart
from pgpo_lightning.teachers.base import TeacherRegularization
from pgpo_lightning.training.mini_batches import TokenInputs


@checked
class RLSD(SelfTeaching, GRPO):
    """GRPO whose advantages are spread over a response's tokens by what the self-teacher makes of them.

    Responses without a teacher (no sibling has succeeded, no feedback) keep the advantage of their group.

    Args:
        model: See :class:`OnPolicyModule`, as for everything not named here.
        verifier: Judges a response, and may return feedback for the teacher of that very response.
        mixing: Weight of the teacher's evidence at the first step, lambda, in [0, 1].
        mixing_steps: Batches over which it falls to 0, linearly; null to keep it.
        evidence_clip: How far the evidence moves a factor from 1, in [0, 1].
        teacher_regularization: Whose weights the teacher has; the paper copies the student every 10 steps: ``restart``.
        teacher_update_rate: See :class:`~pgpo_lightning.modules.self_teaching.SelfTeaching`; default 1, a hard copy, with
            ``restart``.
        kwargs: See :class:`~pgpo_lightning.modules.self_teaching.SelfTeaching` and :class:`GRPO`.
    """

    def __init__(
        self,
        *args: Any,
        mixing: Fraction = 0.5,
        mixing_steps: Count | None = 50,
        evidence_clip: Fraction = 0.2,
        teacher_regularization: TeacherRegularization = "restart",
        teacher_update_rate: Fraction | None = None,
        **kwargs: Any,
    ) -> None:
        if teacher_regularization == "restart" and teacher_update_rate is None:
            teacher_update_rate = 1.0
        super().__init__(
            *args,
            teacher_regularization=teacher_regularization,
            teacher_update_rate=teacher_update_rate,
            **kwargs,
        )
        self.mixing = mixing
        self.mixing_steps = mixing_steps
        self.evidence_clip = evidence_clip

    @property
    def current_mixing(self) -> float:
        """The weight of the teacher's evidence at this step."""
        return self.mixing if self.mixing_steps is None else self.mixing * max(0.0, 1 - self.steps / self.mixing_steps)

    @property
    def measured(self) -> Divergence:
        """The Jensen-Shannon divergence; the objective has none of its own."""
        return Divergence(0.5)

    def prepare_rows(self, rows: list[Sample], rng: random.Random) -> dict[str, float]:
        """Give every row its advantage and, if it has a demonstration or feedback, its teacher's prompt."""
        scalars = SelfTeaching.prepare_rows(self, rows, rng) | GRPO.prepare_rows(self, rows, rng)
        return scalars | {"critic/advantages/mixing": self.current_mixing}

    def parts(self, rows: list[Sample]) -> list[list[Sample]]:
        """Return the rows with a teacher and those without."""
        return apart(rows)

    def objective(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the clipped policy-gradient loss of every token, shape ``(n,)``."""
        advantages = given.advantage
        if given.taught:
            log_ratio = tokens.log_p_teacher - tokens.log_p_student
            advantages = credited_advantages(advantages, log_ratio, self.current_mixing, self.evidence_clip)
        old = given.old_log_probs(tokens)
        return clipped_policy_loss(
            tokens.log_p_student, old, advantages, self.clip_ratio_low, self.clip_ratio_high, self.clip_ratio_c
        )
