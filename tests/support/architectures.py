"""Tiny random models of every causal architecture that transformers knows, built from its configuration classes."""

import dataclasses
import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 96
WINDOW = 6
"""Tokens that a layer of local attention looks back, wherever a configuration has such layers."""

_SIZES: tuple[tuple[int | bool | float, tuple[str, ...]], ...] = (
    (VOCABULARY, ("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input")),
    (32, (
        "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "input_embedding_size", "output_embedding_size",
        "word_embed_proj_dim", "lru_width", "embedding_dim", "backbone_hidden_size",
        "kv_lora_rank", "q_lora_rank", "o_lora_rank", "mamba_d_ssm", "router_hidden_size",
    )),
    (64, (
        "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner", "dff", "dim_ff", "ffn_dim",
        "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp", "attention_head_dim_total",
    )),
    (16, (
        "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size",
        "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "dense_intermediate_size",
        "prefix_dense_intermediate_size", "moe_latent_size", "head_dim", "kv_channels", "dim_head", "d_head", "qk_head_dim",
        "v_head_dim", "index_head_dim", "indexer_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim",
        "attention_head_size", "mamba_d_head", "mamba_head_dim", "swa_head_dim", "mamba_d_state", "state_size", "ssm_state_size",
        "hidden_size_per_layer_input", "laurel_rank", "d_rel", "gated_norm_rank", "hc_lowrank", "rel_extent",
    )),
    (8, (
        "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "mamba_dt_rank", "time_step_rank", "chunk_size", "mamba_chunk_size",
    )),
    (4, (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "num_blocks",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "mamba_n_heads", "mamba_num_heads",
    )),
    (2, (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "num_decoder_attention_heads",
        "attention_heads", "index_n_heads", "indexer_n_heads", "linear_num_heads", "linear_num_key_heads",
        "linear_num_value_heads", "swa_num_attention_heads",
        "num_experts_per_tok", "moe_topk", "moe_k",
        "top_k_experts", "encoder_layers",
        "encoder_attention_heads", "num_encoder_layers", "num_encoder_attention_heads",
        "n_group", "topk_group", "num_mem_blocks", "o_groups",
    )),
    (1, (
        "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "indexer_kv_heads", "mamba_n_groups", "mamba_ngroups",
        "n_groups", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace",
        "num_dense_layers",
    )),
    (512, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions")),
    (WINDOW, (
        "sliding_window", "sliding_window_size", "window_size", "attention_chunk_size", "local_attention",
        "attention_window_size",
    )),
    (True, ("is_decoder",)),
    (False, ("use_mamba_kernels", "add_cross_attention", "use_mem_eff_path", "is_encoder")),
    (0.0, (
        "dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "hidden_dropout_prob", "layerdrop",
        "attention_probs_dropout_prob", "embd_pdrop", "resid_pdrop", "attn_pdrop", "emb_pdrop", "dropout_p", "resid_dropout",
        "embed_dropout", "residual_dropout", "embedding_dropout", "mlp_dropout", "decoder_layerdrop",
    )),
)  # fmt: skip
_SIZE = {name: value for value, names in _SIZES for name in names}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_COMPASS = {kind: {**_ROPE, "mrope_section": [4, 2, 2]} for kind in ("sliding_attention", "full_attention")}
_EXTRA: dict[str, dict[str, Any]] = {
    "axk2": {"num_key_value_heads": 2, "index_topk": 8},
    "cwm": {"bos_token_id": 1},
    "axk1": {"num_key_value_heads": 2},
    "bailing_hybrid": {"num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"n_head": 4, "n_embd": 64},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": _COMPASS},
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 2},
    "deepseek_v3": {"num_key_value_heads": 2},
    "deepseek_v32": {"num_key_value_heads": 2, "index_topk": 8},
    "diffllama": {"num_key_value_heads": 2},
    "dots3_note_text": {"num_key_value_heads": 2, "ngram_vocab_size_base": 50},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": {"num_key_value_heads": 2},
    "glm_moe_dsa": {"num_key_value_heads": 2, "index_topk": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 2, "head_dim": 8},
    "mamba2": {"num_heads": 4},
    "minicpm3": {"num_key_value_heads": 2},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "modernbert-decoder": {"bos_token_id": 1},
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 2, "ngram_vocab_size_base": 50},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4},
    "roc_bert": {
        "enable_shape": False,
        "enable_pronunciation": False,
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": {"num_key_value_heads": 2},
    "zamba": {"attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def _fields(cls: type[PretrainedConfig]) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    return set(inspect.signature(cls.__init__).parameters)


def _sizes(cls: type[PretrainedConfig]) -> dict[str, Any]:
    return {name: _SIZE[name] for name in _fields(cls) & _SIZE.keys()} | _EXTRA.get(cls.model_type, {})


def tiny_config(name: str, **settings: Any) -> PretrainedConfig:
    """Return a small configuration of a model type, local attention of :data:`WINDOW` tokens included."""
    cls = CONFIG_MAPPING[name]
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    parts = getattr(cls, "sub_configs_defaults", None) or {}
    if "text_config" in parts:
        cls = parts["text_config"].config_class
    return cls(**ends | _sizes(cls) | settings)


def tiny(name: str, seed: int = 0, scale: float = 4.0, **settings: Any) -> PreTrainedModel:
    """Return a random model; with its weights scaled up, predictions are far from uniform.

    Raises:
        ValueError: If its configuration has too large parts that no setting here makes small.
    """
    config = tiny_config(name, **settings)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > 3_000_000:
        raise ValueError(f"Expected a tiny model of {name}, but it has {size:,} weights.")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model.eval()
