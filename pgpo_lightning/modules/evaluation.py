"""Held-out evaluation: avg@k, pass@k, majority@k, lengths, and every answer in a file."""

import hashlib
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from pgpo_lightning.core.seeding import derive_seed, seeded
from pgpo_lightning.core.types import Question
from pgpo_lightning.distributed.collectives import gather, on_first_rank, together
from pgpo_lightning.distributed.stopping import SIGNALS
from pgpo_lightning.models.loading import fp32_by_default
from pgpo_lightning.modules.acting import Acting
from pgpo_lightning.rollout.checks import check_kind
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.training.held_out import SCORES, HeldOut, result_line, score, score_name


class Evaluation(Acting):
    """The validation and test loops of every module.

    Question i of the split is sampled with the same random numbers in every evaluation of a run, whatever the batch size and the
    number of ranks, so that a change of the score is a change of the model. (In another batch logits may differ in their last
    bits, and that may flip a draw.) Validation before the first step (``num_sanity_val_steps=-1``) is logged as step 0.

    Answers of training's own validation are written to ``validation/step=<step>.jsonl`` in the folder of the log. Those of
    ``Trainer.validate`` and ``Trainer.test`` are logged as ``validate/*`` and ``test/*`` and go to folders of these names. Their
    file names differ wherever model, questions or sampling do; a record (``.json``) beside each says what was evaluated how.
    """

    eval_samples: int
    eval_sampling: Sampling
    steps: int
    success_reward_threshold: float
    held_out: HeldOut | None = None
    """The last evaluation."""

    def on_validation_epoch_start(self) -> None:
        """Start a new evaluation."""
        self._results: list[tuple[int, bytes]] = []
        batches = self.trainer.num_test_batches if self.trainer.testing else self.trainer.num_val_batches
        # Ranks with different numbers of batches, as some samplers give them, cannot wait for each other after every one.
        self._in_step = len({str(each) for each in gather(batches)}) == 1

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, questions: list[Question], batch_idx: int) -> None:
        """Answer one batch of questions `eval_samples` times each.

        Raises:
            ValueError: If two of them have one `index`, or if they are no questions: data of another module.
        """
        k = self.eval_samples
        check_kind(questions)
        asked = [question.index for question in questions]
        if len(set(asked)) < len(asked):
            raise ValueError("Expected held-out questions with different `index`: scores are means over questions.")
        seeds = [derive_seed(self.seed, "evaluation", index) for index in asked]
        # What fails on one rank alone ends all of them.
        with together() if self._in_step else nullcontext(), fp32_by_default():
            with seeded(self.seed, "evaluation", *asked):  # for an engine that does not know `seeds`
                rollouts = self.sample(questions, k, replace(self.eval_sampling, seeds=seeds))
            for i, question in enumerate(questions):
                mine = rollouts[i * k : (i + 1) * k]
                with seeded(self.seed, "verifier", question.index):  # which may draw too
                    verdicts = self.judge(mine)
                self._results.append((question.index, result_line(question, mine, verdicts)))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the scores and write the answers."""
        self._finish()

    on_test_epoch_end = on_validation_epoch_end

    def _finish(self) -> None:
        SIGNALS.agree()
        self.count_verifier_errors()
        command = {TrainerFn.VALIDATING: "validate", TrainerFn.TESTING: "test"}.get(self.trainer.state.fn)
        log_dir = self.trainer.log_dir  # a collective: every rank has to ask
        folder = None if log_dir is None or self.trainer.fast_dev_run else Path(log_dir) / (command or "validation")
        file = None if folder is None else folder / f"step={self.steps:06d}.jsonl"
        lines = (line for _, line in sorted(self._results, key=lambda result: result[0]))
        name = None if command is None else partial(self._record, command)
        use = partial(score, k=self.eval_samples, threshold=self.success_reward_threshold, file=file, name=name)
        self.held_out = on_first_rank(lines, use)
        self._results = []
        self._log_scores(command or "val")

    def _log_scores(self, prefix: str) -> None:
        """Log the scores, those of `validate` under that name: under training's the log of a run would hold them as its own."""
        k, found = self.eval_samples, self.held_out
        scores = {f"{prefix}/{score_name(name, k)}": value for name, value in found.scores.items()}
        errors = {
            f"{prefix}_standard_error/{score_name(name, k)}": found.errors[name]
            for name in SCORES
            if name in found.errors
        }
        if self.trainer.sanity_checking:
            # Lightning throws away what is logged here; it is the score of the base model.
            for logger in self.trainer.loggers:
                logger.log_metrics(scores | errors, step=0)
            return
        self.log_dict({**scores, **errors, "step": float(self.steps)})
        self.log("score", found.scores["avg"], prog_bar=True, logger=False)

    def _record(self, command: str, found: HeldOut) -> Path:
        """Write what was evaluated how; return a name for the answers that no other evaluation has."""
        model: Any = getattr(self, "given_model", None)
        settings = {
            "command": command,
            "model": model if isinstance(model, str) else type(model).__name__,
            "checkpoint": None if self.trainer.ckpt_path is None else str(self.trainer.ckpt_path),
            "step": self.steps,
            "seed": self.seed,
            "samples": self.eval_samples,
            "temperature": self.eval_sampling.temperature,
            "top_p": self.eval_sampling.top_p,
            "max_tokens": self.eval_sampling.max_tokens,
            "questions": found.questions,
            "questions_sha256": found.sha256,
        }
        which = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        path = found.path.with_name(f"{found.path.stem}-{which}.jsonl")
        errors = {name: error if math.isfinite(error) else None for name, error in found.errors.items()}
        content = {**settings, "scores": found.scores, "standard_errors": errors}
        path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path
