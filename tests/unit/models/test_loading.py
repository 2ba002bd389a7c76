"""Models, prompts and batches: our logits are the model's own, and padding changes nothing."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3ForCausalLM,
)

from pgpo_lightning.core.types import Question, Sample
from pgpo_lightning.models.lm_head import check_head, decoder, head, source
from pgpo_lightning.models.loading import (
    architecture,
    check_architecture,
    checked_tokenizer,
    fingerprint,
    load_model,
    load_tokenizer,
    recompute_activations,
    resolve_model,
)
from pgpo_lightning.models.packing import Sequences, SharedSequences
from pgpo_lightning.models.soundness import shares_prompts
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.training.mini_batches import micro_batches, mini_batches
from tests.support.architectures import tiny
from tests.support.helpers import TOKENIZER, random_rows, tiny_model

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def build(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


MODELS = {
    "qwen3 tied": lambda: tiny_model(tie_word_embeddings=True),
    "qwen3 untied": lambda: tiny_model(tie_word_embeddings=False),
    "gemma2": lambda: build(Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=1.5, sliding_window=8)),
    "gemma2 uncapped": lambda: build(Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=None)),
    "cohere": lambda: build(
        CohereForCausalLM, CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.0625)
    ),
    "granite": lambda: build(
        GraniteForCausalLM, GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=8.0)
    ),
    "gpt2": lambda: build(
        GPT2LMHeadModel,
        GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1),
    ),
}


def token_ids(rows, length, seed=0):
    return torch.randint(5, len(TOKENIZER), (rows, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------- head


@pytest.mark.parametrize("name", MODELS)
def test_head_gives_the_logits_of_the_model(name):
    model = MODELS[name]().eval()
    ids = token_ids(2, 9)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(head(model)(hidden), logits, rtol=1e-5, atol=1e-6)
        bare = model.get_output_embeddings()(hidden)
    if name in ("gemma2", "cohere", "granite"):  # else the case would prove nothing
        assert (bare - logits).abs().max() > 0.1 * bare.abs().max()
    check_head(model)


def test_head_takes_hidden_states_of_another_type():
    model = tiny_model().to(torch.bfloat16)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    logits = head(model)(hidden)
    assert logits.shape == (3, len(TOKENIZER))
    torch.testing.assert_close(logits, hidden.to(torch.bfloat16) @ model.lm_head.weight.T)


class Doubling(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("training", [False, True])
def test_check_head_finds_what_it_does_not_know(training):
    torch.manual_seed(0)
    with pytest.raises(MisconfigurationException, match=r"logits of Doubling .* differ by [0-9.]+\. .* not supported"):
        check_head(Doubling(tiny_model().config))  # whose logits at initialization are small
    model = tiny_model(attention_dropout=0.5).train(training)
    check_head(model)
    assert model.training == training
    assert model.model.layers[1].training == training


def test_check_head_finds_a_bias_that_is_not_in_the_embedding():
    model = tiny_model()
    bias = torch.linspace(-0.1, 0.1, len(TOKENIZER))
    model.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits + bias))
    with pytest.raises(MisconfigurationException, match="differ by"):
        check_head(model)


def test_the_decoder_is_found_where_it_has_another_name():
    model = tiny("llama4_text")
    assert model.get_decoder() is model  # what transformers finds
    assert decoder(model) is model.model
    check_head(model)


@pytest.mark.parametrize("name", ["modernbert-decoder", "roberta", "inkling_text"])
def test_a_head_that_does_more_is_refused_in_one_line(name):
    model = tiny(name)
    with pytest.raises(MisconfigurationException, match=rf"logits of {type(model).__name__} .* not supported") as error:
        check_head(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", [TypeError("unexpected\nargument"), AttributeError("no attribute 'x'")])
def test_what_cannot_even_be_run_is_refused_in_one_line(fault):
    model = tiny_model()

    def fail(*_):
        raise fault

    model.model.register_forward_pre_hook(fail)
    with pytest.raises(
        MisconfigurationException, match=rf"Qwen3ForCausalLM .* ended in {type(fault).__name__}: "
    ) as error:
        check_head(model)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is fault


@pytest.mark.parametrize("where", [slice(None), 7])
def test_weights_that_are_not_finite_are_named(where):
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[where] = float("nan")
    with pytest.raises(MisconfigurationException, match="Expected finite logits from Qwen3ForCausalLM"):
        check_head(model)


def test_tokens_that_are_never_drawn_hide_nothing():
    model = tiny_model()

    def forbid(_, __, output):
        output.logits[..., 7] = -float("inf")
        output.logits[..., 8] += 0.1

    model.register_forward_hook(forbid)
    with pytest.raises(MisconfigurationException, match="differ by"):
        check_head(model)


@pytest.mark.parametrize("name", ["falcon_h1", "recurrent_gemma", "xlstm"])
def test_scales_and_caps_by_their_other_names(name):
    key = {"falcon_h1": "lm_head_multiplier", "recurrent_gemma": "logits_soft_cap", "xlstm": "output_logit_soft_cap"}[
        name
    ]
    model = tiny(name, **{key: 0.37})
    bare = model.get_output_embeddings()(decoder(model)(token_ids(1, 5) % 96, use_cache=False).last_hidden_state)
    assert (
        head(model)(decoder(model)(token_ids(1, 5) % 96, use_cache=False).last_hidden_state) - bare
    ).abs().max() > 0.1
    check_head(model)


# ------------------------------------------------------------------------------------------------------------ identity


def test_check_architecture_names_what_differs():
    model = tiny_model()
    check_architecture(architecture(model), tiny_model(seed=1, attention_dropout=0.1))
    with pytest.raises(MisconfigurationException) as error:
        check_architecture(
            architecture(model), tiny_model(hidden_size=64, num_hidden_layers=3, tie_word_embeddings=False)
        )
    assert (
        "hidden_size 32 instead of 64, num_hidden_layers 2 instead of 3, tie_word_embeddings True instead of False. "
        in str(error.value)
    )
    with pytest.raises(MisconfigurationException, match="model_type 'gpt2' instead of 'qwen3', hidden_size"):
        check_architecture(architecture(MODELS["gpt2"]()), model)


def test_fingerprint_is_equal_for_equal_weights_and_sees_every_parameter():
    model = tiny_model(tie_word_embeddings=False, vocab_size=1000)  # more elements than are hashed
    original = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == original
    assert fingerprint(tiny_model(tie_word_embeddings=False, vocab_size=1000).train()) == original
    seen = {original, fingerprint(tiny_model(seed=1, tie_word_embeddings=False, vocab_size=1000))}
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).add_(1e-6)
        seen.add(fingerprint(changed))
    assert len(seen) == 2 + len(names)
    assert fingerprint(model) == original


def test_fingerprint_sees_names_and_shapes():
    flat = [nn.Linear(a, b, bias=False) for a, b in ((2, 3), (3, 2), (6, 1))]
    for layer in flat:
        layer.weight.data = torch.arange(6.0).view_as(layer.weight)
    assert len({fingerprint(model) for model in (*flat, nn.Sequential(flat[0]))}) == 4


def test_toy_is_found_and_loaded_in_the_asked_type():
    for dtype in ("float32", "bfloat16"):
        model = load_model("toy", dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert resolve_model("org/name") == "org/name"


# ----------------------------------------------------------------------------------------------------------- tokenizer


def other_tokenizer(**attributes):
    tokenizer = copy.deepcopy(TOKENIZER)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    other_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(
        MisconfigurationException, match=rf"`{tmp_path}` to have an end-of-sequence token.*Set `eos_token`"
    ):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    other_tokenizer(pad_token=None).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 1)
    assert checked_tokenizer(TOKENIZER).pad_token_id == 0  # what is there stays


THINKING = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is not defined %}?"
    "{% elif enable_thinking %}1{% else %}0{% endif %}{% endif %}"
)


@pytest.mark.parametrize("thinking", [False, True])
def test_chat_template_with_system_message_and_thinking_flag(thinking):
    encoder = PromptEncoder(other_tokenizer(chat_template=THINKING), thinking)
    ids = encoder.question(Question("1+1", "2", system="A"))
    assert TOKENIZER.decode(ids) == f"<system>A<user>1+1<assistant>{int(thinking)}"
    turns = [{"role": r, "content": c} for r, c in (("user", "1+1"), ("assistant", "2"), ("user", "3"))]
    ids = encoder.question(Question(turns, "2", system="A"))
    assert TOKENIZER.decode(ids) == f"<system>A<user>1+1<assistant>2<user>3<assistant>{int(thinking)}"
    ids = encoder.question(Question(turns, "2", system=""))
    assert TOKENIZER.decode(ids).startswith("<system><user>1+1")


def test_tokens_and_text_add_and_keep_no_special_tokens():
    encoder = PromptEncoder(TOKENIZER, False)
    ids = encoder.tokens(" A b")
    assert TOKENIZER.convert_ids_to_tokens(ids) == [" A", " b"]
    assert encoder.text([4, *ids, 1, 0]) == " A b"


def test_plain_text_without_a_chat_template():
    encoder = PromptEncoder(other_tokenizer(chat_template=None), False)
    assert encoder.question(Question("1+1=", "2")) == TOKENIZER("1+1=")["input_ids"]
    assert encoder.question(Question("1+1=", "2", system="A")) == TOKENIZER("A\n\n1+1=")["input_ids"]
    assert encoder.text(encoder.question(Question("1+1=", "2", system="A"))) == "A\n\n1+1="


@pytest.mark.parametrize(("where", "named"), [({"source": "data.jsonl:7"}, "data.jsonl:7"), ({"index": 12}, "12")])
def test_messages_need_a_chat_template(where, named):
    encoder = PromptEncoder(other_tokenizer(chat_template=None), False)
    with pytest.raises(
        MisconfigurationException, match=rf"the prompt of {named} is a list of messages.*`model.tokenizer`"
    ):
        encoder.question(Question([{"role": "user", "content": "1+1="}], "2", **where))


# ----------------------------------------------------------------------------------------------------------- sequences


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


# -------------------------------------------------------------------------------------------------------- micro-batches


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
    assert [[size(row) for row in group] for group in micro_batches(rows, budget, alone, "never")] == groups


def both(row: Sample) -> list[list[int]]:
    return [row.rollout.prompt_ids, row.reprompt_ids or [3]]


def padded(group, contexts, share):
    """Tokens of the largest forward pass, counted from what is packed."""
    sizes = []
    for prompts in zip(*map(contexts, group), strict=True):
        pairs = [(prompt, row.rollout.response_ids) for prompt, row in zip(prompts, group, strict=True)]
        packed = Sequences.pack(pairs, 0, CPU, share)
        apart = isinstance(packed, SharedSequences)
        sizes.append(packed.prompts.numel() + packed.responses.numel() if apart else packed.input_ids.numel())
    return sizes


@pytest.mark.parametrize("share", ["never", "if-cheaper", "always"])
@pytest.mark.parametrize("budget", [5, 60, 100, 333, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget, share):
    rows = random_rows(40)
    groups = micro_batches(rows, budget, both, share)
    assert Counter(id(row) for group in groups for row in group) == Counter(map(id, rows))
    assert all(len(group) == 1 or max(padded(group, both, share)) <= budget for group in groups)
    assert micro_batches([], budget, both, share) == []


def test_rows_with_the_same_prompt_stay_together_where_that_is_cheaper():
    def tokens(rows, share):
        return sum(sum(padded(group, alone, share)) for group in micro_batches(rows, 200, alone, share))

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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["activation", "gradient"])
def test_activations_are_recomputed_under_the_name_that_transformers_has_for_it(name):
    asked = {}
    recompute_activations(SimpleNamespace(**{f"{name}_checkpointing_enable": asked.update}))
    assert asked == {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    model = MODELS["qwen3 tied"]()
    recompute_activations(model)
    assert model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_mini_batches_are_whole_questions_and_hold_all_rows_once(count):
    rows = random_rows(10)  # two of each of five questions
    rows = [rows[i] for i in (4, 0, 6, 5, 1, 9, 2, 8, 7, 3)]
    parts = list(mini_batches(rows, count))
    assert len(parts) == count
    assert Counter(id(row) for part in parts for row in part) == Counter(map(id, rows))
    asked = [list(dict.fromkeys(row.rollout.question.index for row in part)) for part in parts]
    assert [index for part in asked for index in part] == [
        2,
        0,
        3,
        4,
        1,
    ]  # in the order of the batch, none in two mini-batches
    assert max(map(len, asked)) - min(map(len, asked)) <= 1
    for part in parts:
        positions = [next(i for i, row in enumerate(rows) if row is mine) for mine in part]
        assert positions == sorted(positions)


def test_mini_batches_need_a_question_each():
    with pytest.raises(ValueError, match="at least one question for each of 6 updates, but the batch has 5"):
        list(mini_batches(random_rows(10), 6))
