"""Every rank reads its own rows of a model, and together they have what one process reads."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, HrmTextConfig, Qwen3MoeConfig

from tests.support.helpers import tiny_model
from tests.support.processes import finish, start_ranks

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 50,
         "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # fmt: skip


def created(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_models_read_as_shards_are_those_read_whole(tmp_path):
    """One file and several, bf16 and fp32, tied heads, uneven rows, GPT-2's layers, experts stored one by one."""
    models = tmp_path / "models"
    models.mkdir()
    tiny_model().save_pretrained(models / "tied")
    tiny_model(tie_word_embeddings=False, intermediate_size=65).bfloat16().save_pretrained(
        models / "several files in bf16", max_shard_size="20KB"
    )
    created(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=64)).save_pretrained(models / "gpt2")
    moe = Qwen3MoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16)
    created(moe).save_pretrained(models / "experts")
    created(HrmTextConfig(**SIZES)).save_pretrained(models / "fused")  # stored in a form that is not read by rows
    finish(*start_ranks(["tests.support.shards_worker", tmp_path], tmp_path / "log", 2), log=tmp_path / "log")
    for rank in range(2):
        found = torch.load(tmp_path / f"found.{rank}", weights_only=True)
        assert found == {"tied": [], "several files in bf16": [], "gpt2": [], "experts": [], "fused": ["whole"]}
