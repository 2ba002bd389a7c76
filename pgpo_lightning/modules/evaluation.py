"""Held-out evaluation: avg@k, pass@k, majority@k, lengths, and every answer in a file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pgpo_lightning.metrics import AvgAtK, CutOffShare, MajorityAtK, MeanLength, PassAtK
from pgpo_lightning.modules.acting import Acting
from pgpo_lightning.policy import fp32_by_default
from pgpo_lightning.ranks import gather
from pgpo_lightning.records import Question, Rollout, Verdict
from pgpo_lightning.rollout import Sampling
from pgpo_lightning.seeding import derive_seed, seeded


class Evaluation(Acting):
    """The validation and test loops of every module.

    Question i of the split is sampled with the same random numbers in every evaluation of a run, whatever the batch size and the
    number of ranks, so that a change of the score is a change of the model. (In another batch logits may differ in their last
    bits, and that may flip a draw.) Validation before the first step (``num_sanity_val_steps=-1``) is logged as step 0.
    """

    eval_samples: int
    eval_sampling: Sampling
    steps: int
    success_reward_threshold: float

    def on_validation_epoch_start(self) -> None:
        """Start a new evaluation."""
        k = self.eval_samples
        metrics = {
            "avg": AvgAtK(),
            "pass": PassAtK(k, threshold=self.success_reward_threshold),
            "maj": MajorityAtK(),
            "length": MeanLength(),
            "cut_off": CutOffShare(),
        }
        # A plain attribute: as registered modules the metrics would enter checkpoints. On the device, where ranks exchange them.
        object.__setattr__(self, "_metrics", {name: metric.to(self.device) for name, metric in metrics.items()})
        self._results: list[dict[str, Any]] = []

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, questions: list[Question], batch_idx: int) -> None:
        """Answer one batch of questions `eval_samples` times each."""
        k = self.eval_samples
        asked = [question.index for question in questions]
        seeds = [derive_seed(self.seed, "evaluation", index) for index in asked]
        verdicts = []
        with fp32_by_default():
            with seeded(self.seed, "evaluation", *asked):  # for an engine that does not know `seeds`
                rollouts = self.sample(questions, k, replace(self.eval_sampling, seeds=seeds))
            for i, index in enumerate(asked):
                with seeded(self.seed, "verifier", index):  # which may draw too
                    verdicts += self.judge(rollouts[i * k : (i + 1) * k])
        index = torch.tensor([rollout.question.index for rollout in rollouts], device=self.device)
        reward, length, cut_off = (
            # Lightning's bf16-true makes bf16 the default type, in which a length of 301 is 300.
            torch.tensor(values, dtype=torch.float32, device=self.device)
            for values in (
                [verdict.reward for verdict in verdicts],
                [len(rollout.response_ids) for rollout in rollouts],
                [not rollout.finished for rollout in rollouts],
            )
        )
        self._metrics["avg"].update(index, reward)
        self._metrics["pass"].update(index, reward)
        self._metrics["maj"].update(index, reward, [verdict.answer for verdict in verdicts])
        self._metrics["length"].update(index, length)
        self._metrics["cut_off"].update(index, cut_off)
        for i, question in enumerate(questions):
            mine = slice(i * k, (i + 1) * k)
            self._results.append(_result(question, rollouts[mine], verdicts[mine]))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the scores and write the answers."""
        self._finish("val", "validation")

    def on_test_epoch_end(self) -> None:
        """Log the scores and write the answers."""
        self._finish("test", "test")

    def _finish(self, prefix: str, folder: str) -> None:
        k = self.eval_samples
        computed = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        scores = {
            f"{prefix}/avg@{k}": computed["avg"],
            f"{prefix}/pass@{k}": computed["pass"],
            f"{prefix}/length": computed["length"],
            f"{prefix}/cut_off": computed["cut_off"],
        }
        results = {result["index"]: result for part in gather(self._results) for result in part}
        # Without answers to vote on there is no majority, rather than one of zero.
        if any(answer is not None for result in results.values() for answer in result["answers"]):
            scores[f"{prefix}/maj@{k}"] = computed["maj"]
        if self.trainer.sanity_checking:
            # Lightning throws away what is logged here; it is the score of the base model.
            if self.logger is not None:
                self.logger.log_metrics(scores, step=0)
        else:
            self.log_dict({**scores, "step": float(self.steps)})
            self.log("score", scores[f"{prefix}/avg@{k}"], prog_bar=True, logger=False)
        log_dir = self.trainer.log_dir  # a collective: every rank has to ask
        if self.trainer.is_global_zero and log_dir is not None:
            path = Path(log_dir) / folder / f"step={self.steps:06d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(results[index], ensure_ascii=False) for index in sorted(results)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _result(question: Question, rollouts: list[Rollout], verdicts: list[Verdict]) -> dict[str, Any]:
    rewards = [verdict.reward for verdict in verdicts]
    return {
        "index": question.index,
        "source": question.source,
        "prompt": question.prompt,
        "gold": question.answer,
        "avg": sum(rewards) / len(rewards),
        "rewards": rewards,
        "answers": [verdict.answer for verdict in verdicts],
        "lengths": [len(rollout.response_ids) for rollout in rollouts],
        "finished": [rollout.finished for rollout in rollouts],
        "responses": [rollout.text for rollout in rollouts],
    }
