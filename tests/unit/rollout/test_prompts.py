"""Prompts that end where the answer starts, in tokens that the model knows, by a template that can be used."""

import copy
import warnings

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tokenizers import AddedToken, processors
from transformers import Qwen3ForCausalLM

from pgpo_lightning.core.types import Question
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.modules import GRPO, SDPO
from pgpo_lightning.rollout import chat_template
from pgpo_lightning.rollout.prompts import PromptEncoder
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, tiny_model, tiny_sdpo

TURNS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def tokenizer_with(**attributes):
    tokenizer = copy.deepcopy(TOKENIZER)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def sentencepiece_style(**attributes):
    """A tokenizer that puts <pad> before every text, as others a BOS, and <eos> behind it."""
    tokenizer = tokenizer_with(**attributes)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<pad> $A <eos>", special_tokens=ids)
    assert tokenizer("1")["input_ids"][-1] == tokenizer.eos_token_id
    return tokenizer


# -------------------------------------------------------------------------------------------------- special tokens


def test_no_end_of_sequence_before_the_answer_without_a_chat_template():
    encoder = PromptEncoder(sentencepiece_style(chat_template=None), False)
    text = TOKENIZER("A\n\n1+1=", add_special_tokens=False)["input_ids"]
    assert encoder.question(Question("1+1=", "2", system="A")) == [0, *text]
    assert encoder.messages([{"role": "user", "content": ""}]) == [0]


def test_no_special_token_is_added_to_a_chat_template():
    encoder = PromptEncoder(sentencepiece_style(), False)
    assert encoder.question(Question("1+1=", "2")) == PromptEncoder(TOKENIZER, False).question(Question("1+1=", "2"))
    own = TOKENIZER.chat_template
    encoder = PromptEncoder(
        sentencepiece_style(chat_template="<pad>" + own), False
    )  # a template that writes its own BOS
    ids = encoder.question(Question("1+1=", "2"))
    assert ids.count(0) == 1
    assert ids[-1] == TOKENIZER.convert_tokens_to_ids("<assistant>")


def test_the_teachers_prompt_and_demonstrations_get_none_either():
    module = build(SDPO, tiny_model(), half_right, tokenizer=sentencepiece_style(chat_template=None), **LIMITS)
    assert module.encoder.tokens("1+1=") == TOKENIZER("1+1=", add_special_tokens=False)["input_ids"]
    ids = module.encoder.messages([{"role": "user", "content": "1+1=\nCorrect solution:\n\n2"}])
    assert ids[0] == 0
    assert TOKENIZER.eos_token_id not in ids


def test_a_template_that_ends_a_prompt_is_told_of():
    with pytest.warns(UserWarning, match="ends a prompt with the end-of-sequence token '<eos>'"):
        PromptEncoder(tokenizer_with(chat_template=TURNS + "{{ eos_token }}"), False)


