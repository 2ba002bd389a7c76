"""Models whose weights are shards from the start: no rank ever holds, or reads, more than its own rows of every weight.

transformers builds a model without memory (on the meta device) and then fills it. In between, :func:`reading_shards` replaces
its parameters by empty shards, of which transformers reads the rows of this rank alone. :func:`gathered` then lets the checks of
a loaded model run it. FSDP2 takes over the shards as they are (:mod:`pgpo_lightning.distributed.fsdp`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.distributed.fsdp import full_tensor, layers_of, parameters_at

_BY_ROWS = {("MergeModulelist", 0), ("Concatenate", 1)}
"""Conversions of stored weights, with their dimension, that give a rank's rows from a rank's rows: experts that are stored one by
one. With others transformers 5.23 reads wrong rows without an error: the halves of a fused weight (``Chunk``), for example."""


@contextmanager
def reading_shards(mesh: DeviceMesh) -> Iterator[dict[str, Any]]:
    """Context in which ``from_pretrained`` returns a model of shards, by rows, and reads only this rank's.

    Where it cannot, it reads all weights, and one line is logged that says why.

    Args:
        mesh: One-dimensional, over the ranks that share the weights.

    Yields:
        Further arguments of ``from_pretrained``.
    """
    whole, read = PreTrainedModel._load_pretrained_model, []

    def load(model: PreTrainedModel, state_dict: Any, files: Any, settings: Any, *args: Any, **kwargs: Any) -> Any:
        if reason := _why_not(settings):
            rank_zero_info(f"{type(model).__name__} is read whole by every rank, before it is sharded: {reason}.")
            return whole(model, state_dict, files, settings, *args, **kwargs)
        _empty_shards(model, mesh)
        read.append(model)
        return whole(model, state_dict, files, settings, *args, **kwargs)

    kind = torch.device(mesh.device_type)
    more = (
        {"device_map": {"": torch.device(kind.type, torch.accelerator.current_device_index())}} if is_gpu(kind) else {}
    )
    with patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(load)):
        yield more
    for model in read:
        _own_memory(model)


def _why_not(settings: Any) -> str:
    """Return why a rank cannot read its rows alone, or an empty text, given transformers' settings of the loading."""
    for conversion in settings.weight_mapping or ():
        for operation in getattr(conversion, "operations", ()):
            if (type(operation).__name__, getattr(operation, "dim", None)) not in _BY_ROWS:
                return f"its files store weights in another form ({type(operation).__name__})"
    return ""


def _empty_shards(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Replace the parameters of a model on the meta device by shards without memory."""
    shards: dict[int, nn.Parameter] = {}
    for module, name, parameter in parameters_at(model):
        if parameter.ndim == 0:
            continue
        if id(parameter) not in shards:
            shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            shards[id(parameter)] = nn.Parameter(shard, requires_grad=parameter.requires_grad)
        module._parameters[name] = shards[id(parameter)]


def _own_memory(model: PreTrainedModel) -> None:
    """Copy shards that are a part of a file's memory map: a copy of such a shard would be one of the whole tensor, or fail."""
    own: dict[int, nn.Parameter] = {}
    for module, name, parameter in parameters_at(model):
        if not isinstance(parameter, DTensor) or parameter.to_local().untyped_storage().resizable():
            continue
        if id(parameter) not in own:
            shard = DTensor.from_local(
                parameter.to_local().detach().clone(),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            own[id(parameter)] = nn.Parameter(shard, requires_grad=parameter.requires_grad)
        module._parameters[name] = own[id(parameter)]


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """Context in which a model of shards can be run, in fp32, without gradients. Every rank makes the same passes.

    A layer is gathered for the time of its own forward pass, and what is outside of layers (embedding, norm, head) for all of the
    context. Does nothing to other models.

    Args:
        model: From :func:`reading_shards`, before FSDP2 has it.
    """
    with ExitStack() as stack:
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            layers = layers_of(model)
            within = {id(parameter) for layer in layers for parameter in layer.parameters()}
            for layer in layers:
                _gather_in_forward(layer, stack)
            rest = [each for each in parameters_at(model) if id(each[2]) not in within]
            stack.callback(_gather(rest))
        yield


def _gather_in_forward(layer: nn.Module, stack: ExitStack) -> None:
    held: list[Callable[[], None]] = []

    def before(*_: Any) -> None:
        held.append(_gather(parameters_at(layer)))

    def after(*_: Any) -> None:
        held.pop()()

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(layer.register_forward_hook(after, always_call=True).remove)


def _gather(places: list[tuple[nn.Module, str, nn.Parameter]]) -> Callable[[], None]:
    """Put whole tensors in the place of shards, and return what puts the shards back."""
    shards = [each for each in places if isinstance(each[2], DTensor)]
    whole: dict[int, Tensor] = {}
    for module, name, shard in shards:
        if id(shard) not in whole:
            full = full_tensor(shard.detach())
            whole[id(shard)] = nn.Parameter(full.float() if full.is_floating_point() else full, requires_grad=False)
        module._parameters[name] = whole[id(shard)]  # type: ignore[assignment]

    def put_back() -> None:
        for module, name, shard in shards:
            module._parameters[name] = shard

    return put_back
