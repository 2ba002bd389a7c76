"""What training and evaluation have in common: the student answers, the verifier judges."""

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Literal

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.core.seeding import generators_kept, global_seed, has_global_seed
from pgpo_lightning.core.types import Question, Rollout, Verdict
from pgpo_lightning.distributed.collectives import gather, together
from pgpo_lightning.distributed.fsdp import Placement
from pgpo_lightning.distributed.stopping import SIGNALS
from pgpo_lightning.rewards.grade import Verifier, check_question, grade
from pgpo_lightning.rollout.checks import check_rollouts
from pgpo_lightning.rollout.engine import Engine, NotFiniteError, Sampling
from pgpo_lightning.rollout.prompts import PromptEncoder


class Acting(L.LightningModule):
    """Samples responses and has them judged."""

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    engine: Engine
    verifier: Verifier
    max_prompt_length: int
    on_verifier_error: Literal["raise", "zero"]
    steps: int
    verifier_errors: int
    """Responses that the verifier failed on, of all ranks and up to the last step or evaluation."""

    _new_verifier_errors: int
    """Of this rank, since then."""
    placement: Placement
    given_seed: int | None
    _decided_seed: int | None = None
    _in_step = False
    """Whether ranks have equally many batches of the evaluation that is under way."""

    @property
    def seed(self) -> int:
        """The seed of every random choice of the run: the module's own, else Lightning's as it was when a Trainer started."""
        own = self.given_seed if self._decided_seed is None else self._decided_seed
        return global_seed() if own is None else own

    def decide_seed(self) -> None:
        """Take Lightning's seed for good, if the module has none of its own.

        Raises:
            MisconfigurationException: If ranks have different seeds.
        """
        self._decided_seed = None
        seeds = gather(self.seed)
        if len(set(seeds)) > 1:
            raise MisconfigurationException(
                f"Expected every rank to have the same seed, but got {', '.join(map(str, seeds))}. Call "
                "`lightning.seed_everything` in every process, or set `seed`."
            )
        self._decided_seed = seeds[0]

    def take_over_seed(self, saved: int | None) -> None:
        """Go on with the seed of a checkpoint.

        Args:
            saved: Of the checkpoint; null if it is of a version that did not save it.

        Raises:
            MisconfigurationException: If this run was given another one.
        """
        if saved is None or saved == self.seed:
            return
        if self.given_seed is not None or has_global_seed():
            raise MisconfigurationException(
                f"Expected the seed of the checkpoint, {saved}, but got {self.seed}: the run would not be the one that was "
                f"interrupted. Set `seed_everything` to {saved}, or start a new run from the checkpoint's weights."
            )
        self._decided_seed = saved

    def sample(self, questions: list[Question], n: int, sampling: Sampling) -> list[Rollout]:
        """Sample `n` responses to every question from the student as it is now.

        Raises:
            ValueError: If a prompt is too long, or if an engine returns something else than what was asked for.
            NotFiniteError: If the student's logits are not finite; names the step.
        """
        # Under sharded weights what fails before the first forward pass would leave the other ranks in it.
        with together() if self.placement.sharded else nullcontext():
            prompts = [self._encoded(question) for question in questions]
        # Evaluation in step exchanges something after every batch, so that no rank may leave a batch alone.
        all_ranks = self._trainer is None or self.trainer.training or self._in_step or self.placement.sharded
        try:
            with self.placement.generation(), SIGNALS.section(all_ranks):
                rollouts = self.engine.generate(self.model, self.tokenizer, questions, prompts, n, sampling)
        except NotFiniteError as error:
            raise NotFiniteError(f"At step {self.steps}: {error}") from error
        check_rollouts(rollouts, questions, n, type(self.engine).__name__)
        return rollouts

    def _encoded(self, question: Question) -> list[int]:
        prompt = self.encoder.question(question)
        if len(prompt) > self.max_prompt_length:  # data that did not come through our data module
            raise ValueError(
                f"Expected prompts of at most `max_prompt_length`={self.max_prompt_length} tokens, but the one of "
                f"{question.source or f'question {question.index}'} has {len(prompt)}."
            )
        return prompt

    def judge(self, rollouts: list[Rollout]) -> list[Verdict]:
        """Return the verifier's verdict on every rollout.

        The verifier may draw from the global generators; what follows does not depend on how much it draws.

        Raises:
            VerifierError: If the verifier fails and `on_verifier_error` is ``raise``; names the question.
        """
        with generators_kept():
            return [self._judge(rollout) for rollout in rollouts]

    def _judge(self, rollout: Rollout) -> Verdict:
        try:
            return grade(self.verifier, rollout.question, rollout.text)
        except VerifierError as error:
            if self.on_verifier_error == "raise":
                raise
            if self.verifier_errors + self._new_verifier_errors == 0:
                warnings.warn(
                    f"The reward is 0 where the verifier fails, because `on_verifier_error` is zero. The first time: {error} "
                    "Later ones are only counted: see rollout/verifier_errors.",
                    stacklevel=2,
                )
            self._new_verifier_errors += 1
            return Verdict(0.0)

    def count_verifier_errors(self) -> None:
        """Add what has failed since the last time, on all ranks; every rank has to call it."""
        self.verifier_errors += sum(gather(self._new_verifier_errors))
        self._new_verifier_errors = 0

    def check_questions(self, questions: Iterable[Question]) -> None:
        """Let the verifier look at questions before anything is sampled.

        Raises:
            ValueError: If it cannot judge one of them; names the row.
        """
        for question in questions:
            check_question(self.verifier, question)
