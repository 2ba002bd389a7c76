"""Held-out evaluation: avg@k, pass@k, majority@k, lengths, and every answer in a file."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from pgpo_lightning.core.files import write_json
from pgpo_lightning.core.seeding import derive_seed, seeded
from pgpo_lightning.core.types import Question, Rollout, Verdict
from pgpo_lightning.distributed.collectives import gather, on_first_rank, together
from pgpo_lightning.models.loading import fp32_by_default
from pgpo_lightning.monitoring.run_folder import folder_of
from pgpo_lightning.rollout.checks import check_kind
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.training.actor import Actor
from pgpo_lightning.training.base_answers import BaseAnswers
from pgpo_lightning.training.configs import EvaluationConfig
from pgpo_lightning.training.held_out import WITH_ERRORS, HeldOut, result_line, score, score_name
from pgpo_lightning.training.solutions import LogProbs, WorkedSolutions


class Evaluator:
    """The validation and test loops of every module.

    Question i of the split is sampled with the same random numbers in every evaluation of a run, whatever the batch size and the
    number of ranks, so that a change of the score is a change of the model. (In another batch logits may differ in their last
    bits, and that may flip a draw.)

    Args:
        config: How questions are answered.
        max_response_length: Longest response in tokens.
        success_threshold: Rewards of at least this pass.
        encoder: Encodes prompts as for sampling.
        actor: Samples the answers.

    Raises:
        ValueError: If `evaluation.max_sequences` would have no effect.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        max_response_length: int,
        success_threshold: float,
        encoder: PromptEncoder,
        actor: Actor,
    ) -> None:
        self.config = config
        column = config.solution_column
        self.solutions = None if column is None else WorkedSolutions(column, encoder, max_response_length)
        self.sampling = Sampling(max_response_length, config.temperature, config.top_p)
        self.success_threshold = success_threshold
        if config.base_answers is not None:
            actor.base_answers = BaseAnswers(config.base_answers, actor.engine, actor.tokenizer)
        self.actor, self.base_answers, self.engine = actor, actor.base_answers, actor.engine
        if config.max_sequences is not None and not hasattr(actor.engine, "max_sequences"):
            raise ValueError(
                f"Expected no `evaluation.max_sequences` with {type(actor.engine).__name__}, which decides itself how many "
                f"responses it decodes at the same time, but got {config.max_sequences}."
            )
        self.in_step = False
        """Whether ranks have equally many batches of the evaluation that is under way."""
        self.held_out: HeldOut | None = None
        """The last evaluation."""
        self.scores: dict[str, float] = {}
        """Its scores and standard errors, under the names of their curves."""
        self.score_tag = ""
        """The curve of avg@k in the last evaluation."""
        self._results: list[tuple[int, bytes]] = []

    def check_questions(self, questions: Iterable[Question]) -> None:
        """Look at held-out questions before anything is sampled.

        Raises:
            ValueError: If `evaluation.solution_column` is set and a question has no worked solution; names row and field.
        """
        if self.solutions is not None:
            self.solutions.check(questions)

    def start(self, batches: Any) -> None:
        """Start a new evaluation.

        Args:
            batches: This rank's numbers of batches. Ranks with different numbers, as some samplers give them, cannot wait for
                each other after every batch.
        """
        self._results = []
        if self.base_answers is not None:
            self.base_answers.start()
        per_rank = gather(batches)
        self.engine.check_evaluation([sum(each) if isinstance(each, list) else each for each in per_rank])
        self.in_step = len({str(each) for each in per_rank}) == 1

    def answer(
        self,
        questions: list[Question],
        seed: int,
        sample: Callable[[list[Question], int, Sampling], list[Rollout]],
        judge: Callable[[list[Rollout]], list[Verdict]],
        log_probs: LogProbs,
    ) -> None:
        """Answer one batch of questions k times each.

        Args:
            questions: The batch.
            seed: Of the run.
            sample: From questions, samples per question and sampling to rollouts.
            judge: From rollouts to verdicts.
            log_probs: Of given responses, for `evaluation.solution_column`.

        Raises:
            ValueError: If two of them have one `index`, if they are no questions (data of another module), or if one has no
                worked solution.
        """
        k = self.config.samples
        check_kind(questions)
        indices = [question.index for question in questions]
        if len(set(indices)) < len(indices):
            raise ValueError("Expected held-out questions with different `index`: scores are means over questions.")
        seeds = [derive_seed(seed, "evaluation", index) for index in indices]
        # What fails on one rank alone ends all of them.
        early = self.actor.grading_while_sampling()
        with together() if self.in_step else nullcontext(), early, fp32_by_default():
            # Seeded for an engine that does not know `seeds`.
            with seeded(seed, "evaluation", *indices), self.engine.at_once(self.config.max_sequences):
                rollouts = sample(questions, k, replace(self.sampling, seeds=seeds))
            exact = self.solutions and self.solutions.probabilities(questions, log_probs)
            for i, question in enumerate(questions):
                answers = rollouts[i * k : (i + 1) * k]
                with seeded(seed, "verifier", question.index):  # which may draw too
                    verdicts = judge(answers)
                line = result_line(question, answers, verdicts, exact[i] if exact else None)
                self._results.append((question.index, line))

    def predict(
        self,
        questions: list[Question],
        seed: int,
        sample: Callable[[list[Question], int, Sampling], list[Rollout]],
        judge: Callable[[list[Rollout]], list[Verdict]],
    ) -> list[dict[str, Any]]:
        """Answer one batch of questions k times each, with rewards where the question has an answer.

        Args:
            questions: The batch.
            seed: Of the run.
            sample: From questions, samples per question and sampling to rollouts.
            judge: From rollouts to verdicts.

        Returns:
            For each question its `index`, `source` and `prompt`, and of its answers `responses` (text), `lengths` (tokens),
            `finished` (false where the length limit cut it off) and, if ``question.answer`` is known, `rewards`.
        """
        k = self.config.samples
        check_kind(questions)
        seeds = [derive_seed(seed, "evaluation", question.index) for question in questions]
        indices, limit = [question.index for question in questions], self.config.max_sequences
        with fp32_by_default(), seeded(seed, "evaluation", *indices), self.engine.at_once(limit):
            rollouts = sample(questions, k, replace(self.sampling, seeds=seeds))
        results = []
        for i, question in enumerate(questions):
            answers = rollouts[i * k : (i + 1) * k]
            result: dict[str, Any] = {
                "index": question.index,
                "source": question.source,
                "prompt": question.prompt,
                "responses": [rollout.text for rollout in answers],
                "lengths": [len(rollout.response_ids) for rollout in answers],
                "finished": [rollout.finished for rollout in answers],
            }
            if question.answer is not None:
                with seeded(seed, "verifier", question.index):  # which may draw too
                    result["rewards"] = [verdict.reward for verdict in judge(answers)]
            results.append(result)
        return results

    def finish(self, trainer: L.Trainer, step: int, described: dict[str, Any]) -> dict[str, float]:
        """Score all ranks' answers, write them, and keep the scores in :attr:`held_out`.

        Answers of training's own validation are written to ``validation/step=<step>.jsonl`` in the folder of the run. Those of
        ``Trainer.validate`` and ``Trainer.test`` are named ``validate/*`` and ``test/*`` and go to folders of these names, with a
        record (``.json``) of what was evaluated how. Under training's names the log of a run would hold them as its own.

        Args:
            trainer: Says which of the three it is, and where to write.
            step: Batches trained on so far.
            described: What was evaluated, for the record.

        Returns:
            The scores and their standard errors, under the names of their curves.
        """
        if self.base_answers is not None:
            self.base_answers.stop()
        commands: dict[TrainerFn | None, str] = {TrainerFn.VALIDATING: "validate", TrainerFn.TESTING: "test"}
        command = commands.get(trainer.state.fn)
        inside = folder_of(trainer)  # a collective: every rank has to ask
        trial: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set outside of Lightning's Trainer class
        folder = None if trial else inside / (command or "validation")
        file = None if folder is None else folder / f"step={step:06d}.jsonl"
        checkpoint = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
        record = {"command": command, **described, "checkpoint": checkpoint, "step": step}
        name = None if command is None else partial(self._write_record, record)
        lines = (line for _, line in sorted(self._results, key=lambda result: result[0]))
        k, threshold = self.config.samples, self.success_threshold
        found = self.held_out = on_first_rank(lines, partial(score, k=k, threshold=threshold, file=file, name=name))
        self._results = []
        prefix = command or "val"
        self.score_tag = f"{prefix}/{score_name('avg', k)}"
        scores = {f"{prefix}/{score_name(name, k)}": value for name, value in found.scores.items()}
        self.scores = scores | {
            f"{prefix}_standard_error/{score_name(name, k)}": found.errors[name]
            for name in WITH_ERRORS
            if name in found.errors
        }
        return self.scores

    def _write_record(self, record: dict[str, Any], found: HeldOut) -> Path:
        """Write what was evaluated how; return a name for the answers that no other evaluation has."""
        settings = {
            **record,
            "samples": self.config.samples,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "solution_column": self.config.solution_column,
            "max_tokens": self.sampling.max_tokens,
            "questions": found.questions,
            "questions_sha256": found.sha256,
        }
        which = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        if found.path is None:
            raise ValueError("Expected a file of the answers beside the record, but none was written.")
        path = found.path.with_name(f"{found.path.stem}-{which}.jsonl")
        errors = {name: error if math.isfinite(error) else None for name, error in found.errors.items()}
        content = {**settings, "scores": found.scores, "standard_errors": errors}
        write_json(path.with_suffix(".json"), content)
        return path
