"""Weight sync: detects changes of the student's weights, and converts them for an engine with a copy of its own."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def checksum(model: PreTrainedModel) -> list[int]:
    """Return the sum of every tensor's bits, read as integers, which changes with the weights.

    The tensors' version counters would not do: some optimizers do not change them (AdamW with ``fused``, bitsandbytes), and the
    sampler would keep old weights. The sums take one pass over the weights, on their device.
    """
    tensors = [tensor.detach().reshape(-1) for tensor in model.state_dict().values()]
    sums = [tensor.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums).tolist()  # one synchronisation with the device


def checkpoint_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights with the names and shapes of a checkpoint on disk. Tensors are copied only where these differ.

    A head that is tied to the embedding is included. ``save_pretrained`` omits it, and a sampler whose kernels keep a packed copy
    of the head (vLLM on a CPU) would reload all weights except the head.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, {name: tensor.detach() for name, tensor in model.state_dict().items()})


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write configuration and :func:`checkpoint_weights` into a folder, replacing earlier files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # missing if the model was created from a configuration
    config.save_pretrained(folder)
    tensors, seen = {}, set()
    for name, tensor in checkpoint_weights(model).items():
        tied = tensor.data_ptr() in seen  # the file format allows one name per memory
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if tied else tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
