"""Thinking that the chat template opens, whatever its tags, and that special tokens enclose."""

import random
import re

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.modules import HAPO, SDPO
from pgpo_lightning.objectives.demonstrations import ColumnDemonstrations
from pgpo_lightning.probe.measure import _sample
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.rollout.thinking import PAIRS, Thinking
from tests.support.helpers import build, half_right, prepare, tiny_model

TEMPLATE = (
    "{%% for m in messages %%}<user>{{ m['content'] }}<eos>{%% endfor %%}"
    "{%% if add_generation_prompt %%}<assistant>%s{%% endif %%}"
)


def bytes_tokenizer(pair=None, special=False, opens=True):
    """Bytes as tokens; a pair of tags is a token each, special or not, and the template opens it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>", "<user>", "<assistant>"])
    if pair is not None:
        parts = [part for tag in pair for part in re.findall(r"<\|.*?\|>|\[.*?\]|◁.*?▷|<[^|].*?>", tag)]
        (core.add_special_tokens if special else core.add_tokens)([AddedToken(part, special=special) for part in parts])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = TEMPLATE % (pair[0] + "\n" if opens and pair else "")
    return tokenizer


def answered(tokenizer, written, reward=1.0):
    """A row with a response of these very tokens."""
    encoder = PromptEncoder(tokenizer, True)
    question = Question("Place?", "1")
    ids = encoder.tokens(written)
    rollout = Rollout(question, encoder.question(question), ids, torch.zeros(len(ids)), encoder.text(ids), True)
    return encoder, Sample(rollout, Verdict(reward))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_what_a_template_opened_is_removed_up_to_the_closing_tag(pair, special):
    opening, closing = pair
    tokenizer = bytes_tokenizer(pair, special)
    for written, left in (
        (f"no: 2.{closing}\n\nIt is 3.", "It is 3."),
        (f"{opening}no: 2.{closing}\n\nIt is 3.", "It is 3."),
        (f"a{closing}x {opening}b{closing} y", "x y"),
        ("cut off while it thi", ""),
    ):
        encoder, row = answered(tokenizer, written)
        assert encoder.answer(row.rollout) == left, written


@pytest.mark.parametrize("special", [False, True])
def test_a_template_that_opens_nothing_leaves_an_answer_alone(special):
    pair = ("[THINK]", "[/THINK]")
    tokenizer = bytes_tokenizer(pair, special, opens=False)
    for written, left in (("It is 3.", "It is 3."), ("a [THINK]b[/THINK] c", "a c"), ("a[/THINK] c", "c")):
        encoder, row = answered(tokenizer, written)
        assert encoder.answer(row.rollout) == left


def test_tags_that_neither_template_nor_vocabulary_has_are_text():
    encoder, row = answered(bytes_tokenizer(), "<reasoning>r</reasoning><answer>3</answer>")
    assert encoder.answer(row.rollout) == row.rollout.text
    encoder, row = answered(bytes_tokenizer(), "<think>r</think>3")
    assert encoder.answer(row.rollout) == "3"


def test_a_text_that_somebody_cut_is_not_taken_for_the_inside_of_a_block():
    encoder, row = answered(bytes_tokenizer(PAIRS[0]), "no: 2.</think>It is 3.")
    row.rollout.text = "is 3."
    assert encoder.answer(row.rollout) == "is 3."


def test_the_closed_block_of_a_template_opens_nothing():
    tokenizer = bytes_tokenizer(PAIRS[0])
    tokenizer.chat_template = TEMPLATE % "<think>\n\n</think>\n\n"
    encoder, row = answered(tokenizer, "It is 3.")
    assert not Thinking(tokenizer).opened_by(row.rollout.prompt_ids)
    assert encoder.answer(row.rollout) == "It is 3."


def test_sdpo_shows_no_thinking_that_its_template_opened():
    tokenizer = bytes_tokenizer(PAIRS[0])
    model = tiny_model(vocab_size=len(tokenizer))
    limits = {"max_prompt_length": 200, "max_reprompt_len": 400, "max_response_length": 60}
    module = build(SDPO, model, half_right, tokenizer=tokenizer, num_generations=2, **limits)
    module.configure_model()
    module.teacher = module.objective.teaching.make(module.model)
    written = (("9", 0.0), ("is 2? no</think>\nIt is 3.", 1.0), ("still thinking", 1.0))
    rows = [answered(tokenizer, text, reward)[1] for text, reward in written]
    prepare(module, rows, random.Random(0))
    assert rows[0].reprompt.startswith("Place?\nCorrect solution:\n\nIt is 3.\n")
    assert rows[1].reprompt is None  # what is all thinking is shown to nobody
    assert rows[2].reprompt == rows[0].reprompt


@pytest.mark.parametrize("written", ["<think>\n2? no</think>3", "2? no</think>3"])
def test_a_demonstration_of_hapo_does_not_open_the_block_again(written):
    tokenizer = bytes_tokenizer(PAIRS[0])
    module = build(
        HAPO,
        tiny_model(vocab_size=len(tokenizer)),
        lambda question, response: 1.0,
        tokenizer=tokenizer,
        demonstrations=ColumnDemonstrations("solution"),
        max_prompt_length=200,
        max_response_length=60,
    )
    demonstration = module.objective.verify(Question("Place?", "3"), written)
    assert tokenizer.decode(demonstration.ids) == "2? no</think>3<eos>"


def test_the_probe_shows_what_a_run_shows():
    tokenizer = bytes_tokenizer(PAIRS[0])
    encoder = PromptEncoder(tokenizer, True)
    for text, left in (("is 2? no</think>\nIt is 3.", "It is 3."), ("still thinking", "")):
        answer = {"text": text, "finished": True, "reward": 1.0, "feedback": None, "answer": "3"}
        assert encoder.answer(_sample(encoder, Question("Place?", "3"), answer).rollout) == left
