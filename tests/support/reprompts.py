"""Samples with given texts, and their reprompts."""

import random

import torch

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.teachers.reprompt import (
    FEEDBACK_TEMPLATE,
    REPROMPT_TEMPLATE,
    SOLUTION_TEMPLATE,
    RepromptBuilder,
)
from tests.support.helpers import TOKENIZER

DEFAULTS = {
    "success_reward_threshold": 0.5,
    "demonstration_choice": "shared",
    "dont_reprompt_on_self_success": True,
    "remove_thinking_from_demonstration": True,
    "include_environment_feedback": True,
    "environment_feedback_only_without_solution": False,
    "max_reprompt_len": 500,
    "reprompt_template": REPROMPT_TEMPLATE,
    "solution_template": SOLUTION_TEMPLATE,
    "feedback_template": FEEDBACK_TEMPLATE,
}
END = "\n\nCorrectly solve the original question."
SOLUTION = "\nCorrect solution:\n\n"
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"


def row(text, reward=0.0, feedback=None, index=0, prompt="Place?", **question):
    asked = Question(prompt, "1", index=index, **question)
    return Sample(Rollout(asked, [4], [6], torch.zeros(1), text, True), Verdict(reward, feedback))


def attach(rows, seed=0, tokenizer=TOKENIZER, **settings):
    encoder = PromptEncoder(tokenizer, False)
    builder = RepromptBuilder(**DEFAULTS | settings)
    return builder.attach(rows, encoder.messages, encoder.tokens, encoder.text, random.Random(seed), encoder.answer)
