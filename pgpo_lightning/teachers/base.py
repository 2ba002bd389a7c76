"""The interface of a self-teacher, and the two simplest: the student itself, and a teacher with weights of its own."""

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgpo_lightning.core.buffers import keeping_buffers
from pgpo_lightning.core.types import Sample
from pgpo_lightning.losses.logits import Head, Source
from pgpo_lightning.models.lm_head import head, source
from pgpo_lightning.models.loading import evaluating
from pgpo_lightning.models.offload import DeviceCopy
from pgpo_lightning.models.packing import PackedSequences, Packing

TeacherRegularization = Literal["ema", "frozen", "live", "trust-region", "restart", "gated"]
TeacherKind = TeacherRegularization | Literal["external"]
"""What a teacher's weights are: one of the above, made of the student's, or those of another model."""


class Teacher(nn.Module):
    """A self-teacher: computes hidden states for the reprompted sequences, and follows the student after each step.

    Attributes:
        moves_with_student: Whether every optimizer step of the student changes the teacher's predictions. If not, the teacher has
            a `model` of its own, which changes in :meth:`update` only.
        external: Whether the weights are another model's, so that teacher and student differ from the start.
        packing: Layout of its sequences; ``None`` for that of the student in evaluation mode.
    """

    moves_with_student = False
    external = False
    packing: Packing | None = None

    @abstractmethod
    def sources(self, student: PreTrainedModel, sequences: PackedSequences) -> list[Source]:
        """Return the teacher's hidden states and heads at the response tokens, without gradient.

        Args:
            student: The model being trained.
            sequences: Reprompts with the student's responses.
        """

    def head(self, student: PreTrainedModel) -> Head:
        """Return the head for hidden states of an earlier pass. Only for teachers that do not move with the student.

        Raises:
            NotImplementedError: If the teacher moves with the student.
        """
        raise NotImplementedError(f"{type(self).__name__} moves with the student.")

    def observe(self, samples: list[Sample]) -> None:
        """Receive this rank's rollouts of a step, before the step. All ranks call it equally often."""

    def update(self, student: PreTrainedModel) -> None:
        """Update the teacher after an optimizer step. Called once per training step, and only if a step was taken."""

    def release(self) -> None:
        """Release what was allocated for :meth:`sources`. Called when the gradients of an optimizer step are complete."""


def live(student: PreTrainedModel, sequences: PackedSequences, weight: float = 1.0) -> Source:
    """Return the student's own predictions as a teacher, without dropout, which would change the teacher at every token."""
    with evaluating(student):
        return source(student, sequences, weight)


class LiveTeacher(Teacher):
    """The student itself, conditioned on the feedback. Holds no copy of the weights."""

    moves_with_student = True

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: PackedSequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        return [live(student, sequences)]


class OwnWeights(Teacher):
    """A teacher with a model of its own, which differs from the student from the first step on.

    Args:
        student: The model whose current weights are the starting point.
        offload: Keep the weights in host memory. The student's device holds copies from :meth:`sources` until :meth:`release`.
        copies: Whether the teacher has a copy of the model. If not, the model becomes the teacher.
    """

    def __init__(self, student: PreTrainedModel, offload: bool = False, *, copies: bool = True) -> None:
        super().__init__()
        self.model = (copy.deepcopy(student) if copies else student).requires_grad_(False)
        if offload:
            self.model.cpu()
        self.device_copy = DeviceCopy(self.model) if offload else None
        self.train(False)

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: PackedSequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        return [self.own(sequences)]

    def own(self, sequences: PackedSequences, weight: float = 1.0) -> Source:
        """Return the predictions of these weights, as a part of a mixture.

        Args:
            sequences: Reprompts with the student's responses.
            weight: Weight of the logits in the mixture.
        """
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

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: with dropout the teacher would change at every token."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.device_copy is None:
            return super()._apply(fn, recurse)
        changed = keeping_buffers(self, lambda t: t.to(fn(t.new_empty(0)).dtype))  # the dtype, not the device
        return super()._apply(changed, recurse)
