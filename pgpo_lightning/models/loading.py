"""Loading of models and tokenizers, and the identity of a model's weights."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.core.errors import UserError, as_user_error
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.distributed.fsdp import first_row
from pgpo_lightning.models.quantization import Quantization, keep_weights_as_they_are
from pgpo_lightning.models.shards import reading_shards

Dtype = Literal["float32", "bfloat16", "float16"]

SHIPPED = {"toy": "toy", "toy-code": "toy_code"}
"""Base models in this package, by name, with their folders in ``assets/``."""


@contextmanager
def fp32_by_default() -> Iterator[None]:
    """Context in which new tensors without an explicit dtype are fp32, whatever the dtype of the weights.

    Lightning's bf16-true makes them bf16, which would leave random numbers, log-probabilities and coefficients with eight bits.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def resolve_model(name: str) -> str:
    """Return the folder or Hub id of a model. ``toy`` and ``toy-code`` are base models in this package.

    Raises:
        UserError: If the name can only be that of a folder, because no Hub id is written so, and there is no such folder.
    """
    if name in SHIPPED:
        return str(files("pgpo_lightning") / "assets" / SHIPPED[name])
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(f"Expected a model in the folder {name}, but there is no such folder.")
    return name


def load_model(
    name: str,
    dtype: Dtype = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    mesh: DeviceMesh | None = None,
) -> PreTrainedModel:
    """Load a causal language model through transformers, safetensors only.

    Args:
        name: A folder, a Hub id, ``toy`` or ``toy-code``.
        dtype: Type of the weights. Use float32 also for mixed precision: in bfloat16 a weight of 1.0 does not change in a hundred
            AdamW steps of 1e-6.
        attn_implementation: As in ``from_pretrained``.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run Python code that comes with the model.
        quantization: Store the weights of linear layers in 4 or 8 bits, to train an adapter on them.
        mesh: Ranks over which the weights are sharded, each of which reads its own rows: see :mod:`.shards`. Null for whole ones.
    """
    by_rows: AbstractContextManager[dict[str, Any]] = nullcontext({}) if mesh is None else reading_shards(mesh)
    with as_user_error(f"the model `{name}`"), by_rows as more:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            quantization_config=None if quantization is None else quantization.config(getattr(torch, dtype)),
            **more,
        )
    keep_weights_as_they_are(model)
    return model


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and check that it can end and pad a sequence.

    Raises:
        MisconfigurationException: If it has no end-of-sequence token.
    """
    with as_user_error(f"the tokenizer of `{name}`"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name), revision=revision, trust_remote_code=trust_remote_code
        )
    return checked_tokenizer(tokenizer)


def checked_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a padding token.

    Raises:
        MisconfigurationException: If it has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise MisconfigurationException(
            f"Expected the tokenizer `{tokenizer.name_or_path}` to have an end-of-sequence token, but it has none, so no "
            "response could end. Set `eos_token` in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool = False) -> str:
    """Return the text of a sequence of token ids."""
    return cast("str", tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))  # a list only for a batch


def known_tokens(model: PreTrainedModel) -> int:
    """Return the number of token ids that a model has embeddings for.

    Raises:
        MisconfigurationException: If it can sample tokens without an embedding.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    rows, logits = (layer.get_parameter("weight").shape[0] for layer in layers)
    if logits > rows:
        raise MisconfigurationException(
            f"Expected {type(model).__name__} to have an embedding for every token that it can sample, but it has {rows} for "
            f"{logits}. Save it after `model.resize_token_embeddings({logits})`."
        )
    return rows


def positions(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a model; ``None`` if it is not stated or unlimited (XLNet)."""
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    return stated if stated and stated > 0 else None


@contextmanager
def evaluating(model: PreTrainedModel, training: bool = False) -> Iterator[None]:
    """Context in which the model is in evaluation (or training) mode. Afterwards every submodule is back in its own mode.

    Sampling needs evaluation mode. In training mode dropout is active, and gradient checkpointing silently drops the cache, which
    makes samples wrong from the second token on.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def architecture(model: PreTrainedModel) -> str:
    """Return the model's configuration as JSON, as stored in checkpoints."""
    return model.config.to_json_string(use_diff=False)


def check_architecture(saved: str, model: PreTrainedModel) -> None:
    """Compare a checkpoint's architecture with the model that will load it.

    Args:
        saved: From :func:`architecture` of the checkpoint's model.
        model: The configured model.

    Raises:
        MisconfigurationException: If type or shapes differ; names the differing fields.
    """
    keys = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "intermediate_size", "tie_word_embeddings")  # fmt: skip
    found, expected = json.loads(saved), json.loads(architecture(model))
    different = [
        f"{key} {found.get(key)!r} instead of {expected.get(key)!r}"
        for key in keys
        if found.get(key) != expected.get(key)
    ]
    if different:
        raise MisconfigurationException(
            f"Expected a checkpoint of the configured model, but it is of another architecture: {', '.join(different)}. "
            "Set `model.model` to the model that the checkpoint was trained from."
        )


def fingerprint(model: nn.Module) -> str:
    """Return a short hash of a model's weights.

    It covers names, shapes and up to 4096 evenly spaced elements of every parameter, so 8 billion parameters take about a second.
    That of a model of shards is that of the whole one. All ranks must call it, and each sends the elements that it holds.
    """
    digest = hashlib.sha256()
    named = list(model.named_parameters())
    samples = [_sample(parameter.detach()) for _, parameter in named]
    parts = gather(samples) if any(isinstance(parameter, DTensor) for _, parameter in named) else [samples]
    for i, (name, parameter) in enumerate(named):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(b"".join(part[i] for part in (parts if isinstance(parameter, DTensor) else parts[:1])))
    return digest.hexdigest()[:32]


def _sample(tensor: Tensor) -> bytes:
    """Return this rank's part of up to 4096 evenly spaced elements of a tensor, in fp32."""
    step, start = max(1, -(-tensor.numel() // 4096)), 0
    if isinstance(tensor, DTensor):
        start = first_row(tensor) * (tensor.numel() // len(tensor))
        tensor = tensor.to_local()
    sample = tensor.reshape(-1)[-start % step :: step].float().cpu().contiguous()
    return sample.numpy().tobytes()
