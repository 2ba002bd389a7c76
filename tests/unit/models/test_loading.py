"""Models and tokenizers: found, compared by architecture and weights, refused where they do not fit."""

import copy
from collections import Counter

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from pgpo_lightning.core.errors import UserError
from pgpo_lightning.core.types import Question
from pgpo_lightning.memory_planner.parameters import configuration
from pgpo_lightning.models.loading import (
    architecture,
    check_architecture,
    checked_tokenizer,
    fingerprint,
    load_model,
    load_tokenizer,
    resolve_model,
)
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.training.mini_batches import mini_batches
from tests.support.helpers import TOKENIZER, random_rows, tiny_model
from tests.support.model_kinds import MODELS


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


@pytest.mark.parametrize("name", [".models/smollm2", "/nowhere/model", "~/model", "runs/mine/model"])
def test_a_folder_that_is_not_there_is_told_as_such(name):
    for load in (load_model, load_tokenizer, configuration):
        with pytest.raises(UserError, match=f"^Expected a model in the folder {name}, but there is no such folder.$"):
            load(name)


def test_what_the_hub_does_not_have_is_an_error_of_the_user():
    for load in (load_model, load_tokenizer, configuration):
        with pytest.raises(UserError, match=r"^Expected the .*`nobody\.has/this` to be usable, but "):
            load("nobody.has/this")


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
        MisconfigurationException, match=rf"the prompt of {named} is a list of messages.*`model.model_config.tokenizer`"
    ):
        encoder.question(Question([{"role": "user", "content": "1+1="}], "2", **where))


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
