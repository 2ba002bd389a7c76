"""Teachers of a student with an adapter: they hold an adapter of their own, and share the base weights with the student."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pgpo_lightning.losses.fused import Head, Source
from pgpo_lightning.models.lm_head import head
from pgpo_lightning.models.loading import evaluating
from pgpo_lightning.models.lora import adapter, copy_adapter, decoder_with
from pgpo_lightning.models.packing import Sequences
from pgpo_lightning.teachers.base import Teacher, live


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
