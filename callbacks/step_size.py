"""Multipliers of the step size: rho of PGPO (arXiv 2606.03620, Eq. 9) and its first controls.

rho multiplies the update, as in the paper's Algorithm 1, or the gradient before the optimizer's moments. Under Adam these are
different experiments (docs/theory.md). A multiplier of the update is a dose, a larger learning rate on average, and its own batch
gets only 1 - beta1 of it. A multiplier of the gradient weighs its batch in full and carries no dose: Adam divides by the
gradient's own scale, so a constant factor cancels.
"""

import math
from abc import abstractmethod
from statistics import pstdev
from typing import Any, Literal

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from pgpo_lightning.callbacks.batch_weights import batch_weights, lag, momentum_of
from pgpo_lightning.callbacks.per_run_state import PerRunState
from pgpo_lightning.core.run_settings import Remembers
from pgpo_lightning.core.seeding import derive_seed, global_seed
from pgpo_lightning.core.settings import LowerBound, Multiplier, NonNegative, Seed, UpperBound, checked, either
from pgpo_lightning.core.texts import shown
from pgpo_lightning.losses.information import (
    Aggregation,
    Estimator,
    Information,
    Signal,
    information,
    teacher_certainty,
)
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules.on_policy import OnPolicyModule

AppliesTo = Literal["update", "gradient"]


