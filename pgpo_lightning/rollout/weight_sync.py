"""The student's weights on their way to a sampler that has weights of its own: have they changed, and as what do they travel?"""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def checksum(model: PreTrainedModel) -> list[int]:
    """Return the sum of every tensor's bits, read as integers: other weights, other sums.

    Not the tensors' version counters, which some optimizers leave alone (AdamW with ``fused``, bitsandbytes): a sampler that
    trusted them would sample from old weights. One pass over the weights, on the device where they are.
    """
    tensors = [tensor.detach().reshape(-1) for tensor in model.state_dict().values()]
    sums = [tensor.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums).tolist()  # one wait for the device


def checkpoint_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights under the names and in the shapes of a checkpoint on disk; no copies where these are the model's own.

    A head that is tied to the embedding is there as well. ``save_pretrained`` leaves it out, and a sampler whose kernels keep
    a packed copy of the head (vLLM on a CPU) then reloads everything else and goes on with the old head.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, {name: tensor.detach() for name, tensor in model.state_dict().items()})


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write configuration and :func:`checkpoint_weights` into a folder, over what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # a model that was made from a configuration does not say what it is
    config.save_pretrained(folder)
    tensors, seen = {}, set()
    for name, tensor in checkpoint_weights(model).items():
        again = tensor.data_ptr() in seen  # tied: the format refuses two names for one memory
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if again else tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
