"""Teachers of a student with an adapter: they hold an adapter of their own, and share the base weights with the student."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pgpo_lightning.losses.logits import Head, Source
from pgpo_lightning.models.adapter import adapter, copy_adapter, other_adapter
from pgpo_lightning.models.lm_head import decoder, head
from pgpo_lightning.models.loading import evaluating
from pgpo_lightning.models.packing import PackedSequences
from pgpo_lightning.teachers.base import Teacher, live


class FrozenAdapterTeacher(Teacher):
    """The student's model with the adapter that it started from. With a new adapter that is exactly the base model.

    It holds the layers of an adapter in fp32 and no other weights. They replace the student's adapter during a forward pass.

    Args:
        student: A model with an adapter, whose current matrices stay the teacher's.
    """

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.model = copy_adapter(student)

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: PackedSequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        return [Source(self._hidden_states(student, sequences), head(student))]

    def head(self, student: PreTrainedModel) -> Head:
        """See :meth:`Teacher.head`. It is the student's, because the head has no adapter."""
        return head(student)

    def _hidden_states(self, student: PreTrainedModel, sequences: PackedSequences) -> Tensor:
        with evaluating(student), other_adapter(student, self.model):
            return sequences.hidden_states(decoder(student), student.config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)  # stays in fp32, as EMATeacher


class EMAAdapterTeacher(FrozenAdapterTeacher):
    """An exponential moving average of the student's adapter, matrix by matrix.

    The average of ``B A`` is not the product of the averages. ``docs/lora.md`` measures the difference.

    Args:
        student: A model with an adapter, whose current matrices are the starting point.
        rate: Weight of the student in each update.
    """

    def __init__(self, student: PreTrainedModel, rate: float) -> None:
        super().__init__(student)
        self.rate = rate

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        """See :meth:`Teacher.update`."""
        matrices = adapter(student)
        for name, own in self.model.named_parameters():
            own.lerp_(matrices[name].to(own.dtype), self.rate)


class TrustRegionAdapterTeacher(FrozenAdapterTeacher):
    """A geometric mixture of the initial and the current student, as :class:`~pgpo_lightning.teachers.frozen.TrustRegionTeacher`.

    Args:
        student: A model with an adapter, whose current matrices are the fixed part of the mixture.
        rate: Weight of the current student's logits.
    """

    moves_with_student = True

    def __init__(self, student: PreTrainedModel, rate: float) -> None:
        super().__init__(student)
        self.rate = rate

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: PackedSequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        start = Source(self._hidden_states(student, sequences), head(student), 1 - self.rate)
        return [start, live(student, sequences, self.rate)]
