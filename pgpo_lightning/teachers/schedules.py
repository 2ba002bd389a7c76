"""Teachers that move at some steps only: every few steps (restart-and-freeze), or when a gate opens (CGTR)."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import AtLeastOne, Count, checked
from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.teachers.base import OwnWeights, Teacher
from pgpo_lightning.teachers.ema import EMATeacher
from pgpo_lightning.teachers.lora import EMAAdapterTeacher


class Periodic(Teacher):
    """Restart-and-freeze: updates every `period` steps, as far as a moving average would have moved, and stays fixed in between.

    ``theta_T <- (1 - g) theta_T + g theta_S`` with ``g = 1 - (1 - rate)^period`` ("Denser is not better", arXiv 2607.01763). At
    rate 1 this copies the student every `period` steps. This is a mixin, to be listed before an averaging teacher.

    Args:
        student: See :class:`EMATeacher`.
        rate: Weight of the student per step.
        period: Steps between two updates.
        kwargs: Further arguments of the averaging teacher.
    """

    def __init__(self, student: PreTrainedModel, rate: float, period: int, **kwargs: Any) -> None:
        super().__init__(student, 1 - (1 - rate) ** period, **kwargs)
        self.period = period
        self.steps = 0

    def update(self, student: PreTrainedModel) -> None:
        """See :meth:`Teacher.update`."""
        self.steps += 1
        if self.steps % self.period == 0:
            super().update(student)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of steps, for the checkpoint."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the number of steps."""
        self.steps = state["steps"]


class RestartTeacher(Periodic, EMATeacher):
    """Restart-and-freeze for all weights, in fp32, saved with the checkpoint."""


class RestartAdapterTeacher(Periodic, EMAAdapterTeacher):
    """Restart-and-freeze for the matrices of an adapter."""


@partial(checked, prefix="teacher.gate.")
@dataclass(frozen=True)
class RefreshGate:
    """Conditions under which the teacher of CGTR becomes a copy of the student (arXiv 2606.03532).

    All three must hold: ``t - t_last >= min_steps``; the mean reward of the last `window` steps exceeds ``r_ref + reward_gain``;
    the longest response of these steps is at most `max_length_ratio` times the mean length. r_ref is the window's mean reward at
    the last copy. Before the first copy it is unspecified in the paper; we chose the mean reward of the first `window` steps.

    Args:
        min_steps: Minimum steps between two copies, M_min.
        window: Steps of the window, w.
        reward_gain: Required gain of the mean reward, delta_r.
        max_length_ratio: Maximum ratio of the longest to the mean response length, L_max.
        check_every: Steps between two checks.

    Raises:
        ValueError: If a setting is out of range.
    """

    min_steps: Count = 30
    window: Count = 5
    reward_gain: float = 0.05
    max_length_ratio: AtLeastOne = 3.2
    check_every: Count = 5


class Outcome(NamedTuple):
    """Summary of the rollouts of a step, of all ranks.

    Attributes:
        reward: Mean reward.
        longest: Tokens of the longest response.
        length: Mean tokens of a response.
    """

    reward: float
    longest: int
    length: float


class Gated(Teacher):
    """CGTR: copies the student when its reward has improved and its responses are not too long; see :class:`RefreshGate`.

    This is a mixin, to be listed before an averaging teacher.

    Args:
        student: See :class:`EMATeacher`.
        gate: Conditions of a copy.
        kwargs: Further arguments of the averaging teacher.
    """

    def __init__(self, student: PreTrainedModel, gate: RefreshGate, **kwargs: Any) -> None:
        super().__init__(student, 1.0, **kwargs)
        self.gate = gate
        self.steps = self.last = 0
        self.reference: float | None = None
        self.seen: deque[Outcome] = deque(maxlen=gate.window)

    def observe(self, samples: list[Sample]) -> None:
        """See :meth:`Teacher.observe`."""
        local = [(sample.verdict.reward, sample.length) for sample in samples]
        everyone = [pair for part in gather(local) for pair in part]
        rewards, lengths = zip(*everyone, strict=True)
        self.seen.append(Outcome(sum(rewards) / len(rewards), max(lengths), sum(lengths) / len(lengths)))
        if self.reference is None and len(self.seen) == self.gate.window:
            self.reference = self._reward()

    def update(self, student: PreTrainedModel) -> None:
        """See :meth:`Teacher.update`."""
        self.steps += 1
        if self.steps % self.gate.check_every == 0 and self._opens():
            super().update(student)
            self.last, self.reference = self.steps, self._reward()

    def _opens(self) -> bool:
        if self.reference is None or self.steps - self.last < self.gate.min_steps:
            return False
        ratio = max(seen.longest for seen in self.seen) / (sum(seen.length for seen in self.seen) / len(self.seen))
        gained = self._reward() > self.reference + self.gate.reward_gain
        return gained and ratio <= self.gate.max_length_ratio

    def _reward(self) -> float:
        return sum(seen.reward for seen in self.seen) / len(self.seen)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the gate, for the checkpoint."""
        seen = [tuple(outcome) for outcome in self.seen]
        return {"steps": self.steps, "last": self.last, "reference": self.reference, "seen": seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the gate."""
        self.steps, self.last, self.reference = state["steps"], state["last"], state["reference"]
        self.seen = deque((Outcome(*outcome) for outcome in state["seen"]), maxlen=self.gate.window)


class GatedTeacher(Gated, EMATeacher):
    """CGTR for all weights, in the student's dtype, saved with the checkpoint."""

    def dtype(self, student: PreTrainedModel) -> torch.dtype:
        """Return the student's dtype: weights that are copied, not averaged, lose no precision."""
        return next(student.parameters()).dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return OwnWeights._apply(self, fn, recurse)  # converted like the student


class GatedAdapterTeacher(Gated, EMAAdapterTeacher):
    """CGTR for the matrices of an adapter."""
