"""The base model under an adapter in 4 or 8 bits (QLoRA, arXiv 2305.14314), through bitsandbytes."""

import logging
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from pgpo_lightning.core.settings import checked


@partial(checked, prefix="quantization.")
@dataclass
class Quantization:
    """How the frozen base weights are stored. Embeddings, norms and language-model head keep the module's `model_config.dtype`.

    Args:
        bits: 4 or 8. With 8 bits activations are quantised too (LLM.int8). With 4 bits products are computed in
            `model_config.dtype`.
        bnb_4bit_quant_type: ``nf4`` or ``fp4``, with 4 bits only; null for nf4.
        bnb_4bit_use_double_quant: Quantise the quantisation constants too, with 4 bits only.

    Raises:
        ValueError: If a setting is not one of the choices or would have no effect; names the field.
    """

    bits: Literal[4, 8] = 4
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    bnb_4bit_use_double_quant: bool = False

    def __post_init__(self) -> None:
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
            if self.bits == 8 and getattr(self, name):
                raise ValueError(
                    f"Expected no `quantization.{name}` with 8 bits, where it has no effect, but got {getattr(self, name)!r}."
                )

    def settings(self) -> dict[str, Any]:
        """Return the fields, as stored in checkpoints."""
        return asdict(self)

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """Return the configuration that ``from_pretrained`` takes.

        Args:
            dtype: Type of the products with 4-bit weights.
        """
        if self.bits == 8:
            # In every layer of every forward pass it logs that it casts activations from other types to float16.
            logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_cast_message)
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type or "nf4",
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )


def keep_weights_as_they_are(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew where the CPU has AVX512-BF16 instructions.

    It would do so in place at the first pass without gradients, round the scales to bf16, and compute in bf16: the policy that
    samples would then be another than the one that was loaded. It also fails for layers narrower than a block.

    Args:
        model: Just loaded.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (for mypy it is a tensor)


def _is_not_cast_message(record: logging.LogRecord) -> bool:
    return "inputs will be cast from" not in record.getMessage()
