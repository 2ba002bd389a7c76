"""The exponential moving average of the student as teacher (SDPO, arXiv 2601.20802)."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pgpo_lightning.teachers.base import OwnWeights


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
