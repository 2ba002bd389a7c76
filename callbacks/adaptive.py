"""Multipliers by published rules other than PGPO (arXiv 2606.03620), and PGPO with an alpha that adapts.

The first three do not use the feedback. They are the baselines that an informed step size has to beat.
"""

import math
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Adam, Optimizer

from pgpo_lightning.callbacks.controls import clip_coefficient, exp
from pgpo_lightning.callbacks.step_size import InformationMultiplier, StepSizeMultiplier
from pgpo_lightning.core.settings import (
    AtLeastOne,
    Fraction,
    LowerBound,
    Multiplier,
    NonNegative,
    Positive,
    PositiveFraction,
    Range,
    UpperBound,
    checked,
)
from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.distributed.fsdp import full_tensor
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules import OnPolicyModule


@checked
class KLAdaptiveMultiplier(StepSizeMultiplier):
    """Divides rho by 1.5 after a KL above twice the target, and multiplies rho by 1.5 after a KL below half of it.

    The rule of rsl_rl and rl_games (adaptive schedule). The first step has rho 1; the KL that a step caused determines rho of
    the next. With several updates per batch, the KL of all of them determines rho of the next batch. A batch whose updates
    were all skipped changes nothing.

    Costs one more forward pass of the student over the batch per step, with the new weights on the old rollouts. (The rollouts
    of the next step come from the new policy and cannot measure the change.) That is about a quarter of the update (student
    forward and backward, teacher forward), and little compared with generation.

    Logs `lr/kl`, the KL that determined rho of this step.

    Args:
        target: KL per token (nats), above 0; see :func:`policy_change`.
        factor: Factor of one change of rho, above 1 and at most 10.
        rho_min: Lower bound, above 0 and at most 1. rsl_rl keeps the rate between 1/100 and 10 times its start.
        rho_max: Upper bound, at least 1.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        target: Positive = 1e-3,
        factor: Annotated[float, Range(above=1, most=10)] = 1.5,
        rho_min: PositiveFraction = 0.01,
        rho_max: UpperBound = 10.0,
    ) -> None:
        super().__init__()
        self.target, self.factor = target, factor
        self.rho_min, self.rho_max = rho_min, rho_max
        self.rho = 1.0
        self.kl: float | None = None
        self._before = 0  # steps before this batch

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return rho as the previous step determined it."""
        return self.rho

    def decide(self, kl: float) -> None:
        """Set rho of the next step from the KL of the last one."""
        self.kl = kl
        if kl > 2 * self.target:
            self.rho = self.bounded(self.rho / self.factor)
        elif 0 < kl < self.target / 2:  # as in rsl_rl: a KL of 0 does not mean a small step
            self.rho = self.bounded(self.rho * self.factor)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: OnPolicyModule, optimizer: Optimizer) -> None:
        """Scale the learning rate, and log the KL that determined rho."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.kl is not None:
            pl_module.scalars["lr/kl"] = self.kl

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: OnPolicyModule, batch: Any, batch_idx: int) -> None:
        """Remember the number of steps before this batch."""
        self._before = len(self.history)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OnPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the change of the policy."""
        if len(self.history) > self._before:
            with trainer.precision_plugin.forward_context():
                self.decide(policy_change(pl_module, pl_module.last_samples))

    def state_dict(self) -> dict[str, Any]:
        """Add rho and the KL that determined it."""
        return super().state_dict() | {"rho": self.rho, "kl": self.kl}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore rho and the KL."""
        super().load_state_dict(state_dict)
        self.rho, self.kl = state_dict["rho"], state_dict["kl"]


@torch.no_grad()
def policy_change(module: OnPolicyModule, rows: list[Sample]) -> float:
    r"""Estimate KL(sampler||policy) per token (nats), from the sampler's own tokens.

    The direction of rsl_rl, which rollouts of the old policy can estimate: mean of (r - 1 - log r) over all their tokens.
    r is the token's probability now over its probability when it was sampled. Every term is at least 0 and the mean is unbiased
    (log ratios are clipped at 20). The train-inference mismatch of an engine adds about half of its mean square: choose a
    target well above that (`rollout_corr/log_ratio` shows it).

    Args:
        module: With the policy's weights as they are now.
        rows: This rank's rollouts.

    Returns:
        The estimate over the rollouts of all ranks.

    Raises:
        RuntimeError: If the module has no weights yet.
    """
    if module.learner is None:
        raise RuntimeError("Expected `configure_model` to be called before the change of the policy is measured.")
    total, count = 0.0, 0
    for row, log_probs in module.learner.log_probs(rows, rows):
        change = (log_probs.double() - row.rollout.log_probs.to(log_probs.device)).clamp(-20, 20)
        total += (change.expm1() - change).sum().item()
        count += change.numel()
    everyone = gather((total, count))
    return sum(total for total, _ in everyone) / sum(count for _, count in everyone)


@checked
class EffectiveSampleSizeMultiplier(StepSizeMultiplier):
    """rho = sqrt(min(1, (ESS / B) / base_ratio)): smaller steps if few sequences dominate the batch, never larger ones.

    The rule of VCPO (github.com/mit-han-lab/vcpo). B is the number of sequences in the loss, and ESS = (sum w)^2 / sum w^2.
    w is the probability of the whole response under the trainer over its probability under the sampler. rho differs from 1
    only with a train-inference mismatch: an engine with other kernels or old weights, or several updates per batch.

    Args:
        scaling_rule: ``sqrt``, which VCPO uses for AdamW, or ``linear``.
        base_ratio: ESS / B at and above which rho is 1; in (0, 1].
        clip: Upper bound of w; null for none.
        rho_min: Lower bound; from 0 to 1.

    Raises:
        ValueError: If a setting is out of range.
    """

    rho_max = 1.0

    def __init__(
        self,
        scaling_rule: Literal["sqrt", "linear"] = "sqrt",
        base_ratio: PositiveFraction = 1.0,
        clip: Positive | None = None,
        rho_min: Fraction = 0.0,
    ) -> None:
        super().__init__()
        self.scaling_rule, self.base_ratio, self.clip, self.rho_min = scaling_rule, base_ratio, clip, rho_min

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return the root (or the ratio itself)."""
        if not len(statistics):
            return 1.0
        log_weight = (statistics.sampler_log_ratio * statistics.length).double()
        log_weight = log_weight if self.clip is None else log_weight.clamp(max=math.log(self.clip))
        # In logarithms, because the weight of a long response overflows.
        log_size = 2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)
        ratio = min(1.0, log_size.exp().item() / len(statistics) / self.base_ratio)
        return math.sqrt(ratio) if self.scaling_rule == "sqrt" else ratio


