"""Mini-batches and micro-batches of any samples: a partition, within the budget of tokens."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.models.packing import Packing, PaddedTokens, Sequences, SharedSequences
from pgpo_lightning.training.mini_batches import micro_batches, mini_batches


def sample(question, prompt, response, reprompt=None):
    rollout = Rollout(Question("?", "1", index=question), prompt, response, torch.zeros(len(response)), "", True)
    return Sample(rollout, Verdict(0.0), reprompt)


@st.composite
def batches(draw, taught):
    """Samples of a few questions, each with its prompt; siblings may share a reprompt, or have one of their own."""
    samples = []
    for question in draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True)):
        prompt = [question] * draw(st.integers(1, 9))
        for _ in range(draw(st.integers(1, 5))):
            reprompt = [draw(st.integers(0, 2))] * draw(st.integers(1, 20)) if taught else None
            samples.append(sample(question, prompt, [7] * draw(st.integers(1, 12)), reprompt))
    return samples


def contexts(sample):
    own = [sample.rollout.prompt_ids]
    return own if sample.reprompt_ids is None else [*own, sample.reprompt_ids]


PACKINGS = [
    Packing(),
    Packing("if-cheaper"),
    Packing("always"),
    Packing(padding_free=True),
    Packing("if-cheaper", True),
]


def largest(group, packing):
    """Tokens of the largest forward pass over a group, counted in the tensors that the model gets."""
    sizes = []
    for prompts in zip(*map(contexts, group), strict=True):
        pairs = [(prompt, sample.rollout.response_ids) for prompt, sample in zip(prompts, group, strict=True)]
        packed = Sequences.pack(pairs, 0, torch.device("cpu"), packing)
        shared = isinstance(packed, SharedSequences)
        sizes.append(packed.prompts.numel() + packed.responses.numel() if shared else packed.input_ids.numel())
    return max(sizes)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@given(samples=st.booleans().flatmap(batches), budget=st.integers(1, 200))
def test_micro_batches_are_a_partition_within_the_budget(packing, samples, budget):
    groups = micro_batches(samples, budget, contexts, [packing])
    assert Counter(id(sample) for group in groups for sample in group) == Counter(map(id, samples))
    assert all(groups)
    assert all(len(group) == 1 or largest(group, packing) <= budget for group in groups)
    if budget == 200 and len(groups) == 1:
        assert largest(samples, packing) <= budget or len(samples) == 1


@given(samples=batches(taught=True), budget=st.integers(20, 200), more=st.integers(1, 200))
def test_a_larger_budget_never_needs_more_passes(samples, budget, more):
    """Without shared prompts, where samples are taken by length, and with passes that cost more than any padding here."""
    more_room, less_room = (
        micro_batches(samples, room, contexts, [Packing()], sharded=True) for room in (budget + more, budget)
    )
    assert len(more_room) <= len(less_room)


def cost(groups, sharing, a_pass=128):
    """Padded tokens of all passes, and what passes cost in themselves."""
    counts = 0
    for group in groups:
        for prompts in zip(*map(contexts, group), strict=True):
            count = PaddedTokens(Packing(sharing))
            for prompt, one in zip(map(tuple, prompts), group, strict=True):
                count = count.plus(prompt, one.length).keep(prompt)
            counts += count.tokens()
    return counts + a_pass * len(groups)


@pytest.mark.parametrize("sharing", ["never", "if-cheaper", "always"])
@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=40))
def test_divided_passes_are_never_dearer_than_full_ones(sharing, lengths):
    samples = [sample(i // 4, [i // 4] * 30, [7] * length) for i, length in enumerate(lengths)]
    groups = micro_batches(samples, 10**6, contexts, [Packing(sharing)])
    assert Counter(id(one) for group in groups for one in group) == Counter(map(id, samples))
    assert cost(groups, sharing) <= cost([samples], sharing)
    sizes = [max(len(one.rollout.prompt_ids) + one.length for one in group) * len(group) for group in groups]
    if sharing == "never":
        assert sizes == sorted(sizes, reverse=True), "the largest pass is the first"
    assert micro_batches(samples[:1] * 3, 10**6, contexts, [Packing(sharing)]) == [samples[:1] * 3]


@pytest.mark.parametrize("sharing", ["never", "if-cheaper"])
def test_padding_is_small_whatever_the_lengths_and_equal_lengths_stay_together(sharing):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(256).exponential_(1 / 200, generator=generator).long().clamp(1, 1024).tolist()
    samples = [sample(i // 8, [i // 8] * 40, [7] * length) for i, length in enumerate(lengths)]
    real = 256 * 40 + sum(lengths)
    few = micro_batches(samples, 10**6, contexts, [Packing(sharing)])
    assert cost([samples], sharing, 0) > 3.5 * real, "in one pass"
    assert cost(few, sharing, 0) < 1.25 * real
    assert len(few) < 40
    nearly = [sample(i // 8, [i // 8] * 40, [7] * (90 + i % 16)) for i in range(256)]
    assert len(micro_batches(nearly, 10**6, contexts, [Packing(sharing)])) == 1


@given(lengths=st.lists(st.integers(1, 600), min_size=2, max_size=20, unique=True), seed=st.integers(0, 99))
def test_micro_batches_do_not_depend_on_the_order_of_the_samples(lengths, seed):
    samples = [sample(i // 4, [i // 4] * 30, [7] * length) for i, length in enumerate(lengths)]
    mixed = [samples[i] for i in torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))]
    groups, again = (
        [list(map(id, g)) for g in micro_batches(x, 2000, contexts, [Packing()])] for x in (samples, mixed)
    )
    assert groups == again


@given(samples=batches(taught=False), count=st.integers(1, 7))
def test_mini_batches_are_a_partition_of_whole_questions_in_order(samples, count):
    questions = list(dict.fromkeys(sample.rollout.question.index for sample in samples))
    if len(questions) < count:
        with pytest.raises(ValueError, match=f"one question for each of {count} updates, but the batch has"):
            list(mini_batches(samples, count))
        return
    parts = list(mini_batches(samples, count))
    assert len(parts) == count
    assert [id(sample) for part in parts for sample in part] == [id(sample) for sample in samples]
    asked = [list(dict.fromkeys(sample.rollout.question.index for sample in part)) for part in parts]
    assert [question for part in asked for question in part] == questions, "no question is in two mini-batches"
    sizes = [len(part) for part in asked]
    assert max(sizes) - min(sizes) <= 1


@given(samples=batches(taught=False), count=st.integers(2, 4))
def test_mini_batches_of_samples_in_another_order_have_the_same_questions(samples, count):
    """Samples of a question need not be next to each other."""
    turned = [s for k in range(5) for s in _nth_of_each_question(samples, k)]
    if len({s.rollout.question.index for s in samples}) < count:
        return
    plain, mixed = (
        [{s.rollout.question.index for s in part} for part in mini_batches(order, count)] for order in (samples, turned)
    )
    assert plain == mixed
    assert all(not a & b for a, b in pairwise(plain))


def _nth_of_each_question(samples, k):
    groups = {}
    for s in samples:
        groups.setdefault(s.rollout.question.index, []).append(s)
    return [group[k] for group in groups.values() if len(group) > k]
