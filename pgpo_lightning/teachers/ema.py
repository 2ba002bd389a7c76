"""The exponential moving average of the student as teacher (SDPO, arXiv 2601.20802)."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgpo_lightning.teachers.base import OwnWeights


class EMATeacher(OwnWeights):
    """An exponential moving average of the student, in fp32, saved with the checkpoint.

    ``theta_T <- (1 - rate) theta_T + rate theta_S`` for all parameters, once per training step. In bf16 most of these increments
    would be rounded away.

    Args:
        student: The model whose current weights are the starting point.
        rate: Weight of the student in each update.
        offload: See :class:`OwnWeights`. The average is then computed on the host.
    """

    def __init__(self, student: PreTrainedModel, rate: float, offload: bool = False) -> None:
        super().__init__(student, offload)
        self.rate = rate
        weights: nn.Module = self.model
        weights.to(self.dtype(student))

    def dtype(self, student: PreTrainedModel) -> torch.dtype:
        """Return the dtype of the teacher's weights."""
        return torch.float32

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        """See :meth:`Teacher.update`."""
        for own, new in zip(self.model.parameters(), student.parameters(), strict=True):
            own.lerp_(new.to(own.device, own.dtype), self.rate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Lightning's half precision converts the whole module. The teacher follows to the device, but stays in fp32.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)
