"""Siblings that share their prompt's keys, or copy them: the model's own logits, whoever ends, begins, or has begun earlier."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pgpo_lightning.models.shared_attention import CopiedKeys, SharedKeys, attention
from pgpo_lightning.models.shared_decoding import SharedPrompts
from tests.support.architectures import tiny


def own(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def turn_over(decoding, prompts, n, rng, model):
    """Let responses of random lengths come and go, as many as there is room for; return the most rows and the tokens checked."""
    waiting, rows = list(range(len(decoding.rows), len(prompts) * n)), list(decoding.rows)
    grown = [list(prompt) for prompt in prompts for _ in range(n)]
    room, most, checked = len(rows) + 2, 0, 0
    while rows:
        for row, logits in zip(rows, decoding.logits, strict=True):
            torch.testing.assert_close(logits, own(model, grown[row]), rtol=0, atol=2e-4)
        most, checked = max(most, len(rows)), checked + len(rows)
        tokens = [rng.randrange(5, 96) for _ in rows]
        going = [i for i in range(len(rows)) if rng.random() > 0.1]
        if len(going) < len(rows):
            decoding.keep(going)
        for i in going:
            grown[rows[i]].append(tokens[i])
        if going:
            decoding.append(torch.tensor([tokens[i] for i in going]))
        rows = [rows[i] for i in going]
        if new := waiting[: room - len(rows)]:
            decoding.join(new)
            rows, waiting = rows + new, waiting[len(new) :]
    assert not waiting
    return most, checked


@pytest.mark.parametrize("kind", [SharedKeys, CopiedKeys])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gpt2"])  # few keys, windows of 6 tokens, learned positions
def test_logits_are_the_models_own_while_responses_come_and_go(name, kind):
    model, rng = tiny(name), random.Random(0)
    prompts = [[rng.randrange(5, 96) for _ in range(length)] for length in (9, 4, 17, 2, 4)]
    with torch.no_grad():
        decoding = SharedPrompts(model, prompts, 3, 4, [kind])
        most, checked = turn_over(decoding, prompts, 3, rng, model)
    assert most == 6
    assert checked > 80


@pytest.mark.parametrize("width", [8, 12])  # of values: as wide as keys, or not, which takes another path
def test_attention_and_the_sum_of_its_scores(width):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, width)
    mask = torch.rand(3, 1, 5, 7) > 0.4
    mask[..., 0], mask[1] = True, False  # the second attends to nothing
    mixed, total = attention(query, key, value, 0.5, mask)
    torch.testing.assert_close(mixed[::2], scaled_dot_product_attention(query, key, value, mask, scale=0.5)[::2])
    scores = (0.5 * query @ key.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(total[::2], scores.logsumexp(-1)[::2])
    assert mixed.isfinite().all()
    assert (total[1] < -1e30).all()


def test_the_keys_of_a_prompt_are_held_once():
    model, prompts = tiny("qwen3"), [list(range(5, 85)), list(range(6, 86))]
    held = {}
    with torch.no_grad():
        for kind in (SharedKeys, CopiedKeys):
            decoding = SharedPrompts(model, prompts, 8, kinds=[kind])
            decoding.append(torch.arange(5, 21))
            held[kind] = sum(keys.nbytes for keys in decoding.keys)
    token = 2 * 4 * 16 * 4  # keys and values of four layers, of one head of 16 numbers in fp32
    assert held[SharedKeys] == token * (2 * 80 + 16 * 33)
    assert held[CopiedKeys] == token * (2 * 80 + 16 * (80 + 1 + 32))


def test_siblings_share_keys_of_long_prompts_only():
    model = tiny("qwen3")
    with torch.no_grad():
        kinds = {
            (length, n): type(SharedPrompts(model, [[5] * length], n).keys[0]) for length in (100, 140) for n in (1, 2)
        }
    assert kinds == {(100, 1): CopiedKeys, (100, 2): CopiedKeys, (140, 1): CopiedKeys, (140, 2): SharedKeys}


def test_an_attention_whose_scores_are_changed_is_refused():
    model = tiny("gemma2")
    with torch.no_grad(), pytest.raises(ValueError, match="attention with softcap does not share prompts"):
        SharedPrompts(model, [[5, 6, 7]], 2).append(torch.tensor([5, 6]))
    assert model.config._attn_implementation == "eager"
