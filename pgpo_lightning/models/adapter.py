"""The layers of an adapter in a model, wherever its weights live: merged, copied, and exchanged for those of a teacher."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pgpo_lightning.distributed.fsdp import full_tensor

_MATRICES = (".lora_A.default.", ".lora_B.default.")


def is_adapter(name: str) -> bool:
    """Return whether a weight of this name is a matrix of an adapter."""
    return any(matrix in name for matrix in _MATRICES)


def adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices of a model's adapter by name; empty if it has none."""
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


@torch.no_grad()
def plain_weight(layer: nn.Module) -> Tensor:
    """Return the matrix that a linear layer multiplies by: ``W + s B A`` with an adapter (fp32), and never quantised.

    Without either it is the layer's own weight, not a copy. That of a sharded layer is this rank's shard; all ranks must call it.
    """
    base: Any = getattr(layer, "base_layer", layer)
    weight: Tensor = base.weight.detach()
    if not weight.is_floating_point():
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(base).detach()
    if base is layer:
        return weight
    update = _update(layer)
    if isinstance(weight, DTensor):
        # Every rank multiplies the whole small matrices, and takes its rows: a product of fewer rows may round differently.
        update = distribute_tensor(update, weight.device_mesh, weight.placements, src_data_rank=None)
    return weight.to(update.dtype) + update


def _update(layer: nn.Module) -> Tensor:
    """Return ``s B A`` of a layer of peft, from whole matrices."""
    parameters = [part._parameters for part in adapter_layers(layer).values()]
    own = [each["weight"] for each in parameters]
    try:
        for each, weight in zip(parameters, own, strict=True):
            each["weight"] = full_tensor(weight)  # type: ignore[assignment, arg-type]
        return layer.get_delta_weight("default")  # type: ignore[operator, no-any-return]  # a method of peft's layers
    finally:
        for each, weight in zip(parameters, own, strict=True):
            each["weight"] = weight


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers that a model's adapter consists of, A and B of every adapted layer, by name."""
    return {name: module for name, module in model.named_modules() if is_adapter(f".{name}.") and module._parameters}


def copy_adapter(model: nn.Module) -> nn.Module:
    """Return a copy of a model's adapter in fp32 without gradient: its linear layers, at their places in the model."""
    root = nn.Module()
    for name, layer in adapter_layers(model).items():
        *path, last = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, copy.deepcopy(layer).to(torch.float32).requires_grad_(False))
    return root


@contextmanager
def other_adapter(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Context in which a model computes with another adapter. Afterwards it has its own again.

    Layers are exchanged, not their parameters: whenever FSDP2 gathers a layer, it puts the parameters back that it has sharded.

    Args:
        model: A model with an adapter.
        other: From :func:`copy_adapter`. Its matrices must be whole.
    """
    own = adapter_layers(model)
    try:
        for name in own:
            _put(model, name, other.get_submodule(name))
        yield
    finally:
        for name, layer in own.items():
            _put(model, name, layer)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    model.get_submodule(owner)._modules[last] = layer
