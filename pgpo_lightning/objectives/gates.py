"""Gates: which groups HAPO gives a demonstration to (arXiv 2603.11321, Eq. 5 and 6, and controls that the paper leaves out).

A gate decides from a group's own successes, before anything is replaced. :class:`ConfidenceGate` is the paper's with a threshold
that may change over time; :class:`RandomGate` and :class:`MatchedRandomGate` know nothing of the group.
"""

import math
import random
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.core.settings import Count, Fraction, NonNegative, Positive, PositiveFraction, Text, checked
from pgpo_lightning.losses.policy_gradient import confidence, confidence_below
from pgpo_lightning.monitoring.run_record import RunRecord


class Group(NamedTuple):
    """The rollouts to one question: its index in the data, how many succeeded, and how many there are."""

    question: int
    successes: int
    size: int


class Decision(NamedTuple):
    """Whether a group may get a demonstration, and the posterior mean of its question's success rate."""

    open: bool
    confidence: float


class Threshold(ABC):
    """Below which confidence a gate is open, as training goes on.

    With n rollouts confidence is a multiple of 1 / (n + 2), so a schedule acts as a staircase. From 1 / (n + 2) down the gate is
    shut for every group: pure GRPO.
    """

    @abstractmethod
    def value(self, step: int) -> float:
        """Return the threshold.

        Args:
            step: Batches trained on so far.
        """

    def observe(self, success_rate: float) -> None:  # noqa: B027  (most have no state)
        """Take note of the share of rollouts, of all ranks, that succeeded in this step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027
        """Take it over."""


@checked
class ConstantThreshold(Threshold):
    """The same throughout; the paper's experiments have 0.8.

    Args:
        level: Above 1 the gate is open for every group (always inject: LUFFY).

    Raises:
        ValueError: If it is not above 0.
    """

    def __init__(self, level: Positive = 0.8) -> None:
        self.level = level

    def value(self, step: int) -> float:
        """See :meth:`Threshold.value`."""
        return self.level


@checked
class StepThreshold(Threshold):
    """One level before a step, another from it on.

    Args:
        start: The first level.
        end: The second. At most 1 / (n + 2) shuts the gate.
        at: Batches trained on before the second.

    Raises:
        ValueError: If a level is below 0, or `at` below 1.
    """

    def __init__(self, at: Count, start: NonNegative = 0.8, end: NonNegative = 0.1) -> None:
        self.start, self.end, self.at = start, end, at

    def value(self, step: int) -> float:
        """See :meth:`Threshold.value`."""
        return self.start if step < self.at else self.end


@checked
class SigmoidThreshold(Threshold):
    """From one level to another: end + (start - end) / (1 + exp((step - at) / width)).

    It comes to `end` only in the limit: to shut the gate in time, let `end` lie well below 1 / (n + 2).

    Args:
        start: The level that it comes from.
        end: The level that it goes to.
        at: Batches trained on when it is half way.
        width: In batches; most of the way is gone within four of them on either side.

    Raises:
        ValueError: If a level is below 0, or `width` is not above 0.
    """

    def __init__(self, at: float, width: Positive, start: NonNegative = 0.8, end: NonNegative = 0.0) -> None:
        self.start, self.end, self.at, self.width = start, end, at, width

    def value(self, step: int) -> float:
        """See :meth:`Threshold.value`."""
        distance = max(-700.0, min(700.0, (step - self.at) / self.width))
        return self.end + (self.start - self.end) / (1 + math.exp(distance))


@checked
class ProgressThreshold(Threshold):
    """Falls as rollouts succeed more often: start - slope * (average success rate - reference), within [end, start].

    The average is an exponential one over the steps before this one; it begins at the first step's success rate.

    Args:
        start: The threshold at the reference, and the highest.
        end: The lowest.
        slope: Threshold per success rate.
        reference: The success rate to start from; null for that of the first step.
        decay: Of the average, per step.

    Raises:
        ValueError: If a level is below 0, `end` above `start`, `slope` not above 0, or another number outside of [0, 1].
    """

    def __init__(
        self,
        start: NonNegative = 0.8,
        end: NonNegative = 0.1,
        slope: Positive = 1.0,
        reference: Fraction | None = None,
        decay: Fraction = 0.9,
    ) -> None:
        if end > start:
            raise ValueError(f"Expected `end` to be at most `start` ({start}), but got {end}.")
        self.start, self.end, self.slope, self.reference, self.decay = start, end, slope, reference, decay
        self.first: float | None = None
        self.average: float | None = None

    def value(self, step: int) -> float:
        """See :meth:`Threshold.value`."""
        reference = self.first if self.reference is None else self.reference
        if self.average is None or reference is None:
            return self.start
        return min(self.start, max(self.end, self.start - self.slope * (self.average - reference)))

    def observe(self, success_rate: float) -> None:
        """See :meth:`Threshold.observe`."""
        self.first = success_rate if self.first is None else self.first
        before = success_rate if self.average is None else self.average
        self.average = self.decay * before + (1 - self.decay) * success_rate

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the first success rate."""
        return {"first": self.first, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.first, self.average = state_dict["first"], state_dict["average"]


class Gate(ABC):
    """Decides which groups may get a demonstration. Its state is the same on every rank, and in checkpoints."""

    @abstractmethod
    def decide(self, groups: list[Group], step: int, rng: random.Random) -> list[Decision]:
        """Return a decision for each of this rank's groups.

        Args:
            groups: As they were sampled.
            step: Batches trained on so far.
            rng: Source of random decisions.
        """

    def observe(self, groups: list[Group]) -> None:  # noqa: B027
        """Take note of the groups of all ranks, after the decisions on them."""

    def scalars(self, step: int) -> dict[str, float]:
        """Return what to report of the decisions of this step."""
        return {}

    def check_length(self, steps: float) -> None:  # noqa: B027
        """Raise if the gate does not know what to do for so many batches."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027
        """Take it over."""


@checked
class ConfidenceGate(Gate):
    """Open where the Beta posterior of a question's success rate lies below the threshold.

    Args:
        threshold: A number, for the same throughout, or a :class:`Threshold`.
        posterior: What is compared with it: the posterior's ``mean``, which is what the paper does, or a ``draw`` from it, which
            is Thompson sampling. A draw falls below 0.8 now and then even for a question that never fails (8 successes of 8:
            0.13 of the time).
        memory: How much the rollouts of a question's last visit count against this one's, those before it the square of that, and
            so on; null, as in the paper, for this visit alone. 1 counts all alike.

    Raises:
        ValueError: If a setting is out of range; names it.
    """

    def __init__(
        self,
        threshold: Positive | Threshold = 0.8,
        posterior: Literal["mean", "draw"] = "mean",
        memory: PositiveFraction | None = None,
    ) -> None:
        if not isinstance(threshold, Threshold):
            threshold = ConstantThreshold(threshold)
        self.threshold = threshold
        self.posterior = posterior
        self.memory = memory
        self.seen: dict[int, tuple[float, float]] = {}

    def counts(self, group: Group) -> tuple[float, float]:
        """Return successes and failures of a group's question, this group's with what is remembered of earlier ones."""
        successes, failures = self.seen.get(group.question, (0.0, 0.0))
        memory = self.memory or 0.0
        return memory * successes + group.successes, memory * failures + group.size - group.successes

    def decide(self, groups: list[Group], step: int, rng: random.Random) -> list[Decision]:
        """See :meth:`Gate.decide`."""
        threshold = self.threshold.value(step)
        decisions = []
        for group in groups:
            successes, failures = self.counts(group)
            if self.posterior == "draw":
                is_open = rng.betavariate(1 + successes, 1 + failures) < threshold
            else:
                is_open = confidence_below(successes, failures, threshold)
            decisions.append(Decision(is_open, confidence(successes, failures)))
        return decisions

    def observe(self, groups: list[Group]) -> None:
        """See :meth:`Gate.observe`."""
        self.threshold.observe(sum(group.successes for group in groups) / sum(group.size for group in groups))
        if self.memory is not None:
            self.seen |= {group.question: self.counts(group) for group in groups}

    def scalars(self, step: int) -> dict[str, float]:
        """Return the threshold."""
        return {"hapo/threshold": self.threshold.value(step)}

    def state_dict(self) -> dict[str, Any]:
        """Return the threshold's state and the counts of every question."""
        return {"threshold": self.threshold.state_dict(), "seen": dict(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.threshold.load_state_dict(state_dict["threshold"])
        self.seen = dict(state_dict["seen"])


@checked
class RandomGate(Gate):
    """Open for a group at random, whatever its successes: a control.

    Args:
        rate: Probability.

    Raises:
        ValueError: If it lies outside of [0, 1].
    """

    def __init__(self, rate: Fraction) -> None:
        self.fixed = rate

    def rate(self, step: int) -> float:
        """Return the probability in a step."""
        return self.fixed

    def decide(self, groups: list[Group], step: int, rng: random.Random) -> list[Decision]:
        """See :meth:`Gate.decide`."""
        rate = self.rate(step)
        return [
            Decision(rng.random() < rate, confidence(group.successes, group.size - group.successes)) for group in groups
        ]


@checked
class MatchedRandomGate(RandomGate):
    """Open at random as often as a recorded run's gate was in the same step: does it matter *which* groups get a demonstration?

    Args:
        run: The recorded run: its folder, or its ``run.json``.
        match: What is as frequent as in the record, in expectation: ``open`` gates (`hapo/gate_open`), some of which then fall on
            groups without a failure, where they change nothing; or ``injected`` demonstrations (`hapo/injected_groups`), which
            are drawn among the groups with a failure, all of them if there are too few.

    Raises:
        ValueError: If there is no such record, it lacks the curve of some step, or `match` is neither.
        MisconfigurationException: If this run has more batches than the record, or a resumed run meets another record than it
            began with.
    """

    def __init__(self, run: Text, match: Literal["open", "injected"] = "open") -> None:
        super().__init__(0.0)
        self.match = match
        curve = "hapo/gate_open" if match == "open" else "hapo/injected_groups"
        steps, rates = RunRecord.load(run).curves.get(curve, [[], []])
        if not steps or list(steps) != list(range(1, len(steps) + 1)):
            raise ValueError(
                f"Expected `run` to be a run of HAPO with `{curve}` of every step, but {run} has {len(steps)} of them. "
                "Record one with `trainer.log_every_n_steps` 1."
            )
        self.run, self.record = run, list(rates)

    def rate(self, step: int) -> float:
        """See :meth:`RandomGate.rate`."""
        self.check_length(step + 1)
        return self.record[step]

    def decide(self, groups: list[Group], step: int, rng: random.Random) -> list[Decision]:
        """See :meth:`Gate.decide`."""
        decisions = super().decide(groups, step, rng)
        if self.match == "open":
            return decisions
        failed = [group.successes < group.size for group in groups]
        rate = self.rate(step) * len(groups) / max(1, sum(failed))
        return [
            Decision(there and rng.random() < rate, decision.confidence)
            for there, decision in zip(failed, decisions, strict=True)
        ]

    def check_length(self, steps: float) -> None:
        """Refuse more batches than were recorded."""
        if steps > len(self.record):
            raise MisconfigurationException(
                f"Expected at most the {len(self.record)} batches that {self.run} recorded, but got {steps}. Lower "
                "`trainer.max_steps`, or record a longer run."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the record."""
        return {"record": list(self.record)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make sure that it is still the same."""
        if state_dict["record"] != self.record:
            raise MisconfigurationException(
                f"Expected {self.run} to be the record that this run began with, but it is another one. Start afresh."
            )