@checked
class StepSizeMultiplier(Remembers, PerRunState):
    """Multiplies one optimizer step by rho: its update, or its gradient.

    A subclass implements :meth:`multiplier`. rho acts once all gradients of the step are computed, summed over ranks and clipped.

    - ``update``, the paper's rule: the learning rate of every parameter group is scaled for exactly this step, and put back right
      after it, before a schedule or checkpoint reads it. Gradients do not change, so rho does not enter Adam's moments. With
      decoupled weight decay (AdamW) the decay of the step is scaled as well, because PyTorch multiplies it by the rate.
    - ``gradient``: the gradients are scaled, after clipping so that clipping does not undo it. rho enters the moments. Learning
      rate and decoupled weight decay stay. Under Adam a constant rho changes nothing (but for `eps`); under SGD both are the same
      but for momentum.

    Logs `lr/multiplier` (rho) and `lr/effective` in addition to the module's `lr/base`, and what the optimizer's momentum leaves
    of rho (:mod:`pgpo_lightning.callbacks.batch_weights`): `lr/multiplier_std` and `lr/batch_weight_std`, the standard deviations
    over steps so far of rho and of the weights that batches get, and `lr/batch_weight`, the weight of the youngest batch for
    which it is known to 5 %.

    Args:
        applies_to: ``update`` or ``gradient``.

    Raises:
        MisconfigurationException: At start-up, if another multiplier is active.
    """

    rho_min: float | None = 0.0
    rho_max: float | None = None
    seed: int | None = None
    """Seed of a subclass that draws random numbers; null means the module's seed."""
    _seed_of_module: int | None = None

    history: list[float]
    """rho of every optimizer step so far."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Begin with an empty history, also in a subclass that does not call ``super().__init__()``."""
        self = super().__new__(cls, *args, **kwargs)
        self.history = []
        return self

    applies_to: AppliesTo = "update"

    def __init__(self, applies_to: AppliesTo = "update") -> None:
        self.applies_to = applies_to

    @abstractmethod
    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return rho for this step, before bounds.

        Args:
            statistics: One row per sequence in the loss, of all ranks. The result must depend on nothing else that differs
                between ranks, or their weights would diverge.
            step: Optimizer steps so far, without skipped ones; the same after a resume.
        """

    def bounded(self, rho: float) -> float:
        """Return rho within [rho_min, rho_max].

        Args:
            rho: A number, also one of NumPy or a tensor with one element.

        Raises:
            RuntimeError: If it is not a number, or infinite, or below 0.
        """
        try:
            rho = float(rho)
        except (TypeError, ValueError, RuntimeError):
            raise RuntimeError(
                f"Expected {type(self).__name__} to return a number that is finite and at least 0, but got {shown(rho)}."
            ) from None
        bounded = rho if self.rho_min is None else max(rho, self.rho_min)
        bounded = bounded if self.rho_max is None else min(bounded, self.rho_max)
        if math.isnan(rho) or not 0 <= bounded < math.inf:
            raise RuntimeError(
                f"Expected {type(self).__name__} to return a number that is finite and at least 0, but got {rho}."
            )
        return bounded

    def setup(self, trainer: L.Trainer, pl_module: OnPolicyModule, stage: str) -> None:
        """Raise if there is a second multiplier: each would restore the other's rates."""
        active = [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, StepSizeMultiplier)]
        if len(active) > 1:
            raise MisconfigurationException(
                f"Expected one step-size multiplier, but got {' and '.join(active)}. Keep it under `multiplier` and out of "
                "`trainer.callbacks`."
            )
        self.reset_for_new_run(trainer, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Remember the module's seed."""
        self._seed_of_module = getattr(pl_module, "seed", None)

    @property
    def draw_seed(self) -> int:
        """The seed of random draws: this multiplier's, else the module's."""
        known = self._seed_of_module if self.seed is None else self.seed
        return global_seed() if known is None else known

    def state_dict(self) -> dict[str, Any]:
        """Return rho of every step so far; a subclass adds its own state."""
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore rho of every step before the interruption."""
        self.history = list(state_dict["history"])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: OnPolicyModule, optimizer: Optimizer) -> None:
        """Scale the learning rate."""
        rho = self.bounded(
            self.multiplier(pl_module.step_statistics, trainer.global_step - pl_module.steps_without_signal)
        )
        self.history.append(rho)
        self.apply(pl_module, optimizer, rho)
        pl_module.scalars |= {"lr/multiplier": rho, "lr/effective": float(optimizer.param_groups[0]["lr"])}
        pl_module.scalars |= self._weights(momentum_of(optimizer))

    def apply(self, pl_module: OnPolicyModule, optimizer: Optimizer, rho: float) -> None:
        """Scale the learning rates, which the module restores after the step, also after an error; or the gradients."""
        if self.applies_to == "update":
            pl_module.scale_rates(optimizer, rho)
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(rho)

    def _weights(self, momentum: float) -> dict[str, float]:
        """Return what momentum leaves of rho so far."""
        momentum = momentum if self.applies_to == "update" else 0.0
        weights = batch_weights(self.history, momentum)
        found = {"lr/multiplier_std": pstdev(self.history), "lr/batch_weight_std": float(weights.std())}
        behind = lag(momentum)
        return found | ({"lr/batch_weight": float(weights[-1 - behind])} if behind < len(weights) else {})

    def on_exception(self, trainer: L.Trainer, pl_module: OnPolicyModule, exception: BaseException) -> None:
        """Restore the rates if an interrupt arrived while the module did so."""
        pl_module.restore_rates()


@checked
class InformationMultiplier(StepSizeMultiplier):
    """PGPO: rho = clip(exp(sensitivity * I), rho_min, rho_max), with I the information of the step (Eq. 8 and 9).

    Var(rho) <= (sensitivity * rho_max)^2 Var(I), because rho is Lipschitz in I with that constant.

    Args:
        sensitivity: The paper's alpha; at least 0. Default 1.0.
        alpha: The paper's own name of `sensitivity`.
        rho_max: Upper bound, at least 1. Unspecified in the paper; we chose 2.0.
        rho_min: Lower bound. 1.0 keeps rho >= 1, as the paper states, also if the estimate of I is negative; null for none.
        estimator: See :func:`pgpo_lightning.losses.information.information`.
        aggregation: See :func:`pgpo_lightning.losses.information.information`.
        signal: What stands for I. ``information``: H(student) - H(teacher), the paper's. A student that collapses has a high
            entropy, and the paper's rule then takes its largest steps; the others do not see the student's entropy.
            ``teacher-certainty``: -H(teacher), which is never above 0, so `rho_min` has to be below 1. ``relative``: the
            student's entropy in the first step with a teacher, minus H(teacher) now.
        applies_to: See :class:`StepSizeMultiplier`.

    Raises:
        ValueError: If a setting is out of range or contradicts another.
    """

    rho_max: float

    def __init__(
        self,
        sensitivity: NonNegative | None = None,
        alpha: NonNegative | None = None,
        rho_max: UpperBound = 2.0,
        rho_min: LowerBound | None = 1.0,
        estimator: Estimator = "entropy-difference",
        aggregation: Aggregation = "sequence-mean",
        signal: Signal = "information",
        applies_to: AppliesTo = "update",
    ) -> None:
        super().__init__(applies_to)
        self.sensitivity = either("sensitivity", sensitivity, "alpha", alpha, default=1.0)
        if rho_min is not None and not rho_min <= rho_max:
            raise ValueError(f"Expected `rho_min` to lie between 0 and `rho_max` ({rho_max}), but got {rho_min}.")
        if signal != "information" and estimator != "entropy-difference":
            raise ValueError(
                f"Expected `estimator` entropy-difference with `signal` {signal}, which is made of entropies, but got "
                f"{estimator}."
            )
        if signal == "teacher-certainty" and rho_min is not None and rho_min >= 1:
            raise ValueError(
                "Expected `rho_min` below 1 with `signal` teacher-certainty, which is never above 0, so that rho would always be "
                f"{rho_min:g}, but got {rho_min}. Set it to null."
            )
        self.rho_max, self.rho_min = rho_max, rho_min
        self.estimator, self.aggregation, self.signal = estimator, aggregation, signal
        self.estimate = information(StepStatistics.empty())
        self.first_entropy: float | None = None
        """The student's entropy in the first step with a teacher, for the signal `relative`."""

    def setup(self, trainer: L.Trainer, pl_module: OnPolicyModule, stage: str) -> None:
        """Check that the module has a teacher, without which there is no information."""
        super().setup(trainer, pl_module, stage)
        if not getattr(pl_module, "has_teacher", False):
            raise MisconfigurationException(
                f"Expected a module with a teacher for {type(self).__name__}, but {type(pl_module).__name__} has none. Use "
                "`--multiplier null`, or SDPO."
            )

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return exp(sensitivity * I)."""
        self.estimate = self._estimated(statistics)
        # exp() of more than 700 overflows; rho_max bounds it anyway.
        return math.exp(min(self.sensitivity * self.estimate.value, 700.0))

    def _estimated(self, statistics: StepStatistics) -> Information:
        if self.signal == "information" or not statistics.has_teacher.any():
            return information(statistics, self.estimator, self.aggregation)
        certainty = teacher_certainty(statistics, self.aggregation)
        if self.signal == "teacher-certainty":
            return certainty
        if self.first_entropy is None:
            self.first_entropy = information(statistics, aggregation=self.aggregation).value - certainty.value
        return Information(self.first_entropy + certainty.value, certainty.standard_error)

    def state_dict(self) -> dict[str, Any]:
        """Add the entropy of the first step."""
        return super().state_dict() | {"first_entropy": self.first_entropy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the entropy of the first step."""
        super().load_state_dict(state_dict)
        self.first_entropy = state_dict.get("first_entropy")  # checkpoints of versions without other signals lack it

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: OnPolicyModule, optimizer: Optimizer) -> None:
        """Scale the learning rate, and log the estimate of I that rho is computed from."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        pl_module.scalars["information/used"] = self.estimate.value
        if self.rho_max > 1:
            pl_module.scalars["lr/at_bound"] = float(self.history[-1] >= self.rho_max)
        if not math.isnan(self.estimate.standard_error):
            pl_module.scalars["information/used_standard_error"] = self.estimate.standard_error


@checked
class ConstantMultiplier(StepSizeMultiplier):
    """The same rho at every step. Tests whether PGPO is more than a larger learning rate.

    Args:
        value: rho; 0.001 to 1000.
        applies_to: See :class:`StepSizeMultiplier`. On the gradient it changes nothing under Adam.

    Raises:
        ValueError: If it is out of range.
    """

    def __init__(self, value: Multiplier = 1.0, applies_to: AppliesTo = "update") -> None:
        super().__init__(applies_to)
        self.value = value

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return the constant."""
        return self.value


@checked
class RandomMultiplier(StepSizeMultiplier):
    """A uniform draw per step, independent of the batch: the control for the information in PGPO's rho.

    Args:
        low: Smallest rho; 0.001 to 1000.
        high: Largest rho.
        seed: Of the draws, which depend on it and on the step alone; null means the module's seed.
        applies_to: See :class:`StepSizeMultiplier`.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        low: Multiplier = 1.0,
        high: Multiplier = 1.2,
        seed: Seed | None = None,
        applies_to: AppliesTo = "update",
    ) -> None:
        super().__init__(applies_to)
        if not low <= high:
            raise ValueError(f"Expected `low` to be at most `high`, but got {low} and {high}.")
        self.low, self.high, self.seed = low, high, seed

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return this step's draw."""
        return self.low + (self.high - self.low) * derive_seed(self.draw_seed, "multiplier", step) / 2**63
