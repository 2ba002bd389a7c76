"""A model's configuration and parameters, counted without weights."""

import copy
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from pgpo_lightning.core.errors import as_user_error
from pgpo_lightning.models.lm_head import decoder
from pgpo_lightning.models.loading import resolve_model

SHAPES = Path(str(files("pgpo_lightning") / "assets" / "models"))


def configuration(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a model's configuration, without access to the Hub if this package ships the model's config.json.

    Args:
        name: A folder with a config.json, a Hub id, or ``toy``.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run Python code that comes with the model.
    """
    shipped = SHAPES / name.lower().rpartition("/")[2]
    own = name.lower().startswith("qwen/") and not Path(name).exists() and (shipped / "config.json").exists()
    with as_user_error(f"the model `{name}`"):
        return AutoConfig.from_pretrained(
            str(shipped) if own else resolve_model(name), revision=revision, trust_remote_code=trust_remote_code
        )


def with_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """Return the same configuration with its first `count` layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return config


def skeleton(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> PreTrainedModel:
    """Return the model without data, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


@dataclass(frozen=True)
class Count:
    """Numbers of a model's parameters.

    Attributes:
        shapes: Shape of every stored parameter; a tied head is stored once.
        total: All parameters.
        matrices: Parameters of the layers' matrices. Each costs two operations per token.
        layer: Parameters of the largest layer.
        root: Parameters outside the layers: embeddings, head, last norm.
        head: Parameters of the head, ``V * D``.
        layers: Number of layers.
        tied: Whether the head is the embedding.
        last: Parameters of the layers' last matrices (``down_proj``), which a checkpointed layer does not multiply with again.
        experts: Parameters of the experts that a token passes through, in all layers. Each costs two operations per token too.
    """

    shapes: tuple[tuple[int, ...], ...]
    total: int
    matrices: int
    layer: int
    root: int
    head: int
    layers: int
    tied: bool
    last: int
    experts: int = 0


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a decoder that :func:`count` accepts."""
    return cast(nn.ModuleList, decoder(model).layers)  # the type of a submodule is unknown to type checkers


def count(config: PretrainedConfig, field: str = "model") -> Count:
    """Count a model's parameters on the meta device.

    Args:
        config: Configuration of the model.
        field: The setting that names the model, for messages.

    Raises:
        ValueError: If the model is not a decoder with equal layers that have attention.
    """
    if any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=config).layers):
        raise ValueError(
            f"Expected `{field}` to have attention in all of its layers, but {config.model_type} has layers with a recurrent "
            "state: what it needs cannot be predicted."
        )
    model = skeleton(config)
    found = getattr(decoder(model), "layers", None)
    layers = list(found) if isinstance(found, nn.ModuleList) else []
    kinds = {tuple(tuple(p.shape) for p in layer.parameters()) for layer in layers}
    if len(kinds) != 1:
        raise ValueError(
            f"Expected `{field}` to be a decoder whose layers have equal shapes, but {config.model_type} has "
            f"{len(kinds) or 'no'} kinds of layers: what it needs cannot be predicted from a few of them."
        )
    shapes = tuple(tuple(p.shape) for p in model.parameters())
    each = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    sizes = [[m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear)] for layer in layers]
    matrices, last = sum(map(sum, sizes)), sum(each[-1] for each in sizes if each)
    experts = sum(_active(parameter, config) for layer in layers for parameter in layer.parameters())
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    return Count(
        shapes,
        total,
        matrices,
        max(each),
        total - sum(each),
        head.numel(),
        len(each),
        tied,
        0 if experts else last,
        experts,
    )


def _active(parameter: nn.Parameter, config: PretrainedConfig) -> int:
    """Return how many numbers of a parameter a token is multiplied with, if it is the matrices of all experts, else 0."""
    if parameter.ndim != 3:
        return 0
    chosen = getattr(config.get_text_config(), "num_experts_per_tok", None) or len(parameter)
    return parameter.numel() * chosen // len(parameter)
