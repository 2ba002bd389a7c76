"""Rollouts are samples of the student's own distribution, and their log-probabilities those of a plain forward pass."""

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.types import Question
from pgpo_lightning.models.recomputation import recompute_activations
from pgpo_lightning.models.soundness import way_to_sample
from pgpo_lightning.rollout import transformers_engine
from pgpo_lightning.rollout.engine import NotFiniteError, Sampling
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.helpers import TOKENIZER
from tests.support.sampling import (
    EOS,
    assert_log_probs,
    distribution,
    ending_model,
    generate,
    prompts_of,
    responses,
    watched,
)


def absolute_model():
    """A GPT-2, whose learned positions show every shift."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=EOS, eos_token_id=EOS
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_mode_and_gradient_checkpointing_change_nothing(training, checkpointing):
    prompts = prompts_of(9, 4, 6)
    plain = generate(ending_model(), prompts, n=4)
    model = ending_model()
    if checkpointing:
        recompute_activations(model)
    model.train(training)
    rollouts = generate(model, prompts, n=4)
    assert responses(rollouts) == responses(plain)
    assert_log_probs(model, rollouts)
    assert all(module.training == training for module in model.modules())
    assert model.model.layers[0].gradient_checkpointing == checkpointing


@pytest.mark.parametrize("training", [False, True])
def test_mode_and_settings_come_back_after_an_exception(training):
    model = ending_model().train(training)
    way_to_sample(model, 64)
    settings = model.generation_config
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    handle = model.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, prompts_of(5, 3))
    handle.remove()
    assert model.training == training
    assert model.model.layers[0].training == training
    assert model.generation_config is settings


def test_settings_of_the_model_do_not_reach_the_sampler():
    prompts = prompts_of(8, 3)
    model = ending_model()
    plain = generate(model, prompts, n=3)
    settings = GenerationConfig(
        top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0, no_repeat_ngram_size=1, min_p=0.5, max_length=3,
        do_sample=False, eos_token_id=EOS, use_cache=False, suppress_tokens=list(range(6, 200)),
    )  # fmt: skip
    before = settings.to_dict()
    model.generation_config = settings
    rollouts = generate(model, prompts, n=3)
    assert responses(rollouts) == responses(plain)
    assert_log_probs(model, rollouts)
    assert model.generation_config is settings
    assert settings.to_dict() == before


@pytest.mark.parametrize("make", [ending_model, absolute_model])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_plain_forward_whatever_the_padding(make, temperature):
    model = make()
    # One token alone leaves nothing to run ahead of decoding; next to longer prompts it is all padding there.
    for lengths in [(1,), (1, 1), (7,), (1, 30, 2, 11)]:
        rollouts = generate(model, prompts_of(*lengths), n=3, temperature=temperature)
        assert_log_probs(model, rollouts, temperature)
        assert (torch.cat([r.log_probs for r in rollouts]) < 0).all()


@pytest.mark.parametrize("make", [ending_model, absolute_model])
def test_a_prompt_is_answered_alike_alone_and_beside_longer_ones(make):
    model = make(**({"logit": 0.0} if make is ending_model else {}))
    prompts = prompts_of(4, 33, 1, 17)
    # So cold that the draw does not matter.
    together = generate(model, prompts, temperature=1e-4)
    alone = [generate(model, [prompt], temperature=1e-4)[0] for prompt in prompts]
    assert responses(together) == responses(alone)
    assert len({tuple(ids) for ids in responses(alone)}) == 4


def test_nucleus_sampling_records_the_untruncated_distribution():
    model = ending_model()
    rollouts = generate(model, prompts_of(5, 9), n=8, temperature=0.7, top_p=0.3)
    assert_log_probs(model, rollouts, 0.7)
    for rollout in rollouts:
        p = distribution(model, rollout.prompt_ids, rollout.response_ids[:-1], 0.7).exp()
        for step, token in zip(p, rollout.response_ids, strict=True):
            assert step[step > step[token]].sum() < 0.3 + 1e-5  # every token is of the nucleus


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_have_the_frequencies_of_the_model(temperature):
    model, n = ending_model(), 6000
    (prompt,) = prompts_of(6)
    rollouts = generate(model, [prompt], n=n, temperature=temperature, max_tokens=1)
    counts = Counter(rollout.response_ids[0] for rollout in rollouts)
    expected = n * distribution(model, prompt, temperature=temperature)[0].exp()
    observed = torch.tensor([float(counts[token]) for token in range(len(expected))])
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    degrees = len(expected) - 1
    assert degrees > 100
    assert ((observed - expected).square() / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5


def test_later_tokens_have_the_frequencies_of_the_model():
    # The third token given the first two, which a very likely pair makes frequent enough.
    model, n = ending_model(), 3000
    (prompt,) = prompts_of(6)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # few likely tokens
        model.lm_head.bias[EOS] = -30
    rollouts = generate(model, [prompt], n=n, max_tokens=3)
    (pair, seen), *_ = Counter(tuple(rollout.response_ids[:2]) for rollout in rollouts).most_common(1)
    assert seen > 100
    p = distribution(model, prompt, pair)[-1].exp()
    third = Counter(rollout.response_ids[2] for rollout in rollouts if tuple(rollout.response_ids[:2]) == pair)
    for token in p.topk(5).indices.tolist():
        spread = (seen * p[token] * (1 - p[token])).sqrt()
        assert abs(third[token] - seen * p[token]) < 4 * spread + 1


def test_responses_end_with_the_end_token_or_at_the_limit():
    rollouts = generate(ending_model(), prompts_of(5, 9, 2), n=100, max_tokens=15)
    ended = 0
    for rollout in rollouts:
        ids = rollout.response_ids
        assert EOS not in ids[:-1]
        assert rollout.finished == (ids[-1] == EOS)
        assert len(ids) <= 15 if rollout.finished else len(ids) == 15
        assert rollout.log_probs.shape == (len(ids),)
        assert rollout.text == TOKENIZER.decode([i for i in ids if i not in TOKENIZER.all_special_ids])
        ended += rollout.finished
    assert 60 < ended < 270  # both kinds are there
    assert any(rollout.finished and len(rollout.response_ids) == 15 for rollout in rollouts)  # the end just fits
    # Whole matrices are not kept alive by their rows.
    assert all(r.log_probs.untyped_storage().nbytes() == 4 * len(r.response_ids) for r in rollouts)


@pytest.mark.parametrize("max_sequences", [None, 4])
def test_finished_responses_are_handed_over_while_others_are_sampled(max_sequences):
    model, prompts = ending_model(), prompts_of(5, 9, 2)
    plain = generate(model, prompts, n=6, max_sequences=max_sequences)
    passes, taken, engine = watched(model), [], TransformersEngine(max_sequences)
    asked = [Question(f"question {i}", "1", index=i) for i in range(3)]
    with seeded("test", 0), engine.handing_over(lambda rollout: taken.append((len(passes), rollout))):
        rollouts = engine.generate(model, TOKENIZER, asked, prompts, 6, Sampling(12))
    assert responses(rollouts) == responses(plain)
    assert [r.log_probs.tolist() for r in rollouts] == [r.log_probs.tolist() for r in plain]
    assert sorted(id(rollout) for _, rollout in taken) == sorted(map(id, rollouts))
    assert sum(at < len(passes) for at, _ in taken) > 5  # before the last pass
    if max_sequences is None:  # all of them begin at once: the shortest ends first
        assert [len(r.response_ids) for _, r in taken] == sorted(len(r.response_ids) for r in rollouts)
    assert all(r.log_probs.untyped_storage().nbytes() == 4 * len(r.response_ids) for r in rollouts)


def test_a_response_can_be_nothing_but_the_end():
    rollouts = generate(ending_model(30.0), prompts_of(5, 2), n=2)
    assert responses(rollouts) == [[EOS]] * 4
    assert all(rollout.finished and rollout.text == "" for rollout in rollouts)
    assert_log_probs(ending_model(30.0), rollouts)


def test_a_padding_token_that_is_the_end_token_is_not_counted():
    tokenizer = type(TOKENIZER).from_pretrained(TOKENIZER.name_or_path, pad_token=TOKENIZER.eos_token)
    assert tokenizer.pad_token_id == EOS
    model, prompts = ending_model(), prompts_of(5, 9, 2)
    asked = [Question("?", "1", index=i) for i in range(3)]
    with seeded("test", 0):
        rollouts = TransformersEngine().generate(model, tokenizer, asked, prompts, 8, Sampling(12))
    plain = generate(model, prompts, n=8)
    assert responses(rollouts) == responses(plain)
    assert [r.finished for r in rollouts] == [r.finished for r in plain]


def test_what_a_response_draws_does_not_depend_on_when_others_end(monkeypatch):
    model, prompts = ending_model(), prompts_of(5, 9, 2)
    sizes = watched(model)
    leaving = generate(model, prompts, n=20, max_tokens=30)
    assert min(sizes[1:]) < 30 < max(sizes[1:])  # most have ended and left
    monkeypatch.setattr("pgpo_lightning.rollout.transformers_engine._WORTH_LEAVING", -1.0)
    sizes.clear()
    staying = generate(model, prompts, n=20, max_tokens=30)
    assert set(sizes[1:]) == {60}
    assert responses(leaving) == responses(staying)
    assert_log_probs(model, leaving)


@pytest.mark.parametrize("with_tokenizers_own", [False, True])
def test_several_end_tokens(with_tokenizers_own):
    model = ending_model()
    others = list(range(100, 130))
    model.generation_config.eos_token_id = [*others, EOS] if with_tokenizers_own else others
    rollouts = generate(model, prompts_of(5, 9), n=40)
    ends = {EOS, *others}
    for rollout in rollouts:
        assert not ends & set(rollout.response_ids[:-1])
        assert rollout.finished == (rollout.response_ids[-1] in ends)
        assert rollout.finished or len(rollout.response_ids) == 12
    last = {rollout.response_ids[-1] for rollout in rollouts if rollout.finished}
    assert EOS in last
    assert len(last & set(others)) > 3
    assert_log_probs(model, rollouts)


class Breaking(nn.Module):
    """Spoils the logits of one row from a token on."""

    def __init__(self, model, at, value):
        super().__init__()
        self.calls, self.at, self.value = 0, at, value
        model.register_forward_hook(self.spoil)

    def spoil(self, _, __, output):
        if self.calls >= self.at:
            output.logits[1, -1, 7] = self.value
        self.calls += 1


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("look", [1, 16])
def test_logits_that_are_not_finite_are_an_error_that_says_so(value, at, top_p, look, monkeypatch):
    monkeypatch.setattr("pgpo_lightning.rollout.transformers_engine.look_every", lambda device: look)
    model = ending_model(-30.0)  # nothing ends
    way_to_sample(model, 64)
    Breaking(model, at, value)
    # The first of the passes is over the prompts, whose rows are repeated.
    expected = (
        rf"Expected finite logits, but token {at + 1} of {2 if at == 0 else 1} out of 4 responses .* lower the learning"
    )
    with pytest.raises(NotFiniteError, match=expected):
        generate(model, prompts_of(5, 9), n=2, top_p=top_p)


def test_logits_of_minus_infinity_are_tokens_that_are_never_drawn():
    model = ending_model()

    def forbid(_, __, output):
        output.logits[..., 6:50] = -float("inf")

    model.register_forward_hook(forbid)
    rollouts = generate(model, prompts_of(5, 9), n=20)
    assert not {*range(6, 50)} & {token for ids in responses(rollouts) for token in ids}
    assert all(rollout.log_probs.isfinite().all() for rollout in rollouts)


def test_what_is_not_finite_behind_the_end_of_a_response_is_nobodys_business(monkeypatch):
    model = ending_model(30.0)
    way_to_sample(model, 64)
    # As on a GPU: ended responses stay in the batch.
    monkeypatch.setattr("pgpo_lightning.rollout.transformers_engine.look_every", lambda *_: 10**9)
    Breaking(model, 1, float("nan"))
    rollouts = generate(model, prompts_of(5, 9), n=2)
    assert responses(rollouts) == [[EOS]] * 4


def test_the_nucleus_of_a_long_vocabulary_is_that_of_a_whole_sort(monkeypatch):
    """Sharp rows, wide ones, and flat ones whose nucleus is larger than what is looked through first."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([8.0, 5.0, 3.0, 1.5, 0.5, 0.0]).repeat(50).unsqueeze(1)
    p = (torch.randn(300, 8192, generator=generator) * spread).softmax(-1)
    uniform = torch.rand(300, 1, generator=generator)
    whole = transformers_engine.TopPLogitsWarper(0.9)
    expected = transformers_engine._draw(whole(None, p.log()).exp(), uniform)
    sorted_rows = []

    class Counting(transformers_engine.TopPLogitsWarper):
        def __call__(self, ids, scores):
            sorted_rows.append(len(scores))
            return super().__call__(ids, scores)

    monkeypatch.setattr(transformers_engine, "TopPLogitsWarper", Counting)
    tokens = transformers_engine._draw_nucleus(p, uniform, 0.9)
    flat = spread[:, 0] < 1
    assert torch.equal(tokens[~flat], expected[~flat])
    # Among equal probabilities a sort may choose any tokens.
    assert torch.equal(tokens[spread[:, 0] == 0.5], expected[spread[:, 0] == 0.5])
    assert sorted_rows == [int(((whole(None, p.log()) > -torch.inf).sum(-1) > 1024).sum())]
    assert 0 < sorted_rows[0] < 300


def test_tokens_of_a_nucleus_are_drawn_at_their_probabilities():
    p = torch.full((1, 4096), 1e-9)
    p[0, [7, 4000, 2000]] = torch.tensor([0.5, 0.3, 0.2])
    grid = (torch.arange(1000) + 0.5).div(1000).unsqueeze(1)
    tokens = transformers_engine._draw_nucleus(p.expand(1000, -1), grid, 0.7)
    assert Counter(tokens.tolist()) == {7: 625, 4000: 375}
