"""What training and evaluation have in common: the student answers, the verifier judges."""

from typing import Literal

import lightning as L
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.prompts import PromptEncoder
from pgpo_lightning.records import Question, Rollout, Verdict
from pgpo_lightning.rollout import Engine, Sampling
from pgpo_lightning.sharding import Whole
from pgpo_lightning.verifiers import Verifier, VerifierError, grade


class Acting(L.LightningModule):
    """Samples responses and has them judged."""

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    engine: Engine
    verifier: Verifier
    max_prompt_length: int
    on_verifier_error: Literal["raise", "zero"]
    verifier_errors: int
    placement: Whole

    def sample(self, questions: list[Question], n: int, sampling: Sampling) -> list[Rollout]:
        """Sample `n` responses to every question from the student as it is now."""
        prompts = [self.encoder.question(question) for question in questions]
        for question, prompt in zip(questions, prompts, strict=True):
            if len(prompt) > self.max_prompt_length:  # data that did not come through our data module
                raise ValueError(
                    f"Expected prompts of at most `max_prompt_length`={self.max_prompt_length} tokens, but the one of "
                    f"{question.source or f'question {question.index}'} has {len(prompt)}."
                )
        with self.placement.generation():
            return self.engine.generate(self.model, self.tokenizer, questions, prompts, n, sampling)

    def judge(self, rollouts: list[Rollout]) -> list[Verdict]:
        """Return the verifier's verdict on every rollout.

        Raises:
            VerifierError: If the verifier fails and `on_verifier_error` is ``raise``; names the question.
        """
        verdicts = []
        for rollout in rollouts:
            try:
                verdicts.append(grade(self.verifier, rollout.question, rollout.text))
            except VerifierError:
                if self.on_verifier_error == "raise":
                    raise
                self.verifier_errors += 1
                verdicts.append(Verdict(0.0))
        return verdicts
