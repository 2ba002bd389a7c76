"""Whose weights the self-teacher has, and how they move (SDPO, arXiv 2601.20802)."""

import copy
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgpo_lightning.core.settings import AtLeastOne, Count, checked
from pgpo_lightning.core.types import Sample
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.fused import Head, Source
from pgpo_lightning.models.lm_head import head, source
from pgpo_lightning.models.loading import evaluating, fingerprint
from pgpo_lightning.models.lora import adapter, copy_adapter, decoder_with
from pgpo_lightning.models.offload import DeviceCopy
from pgpo_lightning.models.packing import Sequences

TeacherRegularization = Literal["ema", "frozen", "live", "trust-region", "restart", "gated"]


class Teacher(nn.Module):
    """A self-teacher: gives hidden states for the reprompted sequences and follows the student after each step.

    Attributes:
        moves_with_student: Whether every optimizer step of the student changes what the teacher says. If not, it has a
            `model` of its own, which moves in :meth:`update` alone.
    """

    moves_with_student = False

    @abstractmethod
    def sources(self, student: PreTrainedModel, sequences: Sequences) -> list[Source]:
        """Return the teacher's hidden states and heads at the response tokens, without gradient.

        Args:
            student: The model being trained.
            sequences: Reprompts with the student's responses.
        """

    def head(self, student: PreTrainedModel) -> Head:
        """Return the head that belongs to the hidden states of a teacher that stands still within a batch."""
        return head(self.model)

    def observe(self, rows: list[Sample]) -> None:
        """See this rank's rollouts of a step, before the step. All ranks call it equally often."""

    def update(self, student: PreTrainedModel) -> None:
        """Move after an optimizer step. Called once per training step, and only if a step was taken."""

    def release(self) -> None:
        """Free what was made for :meth:`sources` alone. Called when the gradients of an optimizer step are there."""


def live(student: PreTrainedModel, sequences: Sequences, weight: float = 1.0) -> Source:
    """Return what the student says as a teacher: without dropout, which would be another teacher for every token."""
    with evaluating(student):
        return source(student, sequences, weight)


class LiveTeacher(Teacher):
    """The student itself, seeing the feedback. Holds no copy of the weights."""

    moves_with_student = True

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: Sequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        return [live(student, sequences)]


