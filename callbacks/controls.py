"""Controls: what PGPO (arXiv 2606.03620) has to beat before its information, and not its dose, can be said to matter.

Matched to a recorded run, by the `run.json` that every run leaves: the same dose at every step
(:class:`MatchedConstantMultiplier`), the same values at random (:class:`MatchedRandomMultiplier`) or permuted in time
(:class:`ShuffledMultiplier`), the same schedule (:class:`ReplayedMultiplier`), and the opposite of the rule at the same
dose (:class:`InverseMultiplier`). Variants of the rule itself: :class:`CentredMultiplier` and
:class:`LossScaledMultiplier`.

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

from pgpo_lightning.callbacks.step_size import InformationMultiplier, StepSizeMultiplier
from pgpo_lightning.core.seeding import derive_seed
from pgpo_lightning.core.settings import Decay, Fraction, LowerBound, Seed, Text, checked
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.monitoring.run_record import RunRecord

PRIOR_STEPS = 10
"""How many steps of this run weigh as much as what its record lets expect, in :class:`InverseMultiplier`."""


@checked
class RecordedMultiplier(StepSizeMultiplier):
    """What all controls share that are matched to a recorded run. A subclass writes :meth:`arranged`.

    The record has a multiplier for every optimizer step that was taken. Steps that the recorded run left out because no rollout
    was in the loss are entered behind them with the record's mean, because this run may take as many more.

    Args:
        run: The recorded run: its folder, or its ``run.json``.
        kwargs: Of the next class, where a subclass has two.

    Raises:
        ValueError: If there is no such record, or it has no multipliers above 0.
        MisconfigurationException: If this run has more optimizer steps than the record: at start-up, or where their number is
            not known then, at the first step beyond. If a resumed run meets another record than it began with.
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
        """Return rho of every step, made from the record alone."""
        return self.record

    @cached_property
    def sequence(self) -> list[float]:
        """What :meth:`arranged` returned."""
        return self.arranged()

    def multiplier(self, statistics: StepStatistics, step: int) -> float:
        """Return this step's entry of the sequence."""
        self.check_length(step + 1)
        return self.sequence[step]

    def check_length(self, steps: float) -> None:
        """Refuse more steps than were recorded."""
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
        """Make sure that the record is still the same."""
        super().load_state_dict(state_dict)
        if state_dict["record"] != self.record:
            raise MisconfigurationException(
                f"Expected {self.run} to be the record that this run began with, but it has other multipliers. Start afresh."
            )


@checked
class MatchedConstantMultiplier(RecordedMultiplier):
    """The recorded run's dose at every step: is PGPO more than a larger learning rate?

    Args:
        run: The recorded run: its folder, or its ``run.json``.
    """

    def __init__(self, run: Text) -> None:
        super().__init__(run)

    def arranged(self) -> list[float]:
        """Return the record's mean, again and again."""
        return [fmean(self.record)] * len(self.record)


@checked
class MatchedRandomMultiplier(RecordedMultiplier):
    """Draws from the recorded run's own values, independent of the batch: does it matter *when* a step is large?

    As many values as the record has are drawn from it with replacement, before the first step and from `seed` alone. Such
    draws would miss the record's dose by its spread over the root of its length, so all of them are multiplied by the one
    factor that makes their mean the record's exactly. Their distribution is the record's but for that factor (and
    sampling).

    Args:
        run: The recorded run: its folder, or its ``run.json``.
        seed: Of the draws; null takes the module's.
    """

    def __init__(self, run: Text, seed: Seed | None = None) -> None:
        super().__init__(run)
        self.seed = seed

    def arranged(self) -> list[float]:
        """Return the draws, rescaled."""
        draws = random.Random(derive_seed(self.draw_seed, "matched random")).choices(self.record, k=len(self.record))
        factor = fmean(self.record) / fmean(draws)
        return [factor * rho for rho in draws]


@checked
class ShuffledMultiplier(RecordedMultiplier):
    """The recorded run's values, each once, in another order: does it matter *when* a step is large?

    Args:
        run: The recorded run: its folder, or its ``run.json``.
        seed: Of the order; null takes the module's.
    """

    def __init__(self, run: Text, seed: Seed | None = None) -> None:
        super().__init__(run)
        self.seed = seed

    def arranged(self) -> list[float]:
        """Return a permutation of the record."""
        return random.Random(derive_seed(self.draw_seed, "shuffled")).sample(self.record, len(self.record))


