"""Activation checkpointing: what of a layer's forward pass is computed again in the backward pass, and what is kept in memory.

Nothing is kept, every n-th layer is recomputed, or only the outputs of matrix products are kept, which cost most to compute: the
modes ``full`` and ``selective`` of torchtitan.
"""

from functools import partial
from typing import Annotated, Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pgpo_lightning.core.settings import Range

Selective = Annotated[int, Range(least=2)] | Literal["op"]
"""n: the layers 0, n, 2n, ... are recomputed. ``op``: every layer is, except its matrix products and its attention."""

_KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "transformers::grouped_mm_fallback",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flex_attention",
}
"""Operations whose outputs ``op`` keeps. ``aten::bmm`` is not among them: that of attention without a kernel gives all scores."""


def recompute_activations(model: PreTrainedModel, selective: Selective | None = None) -> None:
    """Recompute activations in the backward pass.

    Args:
        model: What is recomputed are its layers, in training mode.
        selective: What is not; null recomputes all of every layer.

    Raises:
        MisconfigurationException: If the model has fewer than n layers.
    """
    arguments: dict[str, Any] = {"use_reentrant": False}
    if selective == "op":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    if hasattr(model, "activation_checkpointing_enable"):  # 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if isinstance(selective, int):
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if len(layers) < selective:
            raise MisconfigurationException(
                f"Expected `model_config.selective_ac_option` to be at most the {len(layers)} layers of {type(model).__name__} "
                f"that can be recomputed, but got {selective}. Set it to null to recompute each of them."
            )
        for i, layer in enumerate(layers):
            layer.gradient_checkpointing = i % selective == 0


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.name().partition(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
