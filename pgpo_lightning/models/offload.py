"""A teacher's weights in the host's memory, with copies on the student's device while gradients are made and at no other time."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from pgpo_lightning.losses.fused import Head, Source
from pgpo_lightning.models.lm_head import decoder, head
from pgpo_lightning.models.packing import Sequences, SharedSequences


class DeviceCopy:
    """Copies of a model's weights on another device; made when they are first asked for, gone with :meth:`free`.

    Under autocast the matrices of linear layers are copied in the type that autocast would give them for every product, so
    that the result is the same to the last bit; everything else keeps its type.

    Args:
        model: Whose weights stay where they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.copies: dict[Tensor, Tensor] = {}

    def source(self, sequences: Sequences | SharedSequences, weight: float = 1.0) -> Source:
        """Do what :func:`pgpo_lightning.models.lm_head.source` does, on the device of the sequences."""
        part, device = decoder(self.model), sequences.targets.device
        linear = {module.weight for module in part.modules() if isinstance(module, nn.Linear)}
        tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        here = {name: self._copy(tensor, device, tensor in linear) for name, tensor in tensors.items()}
        hidden = sequences.hidden_states(lambda **inputs: functional_call(part, here, (), inputs), self.model.config)
        return Source(hidden, self.head(device), weight)

    def head(self, device: torch.device) -> Head:
        """Return the model's head, on a device."""
        there = head(self.model)
        tied = there.weight is self.model.get_input_embeddings().weight
        return replace(there, weight=self._copy(there.weight, device, narrow=not tied))

    def _copy(self, tensor: Tensor, device: torch.device, narrow: bool) -> Tensor:
        if tensor not in self.copies:
            autocast = narrow and torch.is_autocast_enabled(device.type)
            # There first and then narrower: the device is the faster of the two at it.
            there = tensor.detach().to(device)
            self.copies[tensor] = there.to(torch.get_autocast_dtype(device.type)) if autocast else there
        return self.copies[tensor]

    def free(self) -> None:
        """Free the copies."""
        self.copies.clear()
