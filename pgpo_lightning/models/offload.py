"""A teacher's weights in host memory, with copies on the student's device only while gradients are computed."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from pgpo_lightning.losses.logits import Head, Source
from pgpo_lightning.models.lm_head import decoder, head
from pgpo_lightning.models.packing import PackedSequences


class DeviceCopy:
    """Copies of a model's weights on another device, made on first use and released by :meth:`free`.

    Under autocast the matrices of linear layers are copied in the dtype to which autocast casts them for every product, so the
    result is the same bit for bit. All other tensors keep their dtype.

    Args:
        model: The model. Its own weights are not moved.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.copies: dict[Tensor, Tensor] = {}

    def source(self, sequences: PackedSequences, weight: float = 1.0) -> Source:
        """Return what :func:`pgpo_lightning.models.lm_head.source` does, computed on the device of the sequences."""
        part, device = decoder(self.model), sequences.targets.device
        linear = {module.weight for module in part.modules() if isinstance(module, nn.Linear)}
        tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        copies = {name: self._copy(tensor, device, tensor in linear) for name, tensor in tensors.items()}
        hidden = sequences.hidden_states(lambda **inputs: functional_call(part, copies, (), inputs), self.model.config)
        return Source(hidden, self.head(device), weight)

    def head(self, device: torch.device) -> Head:
        """Return the model's head, with its weight on the device."""
        own = head(self.model)
        tied = own.weight is self.model.get_input_embeddings().weight
        return replace(own, weight=self._copy(own.weight, device, narrow=not tied))

    def _copy(self, tensor: Tensor, device: torch.device, narrow: bool) -> Tensor:
        if tensor not in self.copies:
            autocast = narrow and torch.is_autocast_enabled(device.type)
            # Copied first and narrowed afterwards, because the device converts faster than the host.
            copy = tensor.detach().to(device)
            self.copies[tensor] = copy.to(torch.get_autocast_dtype(device.type)) if autocast else copy
        return self.copies[tensor]

    def free(self) -> None:
        """Release the copies."""
        self.copies.clear()
