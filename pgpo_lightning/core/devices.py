"""Which devices are GPUs, and how tensors get there."""

import torch
from torch import Tensor

_GPUS = {"cuda"}


def is_gpu(device: torch.device | str) -> bool:
    """Return whether a device is a GPU: CUDA's or ROCm's, whose type is called ``cuda`` too.

    Args:
        device: A device or its type.

    Example:
        >>> is_gpu("cuda:1"), is_gpu(torch.device("cpu"))
        (True, False)
    """
    kind = device.type if isinstance(device, torch.device) else device.partition(":")[0]
    return kind in _GPUS


def moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of one dtype on a device. The host waits for a GPU once, not once per tensor.

    Args:
        tensors: On one device; of any shapes.
        device: Where they are wanted.
    """
    if device.type == "cpu":
        return [tensor.to(device) for tensor in tensors]
    pieces = (
        torch.cat([tensor.flatten() for tensor in tensors]).to(device).split([tensor.numel() for tensor in tensors])
    )
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