@checked
class PolyakMultiplier(StepSizeMultiplier):
    r"""The step that would bring a linear loss to its optimum, with an upper bound.

    rho = min(rho_max, (L - optimum) / (c * sum_i lr_i <g_i, h_i>)), with g the gradient before clipping and h the direction
    of the step at rate 1: the stochastic Polyak step (SPS_max, arXiv 2002.10542), whose denominator is c lr ||g||^2 for
    plain SGD. Under Adam h = g / (sqrt(v) + eps) with this step's corrected v, the metric of MoMo-Adam (arXiv 2305.07583):
    ||g||^2 has another scale than Adam's steps, and rho would stay at a bound. Momentum and weight decay are ignored.

    The optimum of a divergence is assumed to be 0. The true optimum is higher, because the teacher sees feedback that the
    student does not. The steps are therefore too long, and the upper bound limits them: check how often rho reaches it.

    Args:
        c: Larger values give shorter steps; above 0. Polyak's value is 1.
        optimum: Smallest loss, at least 0.
        rho_min: Lower bound, at least 0.
        rho_max: Upper bound.

    Raises:
        ValueError: If a setting is out of range.
        MisconfigurationException: At start-up, if the loss is not a divergence, or the optimizer is not SGD, Adam or AdamW.
    """

    def __init__(
        self, c: Positive = 1.0, optimum: NonNegative = 0.0, rho_min: LowerBound = 0.0, rho_max: Multiplier = 2.0
    ) -> None:
        super().__init__()
        if not rho_min <= rho_max:
            raise ValueError(f"Expected `rho_min` to be at most `rho_max`, but got {rho_min} and {rho_max}.")
        self.c, self.optimum, self.rho_min, self.rho_max = c, optimum, rho_min, rho_max
        self.loss = self.slope = 0.0

    def setup(self, trainer: L.Trainer, pl_module: OnPolicyModule, stage: str) -> None:
        """Check that the loss has a known minimum."""
        super().setup(trainer, pl_module, stage)
        if not pl_module.objective.loss_is_divergence:
            raise MisconfigurationException(
                "Expected a loss that is a divergence for PolyakMultiplier, because its minimum must be known, but "
                f"that of {type(pl_module).__name__} is not, or not alone, here. Use SDPO with "
                "`divergence.full_logit_distillation`, or another multiplier."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Check that the direction of the optimizer's steps is known."""
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, (SGD, Adam)) or optimizer.defaults.get("amsgrad"):
                raise MisconfigurationException(
                    "Expected SGD, Adam or AdamW of torch.optim without amsgrad for PolyakMultiplier, but got "
                    f"{type(optimizer).__module__}.{type(optimizer).__name__}: its steps' direction is not known."
                )
        super().on_train_start(trainer, pl_module)

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return the ratio; 1 without a gradient."""
        if self.slope <= 0:
            return 1.0
        return max(0.0, self.loss - self.optimum) / (self.c * self.slope)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: OnPolicyModule, optimizer: Optimizer) -> None:
        """Read loss and gradients, and scale the learning rate."""
        clipped = clip_coefficient(pl_module.scalars["actor/grad_norm"], pl_module.update.max_grad_norm)
        self.loss = pl_module.scalars["actor/pg_loss"]
        self.slope = slope(optimizer) / clipped
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


@torch.no_grad()
def slope(optimizer: Optimizer) -> float:
    """Return the slope of the loss along the next step: sum of rate * <gradient, direction>."""
    total = torch.zeros(())  # a tensor, so that the device is waited for once and not for every parameter
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            product = parameter.grad.float().square()
            if isinstance(optimizer, Adam):
                state, beta = optimizer.state.get(parameter, {}), group["betas"][1]
                step = float(state.get("step", 0)) + 1
                second = beta * state.get("exp_avg_sq", 0.0) + (1 - beta) * product
                product = product / ((second / (1 - beta**step)).sqrt() + group["eps"])
            total = total + group["lr"] * product.sum(dtype=torch.float64)
    return float(full_tensor(total))


@checked
class AdaptiveInformationMultiplier(InformationMultiplier):
    """PGPO with an alpha that adapts to a target dose or a target standard deviation of rho.

    The paper tunes alpha per task, and rho depends on alpha times I, whose size depends on task, model and estimator. Here
    alpha is, at every step, the smallest value that would have met the target over the last `window` steps with a teacher.
    Only past steps are used. For the first `warmup` such steps alpha is `sensitivity`. If no alpha up to `sensitivity_max`
    would have met the target, alpha does not change. The target is met approximately: over 100 steps of independent I the
    standard deviation is a seventh too large, because alpha varies too; it is larger if I drifts. If doses must be equal, use
    :class:`MatchedConstantMultiplier` or another control that is matched to a recorded run.

    Logs `information/sensitivity`, the alpha of the step.

    Args:
        target_mean: Target mean of rho; at least 1 and below `rho_max`. Give either this or `target_spread`.
        target_spread: Target standard deviation of rho over steps; above 0.
        window: Largest number of past steps that are used.
        warmup: Steps before the first adaptation; from 2 to `window`.
        sensitivity: alpha of these steps; default 1.0.
        sensitivity_max: Largest alpha.
        kwargs: See :class:`InformationMultiplier`.

    Raises:
        ValueError: If a setting is out of range, or both targets or none are given.
    """

    def __init__(
        self,
        target_mean: AtLeastOne | None = None,
        target_spread: Positive | None = None,
        window: Annotated[int, Range(least=2)] = 50,
        warmup: Annotated[int, Range(least=2)] = 10,
        sensitivity: NonNegative | None = None,
        sensitivity_max: NonNegative = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(sensitivity=sensitivity, **kwargs)
        if (target_mean is None) == (target_spread is None):
            raise ValueError(
                f"Expected one of `target_mean` and `target_spread`, but got {target_mean} and {target_spread}."
            )
        if target_mean is not None and not target_mean < self.rho_max:
            raise ValueError(
                f"Expected `target_mean` to be at least 1 and below `rho_max` ({self.rho_max}), but got {target_mean}."
            )
        if target_spread is not None and not target_spread < self.rho_max:
            raise ValueError(
                f"Expected `target_spread` to be above 0 and below `rho_max` ({self.rho_max}), but got {target_spread}."
            )
        if not warmup <= window:
            raise ValueError(f"Expected `warmup` to be at most `window`, but got {warmup} and {window}.")
        if not self.sensitivity <= sensitivity_max:
            raise ValueError(
                f"Expected `sensitivity_max` to be at least `sensitivity` ({self.sensitivity}), but got {sensitivity_max}."
            )
        self.target_mean, self.target_spread = target_mean, target_spread
        self.window, self.warmup, self.sensitivity_max = window, warmup, sensitivity_max
        self.recent: list[float] = []  # I of the last steps

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return exp(alpha * I), with an alpha from the steps before."""
        if len(self.recent) >= self.warmup:
            self.sensitivity = self._solved()
        rho = super().multiplier(statistics, step)
        if statistics.has_teacher.any():
            self.recent = [*self.recent, self.estimate.value][-self.window :]
        return rho

    def _reaches(self, alpha: float) -> bool:
        rhos = [self.bounded(exp(alpha * value)) for value in self.recent]
        if self.target_spread is not None:
            return stdev(rhos) >= self.target_spread
        return self.target_mean is not None and fmean(rhos) >= self.target_mean

    def _solved(self) -> float:
        # Double first: beyond the alpha at which rho reaches its bounds the spread decreases again.
        low, high = 0.0, min(2.0**-10, self.sensitivity_max)
        while not self._reaches(high):
            if high >= self.sensitivity_max:
                return self.sensitivity
            low, high = high, min(2 * high, self.sensitivity_max)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self._reaches(middle) else (middle, high)
        return high

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: OnPolicyModule, optimizer: Optimizer) -> None:
        """Scale the learning rate, and log the alpha."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        pl_module.scalars["information/sensitivity"] = self.sensitivity

    def state_dict(self) -> dict[str, Any]:
        """Add alpha, and the information of the last steps."""
        return super().state_dict() | {"recent": list(self.recent), "sensitivity": self.sensitivity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore alpha, and the information of the last steps."""
        super().load_state_dict(state_dict)
        self.recent, self.sensitivity = list(state_dict["recent"]), state_dict["sensitivity"]
