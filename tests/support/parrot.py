"""A probe whose engine repeats the demonstration that its prompt holds."""

import torch

from pgpo_lightning.commands.probe import measure
from pgpo_lightning.core.types import Question, Rollout
from pgpo_lightning.data.toy import solution
from pgpo_lightning.probe.contexts import CONTEXTS, DEFAULT_CONTROLS, contexts
from pgpo_lightning.probe.measure import Prober
from pgpo_lightning.rewards import BoxedAnswer
from pgpo_lightning.rollout.engine import Engine, Sampling
from tests.support import CONFIGS
from tests.support.helpers import tiny_sdpo

QUICKSTART = CONFIGS / "quickstart.yaml"


def question(index, a=3, b=4, c=5):
    return Question(f"{a}*{b}+{c}?", str(a * b + c), index=index, columns={"a": a, "b": b, "c": c})


class Parrot(Engine):
    """Copies a demonstration; without one it is right two times of four, and three times if the prompt says so."""

    def __init__(self, stop_after=None):
        self.calls, self.left = [], stop_after

    def generate(self, model, tokenizer, questions, prompts, n, sampling):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        made = []
        for asked, ids in zip(questions, prompts, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            self.calls.append((asked.index, n))
            for i in range(n):
                a, b, c = (asked.columns[name] for name in "abc")
                said = solution(a, b, c, error=0 if i < 2 + ("!!" in text) else 1)
                if "Correct solution:" in text:
                    said = text.split("Correct solution:\n\n")[1].split("\n\nCorrectly")[0].split("\nThe following")[0]
                made.append(Rollout(asked, ids, ids[:5], torch.zeros(5), said, True))
        return made


SETTINGS = {
    "split": "validation",
    "module": {"model": "parrot", "verifier": "boxed", "reprompt": {"dont_reprompt_on_self_success": True}},
}


def prober(folder, engine, count=4, **settings):
    module = tiny_sdpo(verifier=BoxedAnswer(feedback=True), engine=engine, max_reprompt_len=300)
    asked = [question(i, 2 + i, 3, 7) for i in range(count)]
    return Prober(module, asked, 4, Sampling(12), 2, 5, folder, {"split": "validation"} | settings)


def probed(folder, engine=None, **settings):
    made = prober(folder, engine or Parrot(), **settings)
    asked = contexts(
        [name for name in CONTEXTS if name != "configured"],
        {"careful": "{prompt}!!"},
        list(DEFAULT_CONTROLS),
        made.module.objective.teaching.builder,
    )
    return measure(made, asked, SETTINGS)
