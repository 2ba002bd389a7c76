"""Prompts that are encoded many at once: the same token ids, warnings and errors as one by one, in the same order."""

import copy
import warnings

import pytest
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerBase, PythonBackend
from transformers.utils import logging

from pgpo_lightning.core.types import Question
from pgpo_lightning.data.toy import ToyArithmetic
from pgpo_lightning.rollout import prompts
from pgpo_lightning.rollout.prompt_batches import AT_ONCE, encode_together
from pgpo_lightning.rollout.prompts import PromptEncoder
from tests.support.helpers import TOKENIZER

DROPS_SYSTEM = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
RAISES = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index }}{{ m.content | trim }}{% endfor %}{{ enable_thinking }}"


def tokenizer_with(cls=None, **attributes):
    tokenizer = copy.deepcopy(TOKENIZER)
    if cls is not None:
        tokenizer.__class__ = cls
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def prefixed(**attributes):
    tokenizer = tokenizer_with(**attributes)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<pad> $A <eos>", special_tokens=ids)
    return tokenizer


def expanding():
    """A tokenizer whose normalizer makes texts longer, as NFKC does with some characters."""
    tokenizer = tokenizer_with()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("+", " plus plus ")
    return tokenizer


def with_image_token():
    tokenizer = tokenizer_with()
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    return tokenizer


class Templated(type(TOKENIZER)):
    """A tokenizer with code of its own, as some models bring it."""

    def apply_chat_template(self, conversation, **options):
        assert isinstance(conversation[0], dict), "takes one conversation only"
        return super().apply_chat_template(conversation, **options)


class Characters(PythonBackend):
    """A tokenizer in Python."""

    vocab_size = 200
    model_input_names = ("input_ids",)

    def get_vocab(self):
        return {chr(i): i for i in range(200)}

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return min(ord(token), 199)

    def _convert_id_to_token(self, index):
        return chr(index)


TOKENIZERS = {
    "template": tokenizer_with,
    "no template": lambda: tokenizer_with(chat_template=None),
    "prefix": lambda: prefixed(chat_template=None),
    "prefix and template": prefixed,
    "numbered": lambda: tokenizer_with(chat_template=NUMBERED),
    "named templates": lambda: tokenizer_with(chat_template={"default": NUMBERED, "tool_use": RAISES}),
    "no system": lambda: tokenizer_with(chat_template=DROPS_SYSTEM),
    "raises": lambda: tokenizer_with(chat_template=RAISES),
    "expanding": expanding,
    "image": with_image_token,
    "short": lambda: tokenizer_with(model_max_length=30),
    "own code": lambda: tokenizer_with(Templated),
    "python": lambda: Characters(eos_token="e", pad_token="p", unk_token="u", chat_template=NUMBERED),
}

LONG = Question("12 + 7 = ? " * 9, "19", source="d:2")
DATA = {
    "plain": [],
    "long": [LONG],
    "system": [Question("1+1", "2", system="You count.", source="d:1"), Question("2", "2", system="A", source="d:2")],
    "a template that refuses": [LONG, Question("no", "2", source="d:3"), Question("no", "2", source="d:4")],
    "refuses after a warning": [Question("1", "2", system="S", source="d:1"), Question("no", "2", source="d:4")],
    "no token": [Question("1<image>", "2", source="d:9"), Question("2<image>", "2", source="d:1")],
    "half a character": [Question("1+1=\ud83d", "2", source="d:3")],
    "messages": [Question([{"role": "user", "content": "1"}, {"role": "user", "content": "2"}], "2", source="d:1")],
    "empty": [Question("", "2"), Question([], "2", source="d:5")],
    "odd": [Question([["1"]], "2", source="d:5")],
    "no content": [Question([{"role": "user"}], "2", source="d:5")],
}


