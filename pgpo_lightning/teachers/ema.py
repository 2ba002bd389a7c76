"""The exponential moving average of the student as teacher (SDPO, arXiv 2601.20802)."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgpo_lightning.core.buffers import keeping_buffers
from pgpo_lightning.core.seeding import derive_seed
from pgpo_lightning.models.rounding import lerp_rounded_
from pgpo_lightning.teachers.base import OwnWeights


class EMATeacher(OwnWeights):
    """An exponential moving average of the student, in fp32, saved with the checkpoint.

    ``theta_T <- (1 - rate) theta_T + rate theta_S`` for all parameters, once per training step. In bf16, rounded to nearest, most
    of these increments would be lost; see :class:`NarrowEMATeacher`.

    Args:
        student: The model whose current weights are the starting point.
        rate: Weight of the student in each update.
        offload: See :class:`OwnWeights`. The average is then computed on the host.
    """

    def __init__(self, student: PreTrainedModel, rate: float, offload: bool = False) -> None:
        super().__init__(student, offload)
        self.rate = rate
        dtype = self.dtype(student)
        weights: nn.Module = self.model
        weights._apply(keeping_buffers(weights, lambda t: t.to(dtype) if t.is_floating_point() else t))

    def dtype(self, student: PreTrainedModel) -> torch.dtype:
        """Return the dtype of the teacher's weights."""
        return torch.float32

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        """See :meth:`Teacher.update`."""
        for own, new in zip(self.model.parameters(), student.parameters(), strict=True):
            own.lerp_(new.to(own.device, own.dtype), self.rate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Lightning's half precision converts the whole module. The teacher follows to the device, but keeps its type.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)


class NarrowEMATeacher(EMATeacher):
    """The same average with weights of two bytes, bf16. Every update is computed in fp32 and rounded stochastically.

    The mean of the rounding errors is zero, and the average forgets those of earlier updates, so that the weights stay near the
    fp32 average; ``docs/scaling.md`` measures it. The random numbers are a function of the number of updates and of the place of
    a weight: equal on all ranks, however the weights are sharded, and in a resumed run. Every run has the same ones.

    Args:
        student: See :class:`EMATeacher`.
        rate: See :class:`EMATeacher`.
        offload: See :class:`OwnWeights`. The average is then computed on the student's device, a slice of a parameter at a time.
    """

    def __init__(self, student: PreTrainedModel, rate: float, offload: bool = False) -> None:
        super().__init__(student, rate, offload)
        self.updates = 0

    def dtype(self, student: PreTrainedModel) -> torch.dtype:
        """See :meth:`EMATeacher.dtype`."""
        return torch.bfloat16

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        """See :meth:`Teacher.update`."""
        self.updates += 1
        for i, (own, new) in enumerate(zip(self.model.parameters(), student.parameters(), strict=True)):
            lerp_rounded_(own, new, self.rate, derive_seed("teacher", self.updates, i))

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of updates, for the checkpoint."""
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the number of updates."""
        self.updates = state["updates"]