@checked
class ReplayedMultiplier(RecordedMultiplier):
    """The recorded run's values in their order: is PGPO more than a schedule that happens to suit the task?

    Args:
        run: The recorded run: its folder, or its ``run.json``. Of another seed: replaying one's own run repeats it.

    Raises:
        MisconfigurationException: At start-up, if the record is of the same seed.
    """

    def __init__(self, run: Text) -> None:
        super().__init__(run)

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Refuse the record of the same seed."""
        if pl_module.seed == self.recorded_seed:
            raise MisconfigurationException(
                f"Expected `run` to be of another seed than this run's, but {self.run} has seed {self.recorded_seed} too: to "
                "replay it would give the recorded run again, not a control of it."
            )
        super().on_fit_start(trainer, pl_module)


@checked
class InverseMultiplier(RecordedMultiplier, InformationMultiplier):
    r"""The opposite of PGPO, small steps where the feedback tells much, at the recorded run's dose.

    rho_k = c_k exp(-sensitivity * I_k), with this run's own I_k. The factor c_k is made before the step, from the past
    alone: c_k = B_k / (r_k P_k), where B_k is what is left of the record's summed rho after what this run has spent; P_k =
    sum_{j >= k} 1 / rho_j over the rest of the record, which is what exp(-sensitivity * I) will sum to if the record is of
    PGPO with the same sensitivity and information; and r_k, this run's exp(-sensitivity * I) so far over the record's 1 /
    rho so far (with a prior of ten steps at r = 1), corrects for an information or sensitivity that differs. As long as
    both runs agree c_k stays the same; the dose is met to about one step's worth of the last step's surprise.

    Args:
        run: A recorded PGPO run: its folder, or its ``run.json``.
        rho_min: Lower bound. PGPO's 1.0 would cut off what this rule does.
        kwargs: See :class:`InformationMultiplier`. With its own `sensitivity`, `estimator` and `aggregation` the
            record fits best.

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
        value = exp(-self.sensitivity * self.signal.value)
        self.seen += value
        return budget / (ratio * self.remaining[step]) * value

    def state_dict(self) -> dict[str, Any]:
        """Add what was seen."""
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what was seen."""
        super().load_state_dict(state_dict)
        self.seen = state_dict["seen"]


@checked
class CentredMultiplier(InformationMultiplier):
    """rho = clip(exp(sensitivity * (I - mean)), rho_min, rho_max), with a moving average of I over the steps before.

    Its dose is about 1, so that only the allocation over steps is left of PGPO. A step without any teacher has rho 1 and
    leaves the average as it is, and so has the first step with one.

    Args:
        decay: Of the average, per step; the average is corrected for its start at zero.
        rho_min: Lower bound. The default is the inverse of the upper one.
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
        centre = self.average / self.weight if self.weight else self.signal.value
        self.average = self.decay * self.average + (1 - self.decay) * self.signal.value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return exp(self.sensitivity * (self.signal.value - centre))

    def state_dict(self) -> dict[str, Any]:
        """Add the average."""
        return super().state_dict() | {"average": self.average, "weight": self.weight}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the average."""
        super().load_state_dict(state_dict)
        self.average, self.weight = state_dict["average"], state_dict["weight"]


class LossScaledMultiplier(InformationMultiplier):
    """PGPO's rho on the loss instead of the update: does it matter that Adam's moments never see it?

    Rates stay as they are. The gradients of the whole step, of all micro-batches and ranks, become what they had been with
    the loss times rho: multiplied *before* clipping, so that a step that is clipped anyway does not change in length. (They
    arrive here clipped, but what was clipped is known.) AdamW's weight decay does not see rho. `actor/pg_loss` and
    `actor/grad_norm` are logged as they are without it. Settings are those of :class:`InformationMultiplier`.
    """

    def apply(self, pl_module: OnPolicyModule, optimizer: Optimizer, rho: float) -> None:
        """Scale the gradients, not the learning rate."""
        norm, limit = pl_module.scalars["actor/grad_norm"], pl_module.update.max_grad_norm
        factor = rho * clip_coefficient(rho * norm, limit) / clip_coefficient(norm, limit)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)


def exp(value: float) -> float:
    """Return e to the value; what would overflow is bounded by `rho_max` anyway."""
    return math.exp(min(value, 700.0))


def clip_coefficient(norm: float, limit: float | None) -> float:
    """Return what :func:`torch.nn.utils.clip_grad_norm_` multiplies gradients of this norm by.

    Example:
        >>> clip_coefficient(0.5, 1.0), clip_coefficient(3.0, None)
        (1.0, 1.0)
    """
    return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
