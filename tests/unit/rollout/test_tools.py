"""Tools, tool calls and further arguments reach the chat template of student and teacher, or are refused by name."""

import copy
import random

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.training.configs import ModelConfig
from tests.support.helpers import TOKENIZER, tiny_sdpo

TOOL = {"type": "function", "function": {"name": "add"}}
SHOWS = (
    "{% if tools %}{{ tools[0].function.name }} {% endif %}{% for m in messages %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}={{ call.function.name }}={% endfor %} {% endfor %}{{ mood or '' }}"
)
NO_TOOLS = SHOWS.replace("{% if tools %}", "{% if false %}")
NO_CALLS = SHOWS.replace("m.tool_calls or []", "[]")
CALLED = [
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum"}}]},
    {"role": "user", "content": "1+1?"},
]


def encoder(template, **kwargs):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, False, kwargs)


def test_they_reach_student_and_teacher():
    made = encoder(SHOWS, mood="now")
    question = Question(CALLED, "2", tools=[TOOL])
    assert made.question(question) == made.tokens("add =sum= 1+1? now")
    assert made.messages(CALLED) == made.tokens("=sum= 1+1? now")
    sample = Sample(Rollout(question, [], [1], torch.zeros(1), "2", True), Verdict(0.0, "Wrong."))
    builder = tiny_sdpo().objective.teaching.builder
    builder.attach([sample], made.messages, made.tokens, made.text, random.Random(0))
    start = made.tokens("add =sum= 1+1?")
    assert sample.reprompt_ids[: len(start)] == start
    assert len(sample.reprompt_ids) > len(made.question(question))


@pytest.mark.parametrize(
    ("template", "question", "what"),
    [
        (NO_TOOLS, Question("1+1?", "2", tools=[TOOL]), "tools"),
        (NO_CALLS, Question(CALLED, "2"), "tool calls"),
        (NO_CALLS, Question(CALLED, "2", tools=[TOOL]), "tool calls"),
        (None, Question("1+1?", "2", tools=[TOOL]), "tools"),
    ],
)
def test_what_the_template_omits_is_refused(template, question, what):
    with pytest.raises(MisconfigurationException, match=f"a chat template that shows the {what} of question 0"):
        encoder(template).question(question)


def test_arguments_of_a_template_are_checked():
    with pytest.raises(
        ValueError, match=r"no enable_thinking in `model_config.chat_template_kwargs`\. Set `model_config"
    ):
        ModelConfig(chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(ValueError, match=r"in `model_config.chat_template_kwargs`, but got tokenize"):
        ModelConfig(chat_template_kwargs={"tokenize": False})
    with pytest.raises(MisconfigurationException, match=r"chat template for `model_config.chat_template_kwargs`"):
        encoder(None, mood="now")
