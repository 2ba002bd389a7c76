"""Groups of settings of the objectives."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from pgpo_lightning.core.run_settings import ConfigGroup
from pgpo_lightning.core.settings import AtLeastOne, Count, Fraction, Natural, NonNegative, Positive, checked
from pgpo_lightning.losses.divergence import Divergence, Softening
from pgpo_lightning.losses.policy_gradient import TieBreak
from pgpo_lightning.teachers.contrast import Shown


@partial(checked, prefix="divergence.")
@dataclass(frozen=True)
class DivergenceConfig(ConfigGroup):
    """Which divergence between student S and teacher T is minimised (SDPO, arXiv 2601.20802).

    For alpha = 0 or 1 the loss is a KL divergence, in between a generalised JSD. Near agreement the JSD (alpha = 0.5) is about a
    quarter of the KL, so learning rates do not transfer.

    Args:
        alpha: 0 is the forward KL(T||S), 1 the reverse KL(S||T), between them the generalised Jensen-Shannon divergence.
        full_logit_distillation: Compare distributions; if false, only the sampled token's log-probabilities (needs alpha 1).
        distillation_topk: Compare over the student's k likeliest tokens only; null for the full vocabulary.
        distillation_add_tail: With top-k, put the rest into one bucket (default) instead of renormalising.
        entry_clip: Bound, in nats, of what a single vocabulary entry adds to the divergence of a token
            (:func:`~pgpo_lightning.losses.divergence.clipped_divergence`; 0.05 in OPSD). Null for none.
        softening: Mix the student into the teacher's distribution where they disagree (DemoPSD; needs alpha 1). Null for the
            teacher as it is.

    Raises:
        ValueError: If a setting is out of range or contradicts another; names the field.
    """

    alpha: Fraction = 0.5
    full_logit_distillation: bool = True
    distillation_topk: Count | None = None
    distillation_add_tail: bool | None = None
    entry_clip: Positive | None = None
    softening: Softening | None = None

    def __post_init__(self) -> None:
        """Check the settings against each other."""
        if not self.full_logit_distillation and self.alpha != 1:
            raise ValueError(
                "Expected `divergence.alpha` 1 with `divergence.full_logit_distillation` false, because sampled tokens only give "
                f"the reverse KL, but got {self.alpha}."
            )
        for name in ("distillation_topk", "entry_clip", "softening"):
            if getattr(self, name) is not None and not self.full_logit_distillation:
                raise ValueError(
                    f"Expected no `divergence.{name}` with `divergence.full_logit_distillation` false: it would have no effect."
                )
        if self.distillation_add_tail is not None and self.distillation_topk is None:
            raise ValueError(
                "Expected `divergence.distillation_topk` with `divergence.distillation_add_tail`: without it there is no tail."
            )
        if self.softening is None:
            return
        if self.alpha != 1:
            raise ValueError(
                "Expected `divergence.alpha` 1 with `divergence.softening`, whose loss is the reverse KL from the softened "
                f"target, but got {self.alpha}."
            )
        for name in ("distillation_topk", "entry_clip"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"Expected no `divergence.{name}` with `divergence.softening`, which is over all tokens, but got {value}."
                )

    @property
    def divergence(self) -> Divergence:
        """What is computed; for sampled tokens the reverse KL, whose gradient theirs is in expectation."""
        if not self.full_logit_distillation:
            return Divergence(1.0)
        add_tail = self.distillation_add_tail is not False
        return Divergence(self.alpha, self.distillation_topk, add_tail, self.entry_clip, self.softening)


@partial(checked, prefix="policy_gradient.")
@dataclass(frozen=True)
class PolicyGradientConfig(ConfigGroup):
    """The clipped policy gradient of GRPO, with the names of verl.

    Args:
        norm_adv_by_std_in_grpo: Divide advantages by the group's standard deviation. Null for the module's default: false, and
            true for HAPO (Eq. 2 of its paper).
        std: Standard deviation with n - 1 (``sample``, as in LUFFY and verl) or with n (``population``) in its denominator.
        clip_ratio_low: Clip range below 1. Without effect on the first of several updates, where the ratio is 1.
        clip_ratio_high: Clip range above 1.
        clip_ratio_c: Dual clip; null for none.
        kl_to_reference: Coefficient of the KL divergence from the model that the run started from (GRPO, Eq. 3; beta in TRL). It
            needs a frozen copy of the weights, or with `lora` of the adapter alone, and one more forward pass. 0 for none.

    Raises:
        ValueError: If a setting is out of range or contradicts another; names the field.
    """

    norm_adv_by_std_in_grpo: bool | None = None
    std: Literal["sample", "population"] = "sample"
    clip_ratio_low: Fraction = 0.2
    clip_ratio_high: NonNegative = 0.28
    clip_ratio_c: Positive | None = 3.0
    kl_to_reference: NonNegative = 0.0

    def __post_init__(self) -> None:
        """Check the settings against each other."""
        if self.clip_ratio_c is not None and self.clip_ratio_c <= 1 + self.clip_ratio_high:
            raise ValueError(
                "Expected `policy_gradient.clip_ratio_c` to exceed 1 + `policy_gradient.clip_ratio_high`, but got "
                f"{self.clip_ratio_c}."
            )


def check_no_reference(config: PolicyGradientConfig, why: str) -> None:
    """Raise if a KL divergence from a reference is wanted where there is none.

    Args:
        config: The settings.
        why: The objective, and why it has no reference.

    Raises:
        ValueError: Names the field.
    """
    if config.kl_to_reference:
        raise ValueError(
            f"Expected `policy_gradient.kl_to_reference` 0 with {why}, but got {config.kl_to_reference}. Set it to 0, or "
            "use GRPO."
        )


@partial(checked, prefix="injection.")
@dataclass(frozen=True)
class InjectionConfig(ConfigGroup):
    """How demonstrations enter a group of rollouts (HAPO, arXiv 2603.11321, Eq. 7 to 9).

    Args:
        ties: Which of several equally bad rollouts is replaced: the ``first`` or a ``random`` one.
        demonstration_advantage: Multiply the demonstration's term by its advantage in the group, as LUFFY does. If false, as in
            the letter of Eq. 9, its weight is 1, also where nothing is left to compare it with.
        confidence_weight: Also multiply it by one minus the confidence: a reading of the paper's F(p, c).
        shaping: g in f(p) = p / (p + g).
        gradient_parts_every_n_steps: Batches between two measurements of the gradients of demonstrations and of rollouts alone:
            their norms and their cosine. Each costs two more backward passes, and memory for two more gradients; 0 for none.

    Raises:
        ValueError: If a setting is out of range; names the field.
    """

    ties: TieBreak = "first"
    demonstration_advantage: bool = True
    confidence_weight: bool = False
    shaping: Positive = 0.1
    gradient_parts_every_n_steps: Natural = 0


@partial(checked, prefix="evidence.")
@dataclass(frozen=True)
class EvidenceConfig(ConfigGroup):
    """How a right and a wrong answer distribute a response's advantage over its tokens (CEPO, arXiv 2605.19436).

    Args:
        mixing: Weight of the evidence at the first step, lambda.
        mixing_steps: Batches over which it falls to 0, linearly; null to keep it. At 0 the teacher reads the right answer only,
            for the log.
        clip: How far the evidence moves a factor from 1. The paper has 0.5, the script in its repository 0.2.
        shown: ``answer``: the teacher reads the question's right answer, and the answer that the verifier read from the rejected
            rollout with the lowest reward. ``response``: whole responses, the best accepted rollout (the right answer if there is
            none) and the same rejected one.
        without_wrong_answer: What replaces the contrast where no rollout was rejected: the student's probability (``rlsd``, the
            paper's rule), or nothing, so that the advantage is GRPO's (``grpo``, the rule of the paper's code).

    Raises:
        ValueError: If a setting is out of range; names the field.
    """

    mixing: Fraction = 0.5
    mixing_steps: Count | None = 25
    clip: Fraction = 0.5
    shown: Shown = "answer"
    without_wrong_answer: Literal["rlsd", "grpo"] = "rlsd"


@partial(checked, prefix="difficulty.")
@dataclass(frozen=True)
class DifficultyConfig(ConfigGroup):
    """Which questions are learnt from in which way, and when (DRIFT, arXiv 2606.30345).

    Args:
        decay: Weight of the past in the moving average of a question's success rate, a.
        easy: Questions whose average is above it are easy.
        hard: Questions whose average is below it are hard.
        easy_weight: Weight of successes on easy questions, gamma; that of medium ones is 1.
        hard_weight: Weight of successes on hard questions.
        warmup_steps: Batches of the first stage, in which every response with a teacher is distilled and the teacher is shown the
            success of which the student was least certain. In the second stage it is shown the shortest.
        buffer_size: Successes kept for each question; 0 for no buffer.
        buffer_after: Visits to a question before a group without success gets one of them in the place of a rollout.

    Raises:
        ValueError: If a setting is out of range or contradicts another; names the field.
    """

    decay: Fraction = 0.5
    easy: Fraction = 0.8
    hard: Fraction = 0.2
    easy_weight: NonNegative = 0.5
    hard_weight: NonNegative = 0.0
    warmup_steps: Natural = 10
    buffer_size: Natural = 3
    buffer_after: Count = 1

    def __post_init__(self) -> None:
        """Check the settings against each other."""
        if self.hard > self.easy:
            raise ValueError(
                f"Expected `difficulty.hard` to be at most `difficulty.easy` ({self.easy}), but got {self.hard}."
            )
        if self.buffer_size == 0 and self.buffer_after != 1:
            raise ValueError(
                "Expected no `difficulty.buffer_after` with `difficulty.buffer_size` 0: it would have no effect."
            )


@partial(checked, prefix="rhythm.")
@dataclass(frozen=True)
class RhythmConfig(ConfigGroup):
    """Factors of token advantages in successes on medium questions (DRIFT, arXiv 2606.30345; `losses/rhythm.py`).

    Args:
        strength: beta; 0 for GRPO's advantages, without a teacher's pass over successes.
        sensitivity: tau, how fast the bonus grows with log S - log T.
        maximum: B_max, its largest value plus 1.
        sharpness: a, how sharp the gate is.
        gain: lambda, how high the gate is.
        bound: Largest distance of the gate from 1.

    Raises:
        ValueError: If a setting is out of range; names the field.
    """

    strength: NonNegative = 1.0
    sensitivity: NonNegative = 1.0
    maximum: AtLeastOne = 2.0
    sharpness: NonNegative = 1.0
    gain: NonNegative = 1.0
    bound: Fraction = 0.5