def outcome(make, asked, rows, together):
    """Everything that a caller can see: token ids up to an error, the error, all warnings, and what is kept for later."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = []
        patch.setattr(logging.get_logger("transformers.tokenization_utils_base"), "warning", told.append)
        tokenizer = make()
        encoder = PromptEncoder(tokenizer, False)
        encoder.rows = rows
        found, error = [], None
        try:
            found.extend(encoder.questions(asked) if together else map(encoder.question, asked))
        except Exception as raised:
            error = (type(raised), str(raised))
        return found, error, [str(w.message) for w in caught], told, encoder._highest, tokenizer.deprecation_warnings


@pytest.mark.parametrize("rows", [None, 239])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_together_is_as_one_by_one(kind, data, rows):
    plain = [Question(f"{i} + {i * 7} = ?", str(8 * i), source=f"d:{i}") for i in range(12)]
    asked = [*plain[:5], *DATA[data], *plain[5:]]
    assert outcome(TOKENIZERS[kind], asked, rows, True) == outcome(TOKENIZERS[kind], asked, rows, False)


def test_the_cases_have_what_they_are_for():
    """Warnings, errors and token ids that differ: a comparison of nothing with nothing would show nothing."""
    seen = {
        name: outcome(TOKENIZERS[kind], DATA[data], rows, True)
        for name, kind, data, rows in [
            ("system", "no system", "system", None),
            ("raises", "raises", "refuses after a warning", None),
            ("image", "image", "no token", 239),
            ("kept", "image", "no token", None),
            ("long", "short", "long", None),
        ]
    }
    assert "omits the system message of d:1" in seen["system"][2][0]
    assert "turns of d:4 (user), but it raises TemplateError: no" in seen["raises"][1][1]
    assert "d:9 has '<image>', number 239" in seen["image"][1][1]
    assert seen["kept"][4] == (239, "d:9")
    assert "longer than the specified maximum sequence length" in seen["long"][3][0]


@pytest.mark.parametrize(
    ("kind", "many"),
    [("template", True), ("no template", True), ("prefix", True), ("own code", False), ("python", False)],
)
def test_which_tokenizers_take_many_at_once(kind, many):
    questions = ToyArithmetic().load("train")[:3]
    found = encode_together(TOKENIZERS[kind](), questions, False)
    assert (found is not None) == many
    assert not many or len(found) == 3


def test_a_tokenizer_that_was_patched_is_asked_one_by_one():
    tokenizer = tokenizer_with()
    tokenizer.apply_chat_template = lambda *_, **__: {"input_ids": [7]}
    assert encode_together(tokenizer, ToyArithmetic().load("train")[:3], False) is None


def test_an_ordinary_call_is_made_for_one_question_of_many(monkeypatch):
    """What the start-up saves: the toy's 21,900 questions are not encoded by a call each."""
    calls, ordinary = [], PreTrainedTokenizerBase.__call__

    def counted(self, *args, **options):
        calls.append(args)
        return ordinary(self, *args, **options)

    questions = ToyArithmetic().load("train")[: 2 * AT_ONCE + 1]
    encoder = PromptEncoder(TOKENIZER, False)
    alone = [encoder.question(question) for question in questions]
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    assert list(encoder.questions(questions)) == alone
    assert len(calls) == 3
    assert prompts.AT_ONCE == AT_ONCE


def test_an_encoding_that_differs_from_the_ordinary_one_is_not_used(monkeypatch):
    """A tokenizer of a later version may do more around the library than it does today."""
    ordinary = TOKENIZER.__class__._encode_plus

    def longer(self, *args, **options):
        encoding = ordinary(self, *args, **options)
        encoding["input_ids"] = [*encoding["input_ids"], 5]
        return encoding

    monkeypatch.setattr(TOKENIZER.__class__, "_encode_plus", longer)
    monkeypatch.setattr("pgpo_lightning.rollout.prompt_batches.TokenizersBackend._encode_plus", longer)
    assert encode_together(TOKENIZER, ToyArithmetic().load("train")[:3], False) is None
