"""Teachers with the weights that the student started from: frozen, and mixed with the live student (trust region)."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from transformers import PreTrainedModel

from pgpo_lightning.losses.logits import Source
from pgpo_lightning.models.loading import fingerprint
from pgpo_lightning.models.packing import PackedSequences
from pgpo_lightning.teachers.base import OwnWeights, live


class FrozenTeacher(OwnWeights):
    """The weights that the student started from. They are not saved: the checkpoint holds only their fingerprint.

    Args:
        student: The model whose current weights stay the teacher's.
        offload: See :class:`OwnWeights`.
        copies: See :class:`OwnWeights`.
    """

    field = "model.model` to the base model of the interrupted run"
    """Which setting has the weights, for messages."""

    def __init__(self, student: PreTrainedModel, offload: bool = False, *, copies: bool = True) -> None:
        super().__init__(student, offload, copies=copies)
        self.identity = fingerprint(self.model)
        self._register_state_dict_hook(self._leave_out_weights)
        self._register_load_state_dict_pre_hook(self._put_back_weights)

    def get_extra_state(self) -> dict[str, str]:
        """Return the fingerprint of the weights, for the checkpoint."""
        return {"identity": self.identity}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Check that a checkpoint was trained with the same teacher.

        Raises:
            MisconfigurationException: If its fingerprint differs.
        """
        if state["identity"] != self.identity:
            raise MisconfigurationException(
                f"Expected the checkpoint's frozen teacher ({state['identity']}) to be the configured model "
                f"({self.identity}), but their weights differ. Set `{self.field}."
            )

    @staticmethod
    def _leave_out_weights(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}model.")]:
            del state[name]

    def _put_back_weights(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        # A strict load must find no key missing, and none that is not a weight (the constants of quantised ones).
        model, kept = self.model, self.model.state_dict()
        pairs = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        state.update({f"{prefix}model.{name}": kept[name] for name, _ in pairs if name in kept})


class TrustRegionTeacher(FrozenTeacher):
    """A geometric mixture of the initial and the current student: ``lerp(initial logits, current logits, rate)``.

    Args:
        student: The model whose current weights are the fixed part of the mixture.
        rate: Weight of the current student's logits.
        offload: See :class:`OwnWeights`.
    """

    moves_with_student = True

    def __init__(self, student: PreTrainedModel, rate: float, offload: bool = False) -> None:
        super().__init__(student, offload)
        self.rate = rate

    @torch.no_grad()
    def sources(self, student: PreTrainedModel, sequences: PackedSequences) -> list[Source]:
        """See :meth:`Teacher.sources`."""
        return [self.own(sequences, 1 - self.rate), live(student, sequences, self.rate)]