def test_a_system_message_that_no_model_reads_is_told_of():
    drops = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    encoder = PromptEncoder(tokenizer_with(chat_template=drops), False)
    encoder.question(Question("1+1=", "2"))
    with pytest.warns(UserWarning, match="omits the system message of data.jsonl:3"):
        encoder.question(Question("1+1=", "2", system="A", source="data.jsonl:3"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.question(Question("1+2=", "3", system="A"))  # once


# ------------------------------------------------------------------------------------------------------ vocabulary


@pytest.mark.parametrize("lora", [None, LoRA(r=2, lora_alpha=2)])
@pytest.mark.parametrize("kind", [SDPO, GRPO])
def test_a_tokenizer_larger_than_the_embeddings_is_refused_at_start_up(kind, lora):
    limits = LIMITS if kind is SDPO else {k: v for k, v in LIMITS.items() if k != "max_reprompt_len"}
    module = build(kind, tiny_model(vocab_size=200), half_right, tokenizer=TOKENIZER, lora=lora, **limits)
    with pytest.raises(
        MisconfigurationException,
        match=r"239 tokens up to number 238, and they have 200 rows.*`model.model_config.tokenizer`.*resize_token",
    ):
        module.configure_model()


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_an_added_token_above_the_rows_is_refused_where_it_is_used(name):
    tokenizer = tokenizer_with()
    tokenizer.add_special_tokens({name: "<more>"})
    module = build(SDPO, tiny_model(), half_right, tokenizer=tokenizer, **LIMITS)
    with pytest.raises(MisconfigurationException, match=f"`{name}` 239, and they have 239 rows"):
        module.configure_model()


def with_image_token():
    tokenizer = tokenizer_with()
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    return tokenizer


def test_an_added_token_above_the_rows_does_no_harm_until_a_text_has_it():
    """Gemma 3 of 1 B has 262,145 tokens, one of them for images, and 262,144 rows."""
    module = tiny_sdpo()
    module = build(SDPO, tiny_model(), half_right, tokenizer=with_image_token(), **LIMITS)
    module.configure_model()
    assert module.encoder.question(Question("1+1=", "2"))
    with pytest.raises(
        MisconfigurationException, match=r"data.jsonl:3 has '<image>', number 239, and they have 239 rows"
    ):
        module.encoder.question(Question("1+1=<image>", "2", source="data.jsonl:3"))
    with pytest.raises(MisconfigurationException, match="'<image>', number 239"):
        module.encoder.tokens("<image>")


def test_a_prompt_that_was_encoded_before_the_model_came_is_named_then():
    module = build(SDPO, tiny_model(), half_right, tokenizer=with_image_token(), **LIMITS)
    module.encoder.question(
        Question("1+1=<image>", "2", source="data.jsonl:3")
    )  # as prompts that are too long are dropped
    module.encoder.question(Question("1+1=", "2", source="data.jsonl:4"))
    with pytest.raises(MisconfigurationException, match=r"data.jsonl:3 has '<image>', number 239"):
        module.configure_model()


def test_more_rows_than_tokens_are_fine():
    module = build(SDPO, tiny_model(vocab_size=300), half_right, tokenizer=TOKENIZER, **LIMITS)
    module.configure_model()
    assert module.encoder.rows == 300


def test_a_head_with_more_rows_than_the_embeddings_is_refused():
    model = tiny_model(tie_word_embeddings=False)
    model.set_input_embeddings(tiny_model(vocab_size=200).get_input_embeddings())
    assert isinstance(model, Qwen3ForCausalLM)
    module = build(SDPO, model, half_right, tokenizer=TOKENIZER, **LIMITS)
    with pytest.raises(MisconfigurationException, match="it has 200 for 239"):
        module.configure_model()


# --------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 0.5 seconds",
        ),
        ("{{ 'a' * 10 ** 12 }}", "makes more than 1000000 characters of 14"),
        ("{{ 'a' * 2000000 }}", "makes more than 1000000 characters of 14"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "raises OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "raises RecursionError"),
        ("{{ raise_exception('tools only') }}", "raises TemplateError: tools only"),
        ("{{ messages[0].content.no.such }}", "raises UndefinedError"),
        ("{% if", "raises TemplateSyntaxError"),
        ({"tool_use": TURNS}, "raises ValueError: .*no default"),
        ("", "renders nothing"),
        (" \n", "renders nothing"),
        ("{{ messages[0].contents }}<assistant>", r"'What is 2 \+ 3\?' is not in what it renders, '<assistant>'"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_at_start_up(template, problem, monkeypatch):
    if "seconds" in problem:  # the others have the real limit, because this machine may be busy
        monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    with pytest.raises(
        MisconfigurationException,
        match=f"chat template of `.*toy` to render a question, but it {problem}"
        if not problem.startswith("'What")
        else problem,
    ):
        build(SDPO, tiny_model(), half_right, tokenizer=tokenizer_with(chat_template=template), **LIMITS)


def test_a_question_that_the_template_does_not_take_is_named():
    no_system = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    encoder = PromptEncoder(tokenizer_with(chat_template=no_system + "{{ m.content }}{% endfor %}"), False)
    assert encoder.question(Question("1+1=", "2"))
    with pytest.raises(
        MisconfigurationException,
        match=r"turns of data.jsonl:3 \(system, user\), but it raises TemplateError: no system role",
    ):
        encoder.question(Question("1+1=", "2", system="A", source="data.jsonl:3"))


@pytest.mark.parametrize("template", [TOKENIZER.chat_template, None])
def test_half_a_character_is_not_put_down_to_the_template(template):
    encoder = PromptEncoder(tokenizer_with(chat_template=template), False)
    with pytest.raises(
        MisconfigurationException, match=r"whole characters in .*, but got the lone surrogate '\\ud83d' behind '1\+1='"
    ):
        encoder.question(Question("1+1=\ud83d", "2"))
