"""Autocast on the pretended device, with CUDA's rules for the operations that matter here."""

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._pytree import tree_map_only

_NARROW = (
    "mm", "addmm", "bmm", "matmul", "linear", "baddbmm", "scaled_dot_product_attention", "mv", "conv1d", "einsum",
)  # fmt: skip
_WIDE = (
    "exp", "log", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsqrt", "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList",
    "cumsum", "expm1", "log1p", "reciprocal", "norm.Scalar", "prod", "softplus",
)  # fmt: skip


def register_autocast(device: str) -> list[torch.library.Library]:
    """Register the kernels, which live as long as what is returned."""
    key = DispatchKeySet(DispatchKey.AutocastPrivateUse1)
    every = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    every.fallback(torch.library.fallthrough_kernel)
    kernels = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")

    def register(name: str, narrow: bool) -> None:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device) if narrow else torch.float32

            def cast(tensor: Tensor) -> Tensor:
                floating = tensor.is_floating_point() and tensor.dtype not in (torch.float64, dtype)
                return tensor.to(dtype) if floating and tensor.device.type == device else tensor

            with torch._C._ExcludeDispatchKeyGuard(key):
                return operation(*tree_map_only(Tensor, cast, args), **tree_map_only(Tensor, cast, kwargs))

        kernels.impl(name, kernel)

    for name in _NARROW:
        register(name, narrow=True)
    for name in _WIDE:
        register(name, narrow=False)
    return [every, kernels]
