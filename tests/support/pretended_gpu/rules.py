"""What CUDA refuses, and where the host waits for it."""

from typing import Any

import torch
from torch import Tensor

_WAITS = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "bincount",
}  # fmt: skip
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"copy_", "_to_copy", "copy"}
_NOT_DETERMINISTIC = {"kthvalue", "median", "put_", "index_reduce_", "scatter_reduce", "histc", "bincount"}
_STRICT = {"lerp", "lerp_"}
"""Pointwise operations that take no CPU scalar tensor."""


class DeviceMismatchError(RuntimeError):
    """An operation that a GPU would have refused."""


def check(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on: list[Tensor], off: list[Tensor]
) -> None:
    """Raise if CUDA would.

    Args:
        func: The operation.
        name: Its name, without namespace and overload.
        args: Its arguments.
        kwargs: Its keyword arguments.
        on: Tensors among them on the device.
        off: Tensors among them on the CPU.

    Raises:
        DeviceMismatchError: If devices are mixed.
    """
    if not on or not off or name in _COPIES:
        return
    bad = [t for t in off if t.dim()]
    if name in _INDEXING:
        # CUDA copies CPU indices to the device of the indexed tensor. Everything else has to be there.
        inside = args[0].device.type != "cpu"
        indices = [t for t in args[1] if t is not None]
        bad = [t for t in bad if not any(t is i for i in indices)] if inside else [args[0]]
    elif (
        torch.Tag.pointwise not in func.tags or name in _STRICT or (name.endswith("_") and args[0].device.type == "cpu")
    ):
        bad = off
    if bad:
        shapes = [tuple(t.shape) for t in bad]
        raise DeviceMismatchError(
            f"{func}: Expected all tensors to be on the same device, but found at least two devices, {on[0].device} and cpu! "
            f"Shapes on the CPU: {shapes}."
        )


def check_deterministic(name: str, args: tuple[Any, ...]) -> None:
    """Raise if an operation has no deterministic kernel on CUDA, and only such kernels are wanted.

    Raises:
        RuntimeError: If so.
    """
    sums = name in ("cumsum", "cumsum_") and args[0].is_floating_point()
    if (sums or name in _NOT_DETERMINISTIC) and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(f"{name}_cuda_kernel does not have a deterministic implementation")


def check_generator(func: Any, kwargs: dict[str, Any], on_device: bool) -> None:
    """Raise if a random number on the device would be drawn with a generator of the CPU.

    Raises:
        DeviceMismatchError: If so.
    """
    generator = kwargs.get("generator")
    if generator is not None and on_device and generator.device.type == "cpu":
        raise DeviceMismatchError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")


def wait(name: str, overload: str, args: tuple[Any, ...], kwargs: dict[str, Any], target: bool) -> str | None:
    """Return why the host waits for an operation that has a tensor on the device, or goes there; null if it does not.

    Args:
        name: Name of the operation.
        overload: Its overload.
        args: Its arguments.
        kwargs: Its keyword arguments.
        target: Whether its result is on the device.
    """
    if name in _WAITS:
        return name
    if name == "repeat_interleave" and kwargs.get("output_size") is None and overload == "Tensor":
        return "repeat_interleave without output_size"
    if name in _INDEXING:
        indices = [t for t in args[1] if t is not None]
        if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
            return "boolean index"
        if any(t.device.type == "cpu" for t in indices):
            return "index on the CPU"
    if name in _COPIES and not args[-1 if name != "_to_copy" else 0].numel():
        return None
    if name == "_to_copy" and (args[0].device.type != "cpu") != target:
        return "copy to the device" if target else "copy to the host"
    if name in ("copy_", "copy") and (args[0].device.type == "cpu") != (args[1].device.type == "cpu"):
        return "copy to the host" if args[0].device.type == "cpu" else "copy to the device"
    return None


def narrow_product(overload: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return a product with `out_dtype`, which only CUDA has, under the conditions of torch 2.10 (``cuda/Blas.cpp``).

    Args:
        overload: Name and overload: of `mm`, `bmm` or `addmm`.
        args: Its arguments, on the CPU.
        kwargs: Its keyword arguments.

    Raises:
        RuntimeError: As on CUDA.
    """
    base, *rest = args if overload.startswith("addmm") else (None, *args)
    left, right = rest[:2]
    dtype = rest[2] if len(rest) > 2 else kwargs["out_dtype"]
    if left.dtype != right.dtype:
        raise RuntimeError(f"Expected operands of one dtype, but got {left.dtype} and {right.dtype}.")
    if dtype != left.dtype and (dtype != torch.float32 or left.dtype not in (torch.float16, torch.bfloat16)):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    if base is not None and base.dtype not in (dtype, left.dtype):
        raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")
    product = left.to(dtype) @ right.to(dtype)
    if base is not None:
        product += base.to(dtype)
    return kwargs["out"].copy_(product) if "out" in kwargs else product
