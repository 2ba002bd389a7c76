"""Sequences, micro-batches and mini-batches: padding changes nothing, every row is in one place."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.core.types import Sample
from pgpo_lightning.models import soundness
from pgpo_lightning.models.layouts import packings
from pgpo_lightning.models.lm_head import source
from pgpo_lightning.models.packing import Packing, Sequences, SharedSequences
from pgpo_lightning.models.recomputation import recompute_activations
from pgpo_lightning.models.soundness import concatenates, shares_prompts
from pgpo_lightning.training.mini_batches import micro_batches
from tests.support.architectures import tiny
from tests.support.helpers import random_rows
from tests.support.model_kinds import MODELS

CPU = torch.device("cpu")


def test_pack_by_hand():
    packed = Sequences.pack([([11, 12, 13], [14, 15]), ([21], [22, 23, 24]), ([31, 32], [33])], 99, CPU)
    assert packed.input_ids.tolist() == [[11, 12, 13, 14, 15], [21, 22, 23, 24, 99], [31, 32, 33, 99, 99]]
    assert packed.row.tolist() == [0, 0, 1, 1, 1, 2]
    assert packed.position.tolist() == [2, 3, 0, 1, 2, 1]
    assert packed.targets.tolist() == [14, 15, 22, 23, 24, 33]
    assert packed.lengths.tolist() == [2, 3, 1]
    assert packed.input_ids.dtype == packed.targets.dtype == torch.int64
    assert packed.input_ids[packed.row, packed.position + 1].tolist() == packed.targets.tolist()


@pytest.mark.parametrize("name", ["qwen3 tied", "gemma2", "cohere", "granite", "gpt2"])
@pytest.mark.parametrize("pad", [0, 1, 77])
def test_padding_on_the_right_needs_no_mask(name, pad):
    model = MODELS[name]().eval()
    pairs = [(row.rollout.prompt_ids, row.rollout.response_ids) for row in random_rows(6)]
    pairs[2][0][1] = pairs[3][1][0] = pad  # a real token may be the padding one
    packed = Sequences.pack(pairs, pad, CPU)
    assert len({len(prompt) + len(response) for prompt, response in pairs}) > 3
    with torch.no_grad():
        together = source(model, packed)
        logits = together.head(together.hidden)
        start = 0
        for (prompt, response), length in zip(pairs, packed.lengths.tolist(), strict=True):
            alone = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(logits[start : start + length], alone, rtol=1e-4, atol=1e-5)
            start += length
    assert start == len(together.hidden)


def with_lengths(*lengths):
    """Rows whose prompts have these lengths."""
    rows = random_rows(len(lengths))
    for row, length in zip(rows, lengths, strict=True):
        row.rollout.prompt_ids = [5] * length
    return rows


def size(row: Sample) -> int:
    return len(row.rollout.prompt_ids)


def alone(row: Sample) -> list[list[int]]:
    return [row.rollout.prompt_ids]


@pytest.mark.parametrize(
    ("budget", "groups"),
    [
        (1, [[5], [3], [3], [2], [1]]),
        (6, [[5], [3], [3], [2, 1]]),  # the longest is over the budget and alone
        (8, [[5], [3, 3], [2, 1]]),
        (12, [[5, 3], [3, 2, 1]]),
        (24, [[5, 3, 3, 2], [1]]),
        (30, [[5, 3, 3, 2, 1]]),
    ],
)
def test_micro_batches_by_hand(budget, groups):
    """Every row has one more token, of its response."""
    rows = with_lengths(2, 3, 5, 1, 3)
    for row in rows:
        row.rollout.response_ids = [7]
    assert [[size(row) for row in group] for group in micro_batches(rows, budget, alone, [Packing()])] == groups


def both(row: Sample) -> list[list[int]]:
    return [row.rollout.prompt_ids, row.reprompt_ids or [3]]


def padded(group, contexts, share):
    """Tokens of the largest forward pass, counted from what is packed."""
    sizes = []
    for prompts in zip(*map(contexts, group), strict=True):
        pairs = [(prompt, row.rollout.response_ids) for prompt, row in zip(prompts, group, strict=True)]
        packed = Sequences.pack(pairs, 0, CPU, Packing(share))
        apart = isinstance(packed, SharedSequences)
        sizes.append(packed.prompts.numel() + packed.responses.numel() if apart else packed.input_ids.numel())
    return sizes


@pytest.mark.parametrize("share", ["never", "if-cheaper", "always"])
@pytest.mark.parametrize("budget", [5, 60, 100, 333, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget, share):
    rows = random_rows(40)
    groups = micro_batches(rows, budget, both, [Packing(share)])
    assert Counter(id(row) for group in groups for row in group) == Counter(map(id, rows))
    assert all(len(group) == 1 or max(padded(group, both, share)) <= budget for group in groups)
    assert micro_batches([], budget, both, [Packing(share)]) == []


def test_rows_with_the_same_prompt_stay_together_where_that_is_cheaper():
    def tokens(rows, share):
        return sum(sum(padded(group, alone, share)) for group in micro_batches(rows, 200, alone, [Packing(share)]))

    def rows_of(prompt, responses):
        rows = with_lengths(*[prompt] * 24)
        for i, row in enumerate(rows):
            row.rollout.prompt_ids = [5 + i % 3] * prompt
            row.rollout.response_ids = [7] * responses(i)
        return rows

    long_prompts = rows_of(30, lambda _: 4)
    assert tokens(long_prompts, "if-cheaper") == tokens(long_prompts, "always") == 3 * 30 + 24 * 3
    assert tokens(long_prompts, "never") == 24 * 34
    # Responses of very different lengths: then rows of one length belong together.
    short_prompts = rows_of(1, lambda i: 1 + i)
    assert tokens(short_prompts, "if-cheaper") <= tokens(short_prompts, "never")


def test_concatenated_by_hand():
    packed = Sequences.pack(
        [([11, 12, 13], [14, 15]), ([21], [22, 23, 24]), ([31], [33])], 99, CPU, Packing(padding_free=True)
    )
    assert packed.input_ids.tolist() == [[11, 12, 13, 14, 15, 21, 22, 23, 24, 31, 33]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]]
    assert packed.position.tolist() == [2, 3, 5, 6, 7, 9]
    assert (
        packed.input_ids[packed.row, packed.position + 1].tolist()
        == packed.targets.tolist()
        == [14, 15, 22, 23, 24, 33]
    )
    assert packed.lengths.tolist() == [2, 3, 1]


@pytest.mark.parametrize("name", ["qwen3 tied", "gemma2", "cohere", "granite", "gpt2"])
def test_a_row_without_padding_gives_the_same_states_and_gradients(name):
    """Also with a window of local attention, which is shorter than the row."""
    model = MODELS[name]().eval()
    assert concatenates(model) == ""
    pairs = [(row.rollout.prompt_ids, row.rollout.response_ids) for row in random_rows(6)]
    made = []
    for packing in (Packing(), Packing(padding_free=True)):
        packed = Sequences.pack(pairs, 7, CPU, packing)
        model.zero_grad()
        states = source(model, packed).hidden
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        made.append([states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert packed.input_ids.numel() == sum(len(prompt) + len(response) for prompt, response in pairs)
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


def test_a_state_that_runs_on_into_the_next_sequence_is_found():
    reason = concatenates(tiny("mamba"))
    assert "they differ by" in reason
    with pytest.raises(
        MisconfigurationException, match=r"MambaForCausalLM .* in one row, but .*Set `update.padding_free` to false"
    ):
        packings(tiny("mamba"), 64, True)
    assert packings(tiny("mamba"), 64, None) == (Packing(), Packing())


def test_flash_attention_concatenates_by_itself():
    model = MODELS["qwen3 tied"]()
    assert not packings(model, 64, None)[0].padding_free
    assert packings(model, 64, True)[0] == Packing("if-cheaper", padding_free=True)
    model.config._attn_implementation_internal = (
        "flash_attention_2"  # which a CPU does not have, so that no trial can pass
    )
    assert not packings(model, 64, None)[0].padding_free
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soundness, "_failure", lambda model, longest, layout, *_: asked.append(layout) or "")
        assert packings(model, 64, None)[0].padding_free
        assert not packings(model, 64, False)[0].padding_free
    assert soundness._concatenated in asked


def test_micro_batches_count_real_tokens_where_nothing_is_padded():
    rows = with_lengths(2, 3, 5, 1, 3)
    for row in rows:
        row.rollout.response_ids = [7]
    free = Packing(padding_free=True)
    assert [[size(row) for row in group] for group in micro_batches(rows, 19, alone, [free])] == [[5, 3, 3, 2, 1]]
    assert [[size(row) for row in group] for group in micro_batches(rows, 14, alone, [free])] == [[5, 3, 3], [2, 1]]
    for row in rows:
        row.reprompt_ids = [8] * (12 if row is rows[0] else 2)
    # Four of the student's sequences are 4 x 6 padded tokens, five are 30. Two of the teacher's are 2 x 13, if they are padded.
    sizes = lambda packings: [[size(row) for row in group] for group in micro_batches(rows, 29, both, packings)]  # noqa: E731
    assert sizes([Packing(), free]) == [[2, 5, 3, 3], [1]]
    assert sizes([Packing(), Packing()])[0] == [2, 5]


@pytest.mark.parametrize("name", ["qwen3 tied", "gpt2", "cohere", "granite"])
def test_a_prompt_that_is_run_once_gives_the_same_states_and_gradients(name):
    model = MODELS[name]().eval()
    assert shares_prompts(model)
    prompts = [[11, 12, 13, 14], [21], [31, 32, 33, 34, 35, 36]]
    responses = [[41, 42, 43], [51], [61, 62], [71, 72, 73, 74], [81]]
    owner = [0, 1, 0, 2, 0]
    pairs = [(prompts[i], response) for i, response in zip(owner, responses, strict=True)]
    made = {}
    for kind, packed in {
        "whole": Sequences.pack(pairs, 7, CPU),
        "apart": SharedSequences.pack_shared(pairs, 9, CPU),
    }.items():
        model.zero_grad()
        states = source(model, packed).hidden
        # A different weight for every number, so that no two can be confused.
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        made[kind] = [
            states,
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
            packed.targets,
            packed.lengths,
        ]
    for a, b in zip(made["whole"], made["apart"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


def test_prompts_of_one_length_need_no_mask_and_responses_of_one_token_are_padded():
    packed = SharedSequences.pack_shared([([1, 2], [3]), ([4, 5], [6]), ([1, 2], [7])], 0, CPU)
    assert packed.mask is None
    assert packed.responses.shape == (3, 1)  # the model is run as often as for longer ones
    model = MODELS["qwen3 tied"]().eval()
    whole = Sequences.pack([([1, 2], [3]), ([4, 5], [6]), ([1, 2], [7])], 0, CPU)
    torch.testing.assert_close(source(model, packed).hidden, source(model, whole).hidden, rtol=1e-5, atol=1e-6)


def test_a_cache_that_forgets_and_gradient_checkpoints_share_nothing():
    assert not shares_prompts(MODELS["gemma2"]())
    model = MODELS["qwen3 tied"]()
    recompute_activations(model)
    assert not shares_prompts(model)
    assert shares_prompts(model, trained=False)  # as a teacher, in evaluation mode, it keeps its cache
    assert [packing.prompt_sharing for packing in packings(model, 64, None)] == ["never", "if-cheaper"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["activation", "gradient"])
def test_activations_are_recomputed_under_the_name_that_transformers_has_for_it(name):
    asked = {}
    recompute_activations(SimpleNamespace(**{f"{name}_checkpointing_enable": asked.update}))
    assert asked == {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    model = MODELS["qwen3 tied"]()
    recompute_activations(model)
    assert model.model.layers[0].gradient_checkpointing