class OwnWeights(Teacher):
    """A teacher with a model of its own, which is another one than the student from the first step on.

    Args:
        student: The model whose weights, as they are now, are the starting point.
        offload: Keep the weights in the host's memory. The student's device gets copies for :meth:`sources`, which stay until
            :meth:`release`.
    """

    def __init__(self, student: PreTrainedModel, offload: bool = False) -> None:
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False)
        if offload:
            self.model.cpu()
        self.device_copy = DeviceCopy(self.model) if offload else None
        self.train(False)

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: Sequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        return [self.own(sequences)]

    def own(self, sequences: Sequences, weight: float = 1.0) -> Source:
        """Return what these weights say, as a part of a mixture."""
        if self.device_copy is None:
            return source(self.model, sequences, weight)
        return self.device_copy.source(sequences, weight)

    def head(self, student: PreTrainedModel) -> Head:
        """See :meth:`Teacher.head`."""
        return head(self.model) if self.device_copy is None else self.device_copy.head(head(student).weight.device)

    def release(self) -> None:
        """See :meth:`Teacher.release`."""
        if self.device_copy is not None:
            self.device_copy.free()

    def train(self, mode: bool = True) -> "OwnWeights":
        """Stay in evaluation mode: a teacher with dropout would be another teacher for every token."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OwnWeights":
        if self.device_copy is None:
            return super()._apply(fn, recurse)
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).dtype), recurse)  # another type, but no other place


class EMATeacher(OwnWeights):
    """An exponential moving average of the student, in fp32, saved with the checkpoint.

    ``theta_T <- (1 - rate) theta_T + rate theta_S`` over the parameters, once per training step. In bf16 most of these
    increments would round to nothing.

    Args:
        student: The model whose weights, as they are now, are the starting point.
        rate: How far the teacher moves towards the student per step.
        offload: See :class:`OwnWeights`. The average is then taken on the host.
    """

    def __init__(self, student: PreTrainedModel, rate: float, offload: bool = False) -> None:
        super().__init__(student, offload)
        self.rate = rate
        self.model.to(self.dtype(student))

    def dtype(self, student: PreTrainedModel) -> torch.dtype:
        """Return the type of the weights."""
        return torch.float32

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        """See :meth:`Teacher.update`."""
        for mine, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.device, mine.dtype), self.rate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EMATeacher":
        # Lightning's half precision converts the whole module. Follow it to the device, but keep fp32.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)


class FrozenTeacher(OwnWeights):
    """The weights that the student started from. Not saved: the checkpoint holds their fingerprint only.

    Args:
        student: The model whose weights, as they are now, stay the teacher's.
        offload: See :class:`OwnWeights`.
    """

    def __init__(self, student: PreTrainedModel, offload: bool = False) -> None:
        super().__init__(student, offload)
        self.identity = fingerprint(self.model)
        self._register_state_dict_hook(self._leave_out_weights)
        self._register_load_state_dict_pre_hook(self._put_back_weights)

    def get_extra_state(self) -> dict[str, str]:
        """Return the identity of the weights, for the checkpoint."""
        return {"identity": self.identity}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Check that a checkpoint was trained with this very teacher.

        Raises:
            MisconfigurationException: If it was another one.
        """
        if state["identity"] != self.identity:
            raise MisconfigurationException(
                f"Expected the checkpoint's frozen teacher ({state['identity']}) to be the configured model "
                f"({self.identity}), but their weights differ. Set `model.model` to the base model of the interrupted run."
            )

    @staticmethod
    def _leave_out_weights(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}model.")]:
            del state[name]

    def _put_back_weights(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        # So that a strict load finds nothing missing.
        state.update({f"{prefix}model.{name}": tensor for name, tensor in self.model.state_dict().items()})


class TrustRegionTeacher(FrozenTeacher):
    """A geometric mixture of the frozen start and the live student: ``lerp(start logits, student logits, rate)``.

    Args:
        student: The model whose weights, as they are now, are the fixed end of the mixture.
        rate: Weight of the live student's logits.
        offload: See :class:`OwnWeights`.
    """

    moves_with_student = True

    def __init__(self, student: PreTrainedModel, rate: float, offload: bool = False) -> None:
        super().__init__(student, offload)
        self.rate = rate

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: Sequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        return [self.own(sequences, 1 - self.rate), live(student, sequences, self.rate)]


class FrozenAdapterTeacher(Teacher):
    """The student's model with the adapter that it started from; if that was a fresh one, exactly the base model.

    Holds the matrices of an adapter, in fp32, and no other weights: they stand in for the student's during a forward pass.

    Args:
        student: The model with an adapter whose matrices, as they are now, stay the teacher's.
    """

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.model = copy_adapter(student)

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: Sequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        return [Source(self._hidden_states(student, sequences), head(student))]

    def head(self, student: PreTrainedModel) -> Head:
        """See :meth:`Teacher.head`. The head has no adapter."""
        return head(student)

    def _hidden_states(self, student: PreTrainedModel, sequences: Sequences) -> Tensor:
        with evaluating(student):
            mine = dict(self.model.named_parameters())
            return sequences.hidden_states(decoder_with(student, mine), student.config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenAdapterTeacher":
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # as EMATeacher: keep fp32


class EMAAdapterTeacher(FrozenAdapterTeacher):
    """An exponential moving average of the student's adapter, matrix by matrix, from the student's own start.

    The average of ``B A`` is not the product of the averages; how far they are apart is in ``docs/lora.md``.

    Args:
        student: The model with an adapter whose matrices, as they are now, are the starting point.
        rate: How far the teacher moves towards the student per step.
    """

    def __init__(self, student: PreTrainedModel, rate: float) -> None:
        super().__init__(student)
        self.rate = rate

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        """See :meth:`Teacher.update`."""
        theirs = adapter(student)
        for name, mine in self.model.named_parameters():
            mine.lerp_(theirs[name].to(mine.dtype), self.rate)


class TrustRegionAdapterTeacher(FrozenAdapterTeacher):
    """A geometric mixture of the student at its start and the live student, as :class:`TrustRegionTeacher`.

    Args:
        student: The model with an adapter whose matrices, as they are now, are the fixed end of the mixture.
        rate: Weight of the live student's logits.
    """

    moves_with_student = True

    def __init__(self, student: PreTrainedModel, rate: float) -> None:
        super().__init__(student)
        self.rate = rate

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: Sequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        start = Source(self._hidden_states(student, sequences), head(student), 1 - self.rate)
        return [start, live(student, sequences, self.rate)]


class Periodic(Teacher):
    """Restart-and-freeze: moves every `period` steps, by what a moving average would have moved in as many, and stands between.

    ``theta_T <- (1 - g) theta_T + g theta_S`` with ``g = 1 - (1 - rate)^period`` ("Denser is not better", arXiv 2607.01763). At
    rate 1 it is a hard copy every `period` steps. A mixin, before an averaging teacher.

    Args:
        student: See :class:`EMATeacher`.
        rate: Per step.
        period: Steps.
        kwargs: Of the averaging teacher.
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
        """Return the steps so far, for the checkpoint."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps = state["steps"]


class RestartTeacher(Periodic, EMATeacher):
    """Restart-and-freeze over all weights, in fp32, saved with the checkpoint."""


class RestartAdapterTeacher(Periodic, EMAAdapterTeacher):
    """Restart-and-freeze over an adapter's matrices."""


@partial(checked, prefix="teacher_gate.")
@dataclass(frozen=True)
class RefreshGate:
    """When the teacher of CGTR becomes a copy of the student (arXiv 2606.03532).

    If ``t - t_last >= min_steps`` and the mean reward of the last `window` steps exceeds ``r_ref + reward_gain`` and the longest
    response of these steps is at most `max_length_ratio` times the mean one. r_ref is the window's mean reward at the last copy;
    before the first, where the paper is silent, that of the first `window` steps.

    Args:
        min_steps: M_min.
        window: w, steps.
        reward_gain: delta_r.
        max_length_ratio: L_max.
        check_every: Steps between two looks.

    Raises:
        ValueError: If a setting is out of range.
    """

    min_steps: Count = 30
    window: Count = 5
    reward_gain: float = 0.05
    max_length_ratio: AtLeastOne = 3.2
    check_every: Count = 5


class Outcome(NamedTuple):
    """What the rollouts of a step, of all ranks, came to: mean reward, longest and mean response in tokens."""

    reward: float
    longest: int
    length: float


class Gated(Teacher):
    """CGTR: a copy of the student is taken when it has become better and does not ramble; see :class:`RefreshGate`.

    A mixin, before an averaging teacher.

    Args:
        student: See :class:`EMATeacher`.
        gate: When.
        kwargs: Of the averaging teacher.
    """

    def __init__(self, student: PreTrainedModel, gate: RefreshGate, **kwargs: Any) -> None:
        super().__init__(student, 1.0, **kwargs)
        self.gate = gate
        self.steps = self.last = 0
        self.reference: float | None = None
        self.seen: deque[Outcome] = deque(maxlen=gate.window)

    def observe(self, rows: list[Sample]) -> None:
        """See :meth:`Teacher.observe`."""
        everyone = [pair for part in gather([(row.verdict.reward, row.length) for row in rows]) for pair in part]
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
        """Return what the gate goes by, for the checkpoint."""
        seen = [tuple(outcome) for outcome in self.seen]
        return {"steps": self.steps, "last": self.last, "reference": self.reference, "seen": seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps, self.last, self.reference = state["steps"], state["last"], state["reference"]
        self.seen = deque((Outcome(*outcome) for outcome in state["seen"]), maxlen=self.gate.window)


class GatedTeacher(Gated, EMATeacher):
    """CGTR over all weights, in the student's type, saved with the checkpoint."""

    def dtype(self, student: PreTrainedModel) -> torch.dtype:
        """Return the student's: what is only ever copied loses nothing."""
        return next(student.parameters()).dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GatedTeacher":
        return OwnWeights._apply(self, fn, recurse)  # converted as the student is


class GatedAdapterTeacher(Gated, EMAAdapterTeacher):
    """CGTR over an adapter's matrices."""


def make_teacher(
    kind: TeacherRegularization,
    student: PreTrainedModel,
    rate: float,
    period: int = 10,
    gate: RefreshGate | None = None,
    offload: bool = False,
) -> Teacher:
    """Build the teacher that a configuration names, from the student's weights, or its adapter, as they are now."""
    if kind == "live":
        return LiveTeacher()
    whole, adapted, settings = {
        "frozen": (FrozenTeacher, FrozenAdapterTeacher, {}),
        "ema": (EMATeacher, EMAAdapterTeacher, {"rate": rate}),
        "trust-region": (TrustRegionTeacher, TrustRegionAdapterTeacher, {"rate": rate}),
        "restart": (RestartTeacher, RestartAdapterTeacher, {"rate": rate, "period": period}),
        "gated": (GatedTeacher, GatedAdapterTeacher, {"gate": gate or RefreshGate()}),
    }[kind]
    return adapted(student, **settings) if adapter(student) else whole(student, offload=offload, **settings)
