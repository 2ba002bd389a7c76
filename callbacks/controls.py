"""Controls of PGPO (arXiv 2606.03620): multipliers that separate the effect of its information from that of its dose.

Matched to a recorded run through its `run.json`: the same dose at every step (:class:`MatchedConstantMultiplier`), the same
values at random (:class:`MatchedRandomMultiplier`) or permuted in time (:class:`ShuffledMultiplier`), the same schedule
(:class:`ReplayedMultiplier`), and the opposite rule at the same dose (:class:`InverseMultiplier`). A variant of the rule
itself: :class:`CentredMultiplier`. What the best signal could do: :class:`OracleMultiplier`.

The dose of a run is the mean of its multipliers over optimizer steps.
"""

import math
import random
from functools import cached_property
from itertools import accumulate
from statistics import fmean
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from pgpo_lightning.callbacks.step_size import AppliesTo, InformationMultiplier, StepSizeMultiplier
from pgpo_lightning.core.seeding import derive_seed
from pgpo_lightning.core.settings import Decay, Fraction, LowerBound, Multiplier, Seed, Text, checked
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.monitoring.run_record import RunRecord

PRIOR_STEPS = 10
"""Weight of the record in :class:`InverseMultiplier`'s correction, as a number of steps of this run."""


@checked
class RecordedMultiplier(StepSizeMultiplier):
    """Base class of the controls that are matched to a recorded run. A subclass implements :meth:`arranged`.

    The record has the multiplier of every optimizer step that was taken. The recorded run may have skipped steps without a
    rollout in the loss. For each of them the record's mean is appended, because this run may take as many more steps.

    Args:
        run: The recorded run: its folder, or its ``run.json``.
        kwargs: Of the next base class, if a subclass has two.

    Raises:
        ValueError: If there is no such record, or it has no multipliers above 0.
        MisconfigurationException: If this run has more optimizer steps than the record: at start-up, or, if their number is
            unknown then, at the first step too many. If a resumed run finds another record than it began with.
    """

    def __init__(self, run: Text, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = run
        recorded = RunRecord.load(run)
        self.record, self.recorded_seed = list(recorded.rho), recorded.seed
        if not self.record:
            raise ValueError(f"Expected `run` to be a run with a multiplier, but {run} has none.")
        if bad := [rho for rho in self.record if not 0 < rho < math.inf]:
            raise ValueError(f"Expected `run` to have finite multipliers above 0, but {run} has {bad[0]}.")
        self.record += [fmean(self.record)] * recorded.steps_without_signal

    def arranged(self) -> list[float]:
        """Return rho of every step, computed from the record alone."""
        return self.record

    @cached_property
    def sequence(self) -> list[float]:
        """The result of :meth:`arranged`."""
        return self.arranged()

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return this step's entry of the sequence."""
        self.check_length(step + 1)
        return self.sequence[step]

    def check_length(self, steps: float) -> None:
        """Raise if there are more steps than were recorded."""
        if steps > len(self.record):
            raise MisconfigurationException(
                f"Expected at most the {len(self.record)} optimizer steps that {self.run} recorded, but got {steps}. Set "
                f"`trainer.max_steps` to {len(self.record)}, or record a longer run."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Compare the number of steps with the record's."""
        super().on_fit_start(trainer, pl_module)
        self.__dict__.pop("sequence", None)  # the seed may be another than before
        steps = trainer.estimated_stepping_batches * pl_module.update.steps_per_batch
        steps = min(steps, trainer.max_steps) if trainer.max_steps >= 0 else steps
        if steps < 0 or steps == math.inf:  # not known
            return
        steps = int(steps)
        self.check_length(steps)
        dose, recorded = fmean(self.sequence[:steps] or [1.0]), fmean(self.record[:steps] or [1.0])
        if abs(dose / recorded - 1) > 0.01 and not trainer.fast_dev_run:
            rank_zero_warn(
                f"Expected as many steps as {self.run} recorded ({len(self.record)}), but got {steps}: over these the "
                f"dose is {dose:.4g}, and the record's {recorded:.4g}."
            )

    def state_dict(self) -> dict[str, Any]:
        """Add the record."""
        return super().state_dict() | {"record": list(self.record)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the record is still the same."""
        super().load_state_dict(state_dict)
        if state_dict["record"] != self.record:
            raise MisconfigurationException(
                f"Expected {self.run} to be the record that this run began with, but it has other multipliers. Start a new run."
            )


@checked
class MatchedConstantMultiplier(RecordedMultiplier):
    """The recorded run's dose at every step. Tests whether PGPO is more than a larger learning rate.

    Args:
        run: The recorded run: its folder, or its ``run.json``.
        applies_to: See :class:`StepSizeMultiplier`.
    """

    def __init__(self, run: Text, applies_to: AppliesTo = "update") -> None:
        super().__init__(run, applies_to=applies_to)

    def arranged(self) -> list[float]:
        """Return the record's mean for every step."""
        return [fmean(self.record)] * len(self.record)


@checked
class MatchedRandomMultiplier(RecordedMultiplier):
    """Draws from the recorded run's values, independent of the batch. Tests whether it matters *when* a step is large.

    As many values as the record has are drawn from it with replacement, before the first step and from `seed` alone. The mean
    of such draws has a standard error (the record's standard deviation over the root of its length). All draws are therefore
    multiplied by one factor that makes their mean exactly the record's. Apart from that factor they have the record's
    distribution.

    Args:
        run: The recorded run: its folder, or its ``run.json``.
        seed: Of the draws; null means the module's seed.
        applies_to: See :class:`StepSizeMultiplier`.
    """

    def __init__(self, run: Text, seed: Seed | None = None, applies_to: AppliesTo = "update") -> None:
        super().__init__(run, applies_to=applies_to)
        self.seed = seed

    def arranged(self) -> list[float]:
        """Return the draws, rescaled."""
        draws = random.Random(derive_seed(self.draw_seed, "matched random")).choices(self.record, k=len(self.record))
        factor = fmean(self.record) / fmean(draws)
        return [factor * rho for rho in draws]


@checked
class ShuffledMultiplier(RecordedMultiplier):
    """The recorded run's values, each once, in another order. Tests whether it matters *when* a step is large.

    Args:
        run: The recorded run: its folder, or its ``run.json``.
        seed: Of the order; null means the module's seed.
        applies_to: See :class:`StepSizeMultiplier`.
    """

    def __init__(self, run: Text, seed: Seed | None = None, applies_to: AppliesTo = "update") -> None:
        super().__init__(run, applies_to=applies_to)
        self.seed = seed

    def arranged(self) -> list[float]:
        """Return a permutation of the record."""
        return random.Random(derive_seed(self.draw_seed, "shuffled")).sample(self.record, len(self.record))


@checked
class ReplayedMultiplier(RecordedMultiplier):
    """The recorded run's values in their order. Tests whether PGPO is more than a schedule that happens to suit the task.

    Args:
        run: The recorded run: its folder, or its ``run.json``. It must have another seed, or it would be repeated.
        applies_to: See :class:`StepSizeMultiplier`.

    Raises:
        MisconfigurationException: At start-up, if the recorded run has the same seed.
    """

    def __init__(self, run: Text, applies_to: AppliesTo = "update") -> None:
        super().__init__(run, applies_to=applies_to)

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Raise if the recorded run has the same seed."""
        if pl_module.seed == self.recorded_seed:
            raise MisconfigurationException(
                f"Expected `run` to be of another seed than this run's, but {self.run} has seed {self.recorded_seed} too: "
                "replaying it would repeat the recorded run."
            )
        super().on_fit_start(trainer, pl_module)


@checked
class InverseMultiplier(RecordedMultiplier, InformationMultiplier):
    r"""The opposite of PGPO, small steps if the information is large, at the recorded run's dose.

    rho_k = c_k exp(-sensitivity * I_k), with this run's own I_k. The factor c_k = B_k / (r_k P_k) uses past steps only:

    - B_k is the record's sum of rho minus the sum of rho of this run so far.
    - P_k = sum_{j >= k} 1 / rho_j over the rest of the record. It predicts the sum of exp(-sensitivity * I) over the rest of
      this run, if the record is of PGPO with the same sensitivity and information.
    - r_k corrects for a different information or sensitivity: this run's sum of exp(-sensitivity * I) so far over the record's
      sum of 1 / rho so far, with a prior of ten steps at r = 1.

    As long as both runs agree, c_k is constant. The dose is met up to the prediction error of the last step.

    Args:
        run: A recorded PGPO run: its folder, or its ``run.json``.
        rho_min: Lower bound. PGPO's 1.0 would disable this rule.
        kwargs: See :class:`InformationMultiplier`. Use the `sensitivity`, `estimator` and `aggregation` of the recorded run.

    Raises:
        ValueError: If the record's dose is out of bounds.
    """

    def __init__(self, run: Text, rho_min: LowerBound | None = 0.0, **kwargs: Any) -> None:
        super().__init__(run=run, rho_min=rho_min, **kwargs)
        dose = fmean(self.record)
        if not self.bounded(dose) == dose:
            raise ValueError(
                f"Expected `rho_min` and `rho_max` to enclose the record's mean {dose:.4g}, but got {self.rho_min} and "
                f"{self.rho_max}."
            )
        self.expected = [1 / rho for rho in self.record]
        self.remaining = list(accumulate(reversed(self.expected)))[::-1]
        self.seen = 0.0  # sum of exp(-sensitivity * I)

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return exp(-sensitivity * I), rescaled."""
        self.check_length(step + 1)
        prior = PRIOR_STEPS * fmean(self.expected)
        ratio = (prior + self.seen) / (prior + sum(self.expected[:step]))
        budget = max(0.0, sum(self.record) - sum(self.history))
        InformationMultiplier.multiplier(self, statistics, step)
        value = exp(-self.sensitivity * self.estimate.value)
        self.seen += value
        return budget / (ratio * self.remaining[step]) * value

    def state_dict(self) -> dict[str, Any]:
        """Add the sum of exp(-sensitivity * I)."""
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sum of exp(-sensitivity * I)."""
        super().load_state_dict(state_dict)
        self.seen = state_dict["seen"]


@checked
class CentredMultiplier(InformationMultiplier):
    """rho = clip(exp(sensitivity * (I - mean)), rho_min, rho_max), where mean is a moving average of I over past steps.

    Its dose is about 1, so that only PGPO's allocation over steps remains. A step without any teacher has rho 1 and does not
    change the average. The first step with a teacher has rho 1, too.

    Args:
        decay: Of the average, per step; the average is corrected for its start at zero.
        rho_min: Lower bound. The default is the inverse of the upper bound.
        kwargs: See :class:`InformationMultiplier`.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(self, decay: Decay = 0.9, rho_min: Fraction | None = 0.5, **kwargs: Any) -> None:
        super().__init__(rho_min=rho_min, **kwargs)
        self.decay = decay
        self.average = self.weight = 0.0  # mean of the information so far: average / weight

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return exp(sensitivity * (I - mean))."""
        super().multiplier(statistics, step)
        if not statistics.has_teacher.any():
            return 1.0
        centre = self.average / self.weight if self.weight else self.estimate.value
        self.average = self.decay * self.average + (1 - self.decay) * self.estimate.value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return exp(self.sensitivity * (self.estimate.value - centre))

    def state_dict(self) -> dict[str, Any]:
        """Add the average."""
        return super().state_dict() | {"average": self.average, "weight": self.weight}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average."""
        super().load_state_dict(state_dict)
        self.average, self.weight = state_dict["average"], state_dict["weight"]


@checked
class OracleMultiplier(StepSizeMultiplier):
    """rho by the kind of context that the teacher reads, which no signal knows. Bounds what any signal could gain.

    For runs with `reprompt.contexts`.

    Args:
        multipliers: Kind of context to rho, at least for each of `reprompt.contexts.kinds`; 0.001 to 1000.
        applies_to: See :class:`StepSizeMultiplier`.

    Raises:
        MisconfigurationException: At start-up, if the run has no kinds of contexts, or one that `multipliers` lacks.
    """

    def __init__(self, multipliers: dict[str, Multiplier], applies_to: AppliesTo = "update") -> None:
        super().__init__(applies_to)
        self.multipliers = dict(multipliers)
        self.kind = ""

    def setup(self, trainer: L.Trainer, pl_module: OnPolicyModule, stage: str) -> None:
        """Compare the kinds with those of the run."""
        super().setup(trainer, pl_module, stage)
        teaching = pl_module.objective.teaching
        contexts = None if teaching is None else teaching.contexts
        kinds = () if contexts is None else contexts.kinds
        if not kinds or set(kinds) - set(self.multipliers):
            raise MisconfigurationException(
                f"Expected `multiplier.multipliers` to have the kinds of `reprompt.contexts` ({', '.join(kinds) or 'none'}), but "
                f"got {', '.join(self.multipliers) or 'none'}."
            )

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return the kind's number."""
        return self.multipliers[self.kind]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: OnPolicyModule, optimizer: Optimizer) -> None:
        """Read the kind of the batch, and scale the step."""
        (self.kind,) = [kind for kind in self.multipliers if pl_module.scalars.get(f"context/{kind}")]
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


def exp(value: float) -> float:
    """Return e to the value, with the exponent limited to avoid overflow: `rho_max` bounds the result anyway."""
    return math.exp(min(value, 700.0))


def clip_coefficient(norm: float, limit: float | None) -> float:
    """Return what :func:`torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by.

    Example:
        >>> clip_coefficient(0.5, 1.0), clip_coefficient(3.0, None)
        (1.0, 1.0)
    """
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
