"""Teacher-guided policy optimisation (TGPO, arXiv 2605.13230): GRPO, guided by a teacher's likeliest tokens."""

from torch import Tensor

from pgpo_lightning.core.types import Sample
from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.objectives.configs import PolicyGradientConfig, check_no_reference
from pgpo_lightning.objectives.policy_gradient import PolicyGradientObjective
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.mini_batches import TokenInputs
from pgpo_lightning.training.objective import Preparation, Route, split_taught


class GuidedPolicyGradient(PolicyGradientObjective):
    """GRPO's loss plus ``w_t (-log S(v_t))``, where v_t is the teacher's likeliest token after the student's own prefix.

    Every rollout with a teacher is in the loss while w_t > 0, also without an advantage. At w_t = 0 the teacher does not run, and
    the step is GRPO's.

    Args:
        teaching: The teacher.
        guidance: w_0.
        guidance_steps: Batches over which w_t falls to 0, linearly; null to keep it.
        config: See :class:`PolicyGradientObjective`.
        num_generations: See :class:`PolicyGradientObjective`.
        updates: See :class:`PolicyGradientObjective`.
    """

    teaching: SelfTeaching
    divergence = Divergence(0.0, greedy=True)

    def __init__(
        self,
        teaching: SelfTeaching,
        guidance: float = 2e-3,
        guidance_steps: int | None = 200,
        *,
        config: PolicyGradientConfig | None = None,
        num_generations: int = 8,
        updates: int = 1,
    ) -> None:
        super().__init__(config, num_generations=num_generations, updates=updates)
        check_no_reference(self.config, "TGPO, which has a teacher")
        self.teaching = teaching
        self.guidance, self.guidance_steps = guidance, guidance_steps
        self.current_guidance = guidance
        """w_t of this step."""

    def guidance_at(self, step: int) -> float:
        """Return w_t after so many batches."""
        return (
            self.guidance if self.guidance_steps is None else self.guidance * max(0.0, 1 - step / self.guidance_steps)
        )

    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give every sample its advantage and, while it is guided, its teacher's prompt."""
        self.current_guidance = self.guidance_at(given.step)
        scalars: dict[str, float] = {}
        if self.current_guidance > 0:
            scalars = self.teaching.attach(samples, given.teacher, given.rng, seed=given.seed, step=given.step)
        scalars |= super().prepare(samples, given)
        return scalars | {"self_distillation/guidance": self.current_guidance}

    def in_loss(self, sample: Sample) -> bool:
        """Whether the sample has a teacher, or an advantage."""
        return sample.reprompt_ids is not None or super().in_loss(sample)

    def routes(self, samples: list[Sample]) -> list[Route]:
        """Return the samples with a teacher, and those without, which have GRPO's loss alone."""
        taught, others = split_taught([sample for sample in samples if self.in_loss(sample)])
        return [Route(taught, self.guided_loss, taught=True), Route(others, self.token_loss)]

    def guided_loss(self, tokens: TokenStatistics, given: TokenInputs) -> Tensor:
        """Return the loss of every token with a teacher, shape ``(n,)``."""
        return self.token_loss(tokens, given) + self.current_guidance * tokens.divergence
