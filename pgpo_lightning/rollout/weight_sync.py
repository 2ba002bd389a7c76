"""Weight sync: detects changes of the student's weights, and streams them to an engine with a copy of its own.

Wherever the weights live (replicated, sharded by FSDP2, under an adapter), the stream has the names and shapes of the whole
model's checkpoint, in the same order on every rank. Beyond the model it holds the tensors of one layer.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.distributed.fsdp import full_tensor, local_tensor
from pgpo_lightning.models.adapter import is_adapter, plain_weight

T = TypeVar("T")

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_LAYER = re.compile(r"^.*?\.\d+\.")  # the name of a weight as far as the number of its layer


def is_sharded(model: nn.Module) -> bool:
    """Return whether weights of a model are sharded over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def checksum(model: PreTrainedModel, adapted: bool = True) -> list[int]:
    """Return the sum of every tensor's bits, read as integers, which changes with the weights.

    The tensors' version counters would not do: some optimizers do not change them (AdamW with ``fused``, bitsandbytes), and the
    sampler would keep old weights. The sums take one pass over the weights, on their device. Each rank sums its part of sharded
    weights, and the sums of all ranks are returned: then every rank must call it.

    Args:
        model: The student.
        adapted: With the matrices of an adapter.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if adapted or not is_adapter(name)}
    tensors = [local_tensor(tensor.detach()).reshape(-1) for tensor in state.values()]
    sums = [tensor.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]
    local: list[int] = torch.stack(sums).tolist()  # one synchronisation with the device
    return [each for sums in gather(local) for each in sums] if is_sharded(model) else local


def stream_weights(
    model: PreTrainedModel, dtype: torch.dtype | None = None, adapted: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight as it is in a checkpoint on disk, layer by layer.

    A head that is tied to the embedding is included: ``save_pretrained`` omits it, and a sampler whose kernels keep a packed copy
    of the head (vLLM on a CPU) would reload all weights except the head.

    Args:
        model: The student. If it is sharded, every rank must exhaust the iterator, and each tensor is gathered for its turn.
        dtype: Floating-point type of the stream. Null keeps that of the weights.
        adapted: With an adapter merged, ``W + s B A``. If not, the base weights alone.

    Yields:
        Name and tensor. A tensor is a copy only where it was gathered, merged, converted or cast.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stored = model.state_dict()  # under FSDP2 this shards again what is gathered
    names = [*chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))]
    whole = {name for name, _ in names}  # quantised layers store more than their weight
    for _, layer in groupby((name for name in stored if name in whole and not is_adapter(name)), key=_layer):
        # Cast before it is gathered: ranks exchange half as many bytes.
        weights = {
            name.replace(".base_layer.", "."): full_tensor(_cast(_plain(model, name, adapted), dtype)) for name in layer
        }
        yield from revert_weight_conversion(model, weights).items()


@contextmanager
def drained(stream: Iterator[T]) -> Iterator[Iterator[T]]:
    """Context of the use of a stream of gathered tensors. If it fails on one rank, the others still get what they wait for."""
    try:
        yield stream
    finally:
        for _ in stream:
            pass


def _plain(model: PreTrainedModel, name: str, adapted: bool) -> Tensor:
    owner, _, kind = name.rpartition(".")
    module = model.get_submodule(owner)
    path, _, last = owner.rpartition(".")
    if kind == "weight" and (last == "base_layer" or isinstance(module, nn.Linear)):
        return plain_weight(model.get_submodule(path) if last == "base_layer" and adapted else module)
    tensor: Tensor = getattr(module, kind)
    return tensor.detach()


def _layer(name: str) -> str:
    found = _LAYER.match(name)
    return name if found is None else found.group()


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Write the configuration into a folder, as an engine needs it to build the model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # missing if the model was created from a configuration
    config.__dict__.pop("quantization_config", None)  # the stream holds whole weights
    config.save_pretrained(folder)


def write_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None, adapted: bool = True) -> None:
    """Write configuration and :func:`stream_weights` into a folder, replacing earlier files.

    Of several ranks the first writes. If weights are sharded, every rank must call it.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if not writes and not is_sharded(model):
        return
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    with drained(stream_weights(model, dtype, adapted)) as stream:
        for name, tensor in stream:
            if writes:
                tied = tensor.data_ptr() in seen  # the file format allows one name per memory
                seen.add(tensor.data_ptr())
                whole = tensor.cpu()
                tensors[name] = whole.clone(memory_format=torch.contiguous_format) if tied else whole.contiguous()
    if writes:
        write_config(model, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
