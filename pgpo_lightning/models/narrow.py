"""What 16 bits must not change, and where they cost time: buffers, and products on a CPU without instructions for them."""

import platform
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from pgpo_lightning.core.buffers import keeping_buffers

_FAST = {
    "bfloat16": ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    "float16": ("_is_amx_fp16_supported",),
}
"""The functions of ``torch.cpu`` that report support on x86 processors. There are none for others."""


class KeepsBuffers:
    """Mixed into a module: ``to``, ``half`` and Lightning's ``bf16-true`` narrow its weights alone."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keeping_buffers(self, fn), recurse)  # type: ignore[misc, arg-type]


def narrow_type(precision: str, dtype: str) -> str | None:
    """Return the 16-bit type that products are computed in, or ``None`` if it is float32.

    Args:
        precision: Precision of Lightning's trainer, such as ``bf16-mixed``.
        dtype: Type of the weights, as configured.

    Example:
        >>> [narrow_type(*pair) for pair in (("bf16-mixed", "float32"), ("32-true", "float16"), ("32-true", "float32"))]
        ['bfloat16', 'float16', None]
    """
    for name, short in (("bfloat16", "bf16-"), ("float16", "16-")):
        if precision.startswith(short) or (precision.startswith("32") and dtype == name):
            return name
    return None


def warn_of_slow_products(precision: str, dtype: str, device: torch.device) -> None:
    """Warn if products will be computed in a type that this CPU has no instructions for.

    Args:
        precision: See :func:`narrow_type`.
        dtype: See :func:`narrow_type`.
        device: Device of the model.
    """
    narrow = narrow_type(precision, dtype)
    if device.type != "cpu" or narrow is None:
        return
    if platform.machine() not in ("x86_64", "AMD64") or any(getattr(torch.cpu, name, bool)() for name in _FAST[narrow]):
        return
    rank_zero_warn(
        f"Products in {narrow} are slow on this CPU, which has no instructions for them: a step takes several times as long as "
        "in float32. Set `trainer.precision` to 32-true and `model_config.dtype` to float32, or use a GPU."
    )
