"""Output of a run for people: sampled texts, and at the end a picture, a table and a summary, whatever the loggers."""

import json
import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from pgpo_lightning.callbacks.step_size import StepSizeMultiplier
from pgpo_lightning.core.files import write_json, write_text
from pgpo_lightning.core.run_settings import arguments
from pgpo_lightning.core.settings import Natural, checked
from pgpo_lightning.core.types import Sample
from pgpo_lightning.data.questions import QuestionData
from pgpo_lightning.distributed.stopping import Stopped
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.monitoring.curves import PANELS, Scalars, draw_stability, layout, matching, read_scalars
from pgpo_lightning.monitoring.run_folder import folder_of
from pgpo_lightning.monitoring.run_record import CURVES, FILE, collect
from pgpo_lightning.monitoring.summary import before_after, summarise
from pgpo_lightning.monitoring.tracking import log_picture, log_run, log_texts
from pgpo_lightning.objectives.injection import InjectedPolicyGradient

SCORES = ("summary/best", "summary/final")
"""Curves of one point each: best and last held-out avg@k of a finished run."""
DOSE = "summary/dose"
"""The same for the mean of rho."""


@checked
class RunSummary(L.Callback):
    """Logs a few rollouts as texts, and writes a picture, a summary and a record of the run at the end.

    It remembers the curves itself, also over resumes, so that its files do not depend on loggers, nor on `log_every_n_steps`.
    They go to the run's folder (:func:`pgpo_lightning.monitoring.run_folder.folder_of`): ``rollouts/step=*.jsonl``,
    ``stability.png``, ``summary.json`` and, once the run has ended, ``run.json``. W&B and MLflow also get rollouts as tables, and
    the picture. TensorBoard gets rollouts as texts, custom charts, and a row under HPARAMS.

    Args:
        texts_every_n_steps: Batches between two logs of rollouts; 0 for none.
        texts: Rollouts per log.
        picture: Draw ``stability.png`` at the end.

    Raises:
        ValueError: If a setting is negative.
    """

    def __init__(self, texts_every_n_steps: Natural = 10, texts: Natural = 3, picture: bool = True) -> None:
        self.texts_every_n_steps = texts_every_n_steps
        self.texts = texts
        self.picture = picture
        self.curves: Scalars = {}
        self.seconds = self.cpu_seconds = 0.0
        self._start_clocks()

    def state_dict(self) -> dict[str, Any]:
        """Return the curves and the seconds of training so far, over all resumes."""
        seconds, cpu_seconds = self._elapsed()
        curves = {
            tag: (torch.tensor([*points]), torch.tensor([*points.values()], dtype=torch.float64))
            for tag, points in self.curves.items()
        }
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "curves": curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves and the seconds of training before the interruption."""
        self.seconds, self.cpu_seconds = state_dict["seconds"], state_dict["cpu_seconds"]
        curves = state_dict.get("curves", {})  # earlier versions had none
        self.curves = {tag: dict(zip(*map(torch.Tensor.tolist, pair), strict=True)) for tag, pair in curves.items()}

    def setup(self, trainer: L.Trainer, pl_module: OnPolicyModule, stage: str) -> None:
        """Forget an earlier run of this process. Of a resumed run Lightning loads the state afterwards."""
        if stage == "fit" and trainer.global_step == 0:
            self.curves, self.seconds, self.cpu_seconds = {}, 0.0, 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Log what the run is."""
        self._start_clocks()
        folder = folder_of(trainer)
        if pl_module.steps and not self.curves:  # resumed from a checkpoint without them
            self.curves = {tag: points for tag, points in read_scalars(folder).items() if _is_kept(tag)}
        self.introduce(trainer, pl_module)

    def introduce(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Log what the run is, and which charts it will have."""
        multiplier = _multiplier(trainer)
        scores = [*SCORES, *([DOSE] if multiplier else [])]
        demonstrations = isinstance(pl_module.objective, InjectedPolicyGradient)
        charts = layout(pl_module.has_teacher, multiplier is not None, demonstrations)
        log_run(trainer, facts(trainer, pl_module), charts, scores)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OnPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the values of this step, and log a few rollouts with the teacher's prompts."""
        step = pl_module.steps
        self._remember({tag: value for tag, value in pl_module.reported.items() if _is_kept(tag)}, step)
        if not self.texts_every_n_steps or (step - 1) % self.texts_every_n_steps or trainer.fast_dev_run:
            return
        folder = folder_of(trainer)  # a collective: every rank has to ask
        if not trainer.is_global_zero or not self.texts:
            return
        # From the worst to the best reward: the teacher's prompt of a failed response is the most informative.
        samples = sorted(pl_module.last_samples, key=lambda sample: sample.verdict.reward)
        picked = [
            samples[i * (len(samples) - 1) // max(1, self.texts - 1)] for i in range(min(self.texts, len(samples)))
        ]
        rows = [_row(sample) for sample in picked]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(folder / "rollouts" / f"step={step:06d}.jsonl", "\n".join(lines) + "\n")
        log_texts(trainer, "rollouts", rows, step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Remember the held-out scores, and what a module of one's own logs beside them as ``val/*``."""
        # Before the first step Lightning evaluates a few batches only, unless `num_sanity_val_steps` is -1.
        if trainer.state.fn != TrainerFn.FITTING or (trainer.sanity_checking and not _is_whole(trainer)):
            return
        logged = {} if trainer.sanity_checking else {tag: float(v) for tag, v in trainer.callback_metrics.items()}
        scores = {tag: value for tag, value in logged.items() if tag.startswith("val/")} | pl_module.evaluator.scores
        self._remember(scores, pl_module.steps)

    def on_fit_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Draw the curves, and write the summary and the record."""
        self._conclude(trainer, pl_module, ended=True)

    def on_exception(self, trainer: L.Trainer, pl_module: OnPolicyModule, exception: BaseException) -> None:
        """Draw the curves and write the summary of a run that was stopped by a signal."""
        if isinstance(exception, Stopped) and trainer.state.fn == "fit" and pl_module.steps:
            self._conclude(trainer, pl_module, ended=False)

    def _conclude(self, trainer: L.Trainer, pl_module: OnPolicyModule, ended: bool) -> None:
        folder = folder_of(trainer)  # a collective: every rank has to ask
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        picture, steps = folder / "stability.png", pl_module.steps
        if self.picture:
            draw_stability(self.curves, picture, self._title(folder.name, trainer, pl_module))
            log_picture(trainer, "curves", picture, steps)
        seconds, cpu_seconds = self._elapsed()
        summary = summarise(self.curves, steps, seconds, k := pl_module.evaluator.config.samples)
        write_json(folder / "summary.json", summary, indent=2)
        if ended:  # a record marks a run as complete
            multiplier, resumed = _multiplier(trainer), pl_module.resumed
            collect(
                folder,
                self.curves,
                train=resumed.questions_sha256 if isinstance(trainer.datamodule, QuestionData) and resumed else None,
                seed=pl_module.seed,
                steps=steps,
                samples=k,
                seconds=round(seconds, 2),
                cpu_seconds=round(cpu_seconds, 2),
                rho=multiplier.history if multiplier else [],
            ).save(folder / FILE)
            found = [(summary[name] or {}).get(f"avg@{k}") for name in ("best", "final")]
            scores = dict(zip(SCORES, found, strict=True)) | {DOSE: (summary["multiplier"] or {}).get("mean")}
            for logger in trainer.loggers:
                logger.log_metrics({tag: value for tag, value in scores.items() if value is not None}, step=steps)
                logger.save()
        curves = f"curves:  {picture}\n" if self.picture else ""
        print(f"\n{before_after(summary)}\n\n{curves}summary: {folder / 'summary.json'}")

    def _title(self, name: str, trainer: L.Trainer, pl_module: OnPolicyModule) -> str:
        multiplier = _multiplier(trainer)
        scaled = f" with {type(multiplier).__name__}" if multiplier else ""
        return f"{name}: {type(pl_module).__name__}{scaled}, {pl_module.steps} steps"

    def _remember(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self.curves.setdefault(tag, {})[step] = value

    def _start_clocks(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def _elapsed(self) -> tuple[float, float]:
        return (
            self.seconds + time.perf_counter() - self._start,
            self.cpu_seconds + time.process_time() - self._cpu_start,
        )


def facts(trainer: L.Trainer, pl_module: OnPolicyModule) -> dict[str, Any]:
    """Return by what a run differs from others: its method, its multiplier with its numbers, model, learning rate and seed."""
    multiplier = _multiplier(trainer)
    given = arguments(multiplier) if multiplier else {}
    group = trainer.optimizers[0].param_groups[0]
    return {
        "method": type(pl_module).__name__,
        "multiplier": type(multiplier).__name__ if multiplier else "none",
        **{name: value for name, value in given.items() if isinstance(value, (int, float, str))},
        "model": pl_module.student.name,
        "learning_rate": float(group.get("initial_lr", group["lr"])),
        "seed": pl_module.seed,
    }


def _multiplier(trainer: L.Trainer) -> StepSizeMultiplier | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, StepSizeMultiplier)), None)


def _is_kept(tag: str) -> bool:
    """Return whether the record, the summary or the picture has this curve."""
    return (
        tag in CURVES or tag.startswith(("val/", "val_")) or any(matching({tag: {}}, p) for _, ps in PANELS for p in ps)
    )


def _is_whole(trainer: L.Trainer) -> bool:
    """Return whether the evaluation before the first step is of all held-out questions."""
    return math.isinf(trainer.num_sanity_val_steps) or trainer.num_sanity_val_batches == trainer.num_val_batches


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "reward": sample.verdict.reward,
        "tokens": sample.length,
        "finished": sample.rollout.finished,
        "prompt": sample.rollout.question.messages()[-1]["content"],
        "response": sample.rollout.text,
        "what the teacher sees": sample.reprompt if sample.reprompt is not None else "(no teacher)",
    }
