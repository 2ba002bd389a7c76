"""Output of a run for people: grouped curves, sampled texts, and at the end a picture, a table and a summary."""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pgpo_lightning.callbacks.step_size import StepSizeMultiplier
from pgpo_lightning.core.files import write_json
from pgpo_lightning.core.settings import Natural, checked
from pgpo_lightning.core.texts import counted
from pgpo_lightning.core.types import Sample
from pgpo_lightning.data.questions import QuestionData
from pgpo_lightning.distributed.stopping import Stopped
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.monitoring.curves import LAYOUT, draw_stability, error_tag, read_scalars, series
from pgpo_lightning.monitoring.run_record import FILE, collect


@checked
class RunSummary(L.Callback):
    """Groups the curves in TensorBoard, logs a few rollouts as text, and writes a picture, a summary and a record at the end.

    Requires a TensorBoard logger; without one it warns and does nothing.

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
        self.seconds = self.cpu_seconds = 0.0
        self._start_clocks()

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of training so far, over all resumes."""
        seconds, cpu_seconds = self._elapsed()
        return {"seconds": seconds, "cpu_seconds": cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seconds of training before the interruption."""
        self.seconds, self.cpu_seconds = state_dict["seconds"], state_dict["cpu_seconds"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Write the layout of the curves."""
        self._start_clocks()
        if (writer := _writer(trainer)) is not None:
            writer.add_custom_scalars(LAYOUT)
        elif not trainer.fast_dev_run:  # which removes the logger
            rank_zero_warn(
                "This run will write no summary.json, run.json and stability.png, because they are made from the log of a "
                "TensorBoardLogger. Leave `trainer.logger` null, or add one to it."
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OnPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a few rollouts with the teacher's prompts."""
        writer = _writer(trainer)
        if writer is None or not self.texts_every_n_steps or (pl_module.steps - 1) % self.texts_every_n_steps:
            return
        # From the worst to the best reward: the teacher's prompt of a failed response is the most informative.
        rows = sorted(pl_module.last_samples, key=lambda row: row.verdict.reward)
        picked = [rows[i * (len(rows) - 1) // max(1, self.texts - 1)] for i in range(min(self.texts, len(rows)))]
        text = "\n\n---\n\n".join(_as_text(row) for row in picked)
        writer.add_text("rollouts", text, pl_module.steps)

    def on_fit_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Draw the curves, and write the summary and the record."""
        self._conclude(trainer, pl_module, ended=True)

    def on_exception(self, trainer: L.Trainer, pl_module: OnPolicyModule, exception: BaseException) -> None:
        """Draw the curves and write the summary of a run that was stopped by a signal."""
        if isinstance(exception, Stopped) and trainer.state.fn == "fit" and pl_module.steps:
            self._conclude(trainer, pl_module, ended=False)

    def _conclude(self, trainer: L.Trainer, pl_module: OnPolicyModule, ended: bool) -> None:
        log_dir = trainer.log_dir  # a collective: every rank has to ask
        writer = _writer(trainer)
        if writer is None or log_dir is None:
            return
        writer.flush()
        folder = Path(log_dir)
        scalars = read_scalars(folder)
        picture = folder / "stability.png"
        if self.picture:
            draw_stability(scalars, picture, f"{folder.name}: {type(pl_module).__name__}, {pl_module.steps} steps")
        seconds, cpu_seconds = self._elapsed()
        summary = summarise(scalars, pl_module.steps, seconds, pl_module.evaluator.config.samples)
        write_json(folder / "summary.json", summary, indent=2)
        multipliers = [callback for callback in trainer.callbacks if isinstance(callback, StepSizeMultiplier)]
        resumed = pl_module.resumed
        if ended:  # a record marks a run as complete
            collect(
                folder,
                scalars,
                train=resumed.questions_sha256 if isinstance(trainer.datamodule, QuestionData) and resumed else None,
                seed=pl_module.seed,
                steps=pl_module.steps,
                samples=pl_module.evaluator.config.samples,
                seconds=round(seconds, 2),
                cpu_seconds=round(cpu_seconds, 2),
                rho=multipliers[0].history if multipliers else [],
            ).save(folder / FILE)
        curves = f"curves:  {picture}\n" if self.picture else ""
        print(f"\n{before_after(summary)}\n\n{curves}summary: {folder / 'summary.json'}")

    def _start_clocks(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def _elapsed(self) -> tuple[float, float]:
        return (
            self.seconds + time.perf_counter() - self._start,
            self.cpu_seconds + time.process_time() - self._cpu_start,
        )


def summarise(scalars: dict[str, dict[int, float]], steps: int, seconds: float, k: int) -> dict[str, Any]:
    """Summarise a run: scores before and after, and the multiplier that it trained with.

    Args:
        scalars: Of the run.
        steps: Batches trained on.
        seconds: Of training and validation.
        k: Samples per question in evaluation.

    Returns:
        `base`, `last` and `best`: the evaluation scores before the first step (null without such an evaluation), at the last
        evaluation, and at the one with the best avg@k. Each has its step and, as `standard_error`, the standard errors of the
        scores, clustered by question. `final`: those after the last step (null if the run was not evaluated there). `best` also
        has the number of evaluations that it was selected from, as `of`: the best of several noisy scores is biased upwards.
        `multiplier`: mean and standard deviation of rho over steps (null without a multiplier). `steps_without_signal`:
        optimizer steps that were skipped because no rollout was in the loss.
    """
    at, scores = series(scalars, f"val/avg@{k}")
    best = at[scores.index(max(scores))] if scores else None

    def evaluation(step: int) -> dict[str, Any]:
        tags = [tag for tag in scalars if tag.startswith("val/") and step in scalars[tag]]
        found = {tag.removeprefix("val/"): scalars[tag][step] for tag in sorted(tags)}
        errors = {name: scalars.get(error_tag(f"val/{name}"), {}).get(step, math.nan) for name in found}
        return {"step": step, **found, "standard_error": {n: e for n, e in errors.items() if math.isfinite(e)}}

    _, rho = series(scalars, "lr/multiplier")
    _, without = series(scalars, "actor/steps_without_signal")
    return {
        "steps": steps,
        "steps_without_signal": int(without[-1]) if without else 0,
        "seconds": round(seconds, 1),
        "base": evaluation(0) if 0 in at else None,
        "last": evaluation(at[-1]) if at else None,
        "final": evaluation(steps) if steps in at else None,
        "best": None if best is None else {**evaluation(best), "of": len(scores)},
        "multiplier": {"mean": statistics.fmean(rho), "std": statistics.pstdev(rho)} if rho else None,
    }


def before_after(summary: dict[str, Any]) -> str:
    """Return a table of the scores before and after training, with standard errors clustered by question."""
    columns = [name for name in ("base", "best", "final" if summary["final"] else "last") if summary[name]]
    if not columns:
        return f"{counted(summary['steps'], 'step')}, no evaluation"
    rows = [name for name in summary[columns[-1]] if name not in ("step", "of", "standard_error")]
    looks = f"best of {summary['best']['of']}" if summary["best"] else ""
    titles = [f"{looks if name == 'best' else name} @{summary[name]['step']}" for name in columns]
    width = max([12, *(len(name) + 1 for name in rows)])
    lines = ["held-out".ljust(width) + "".join(f"{title:>18}" for title in titles)]
    lines += [name.ljust(width) + "".join(_cell(summary[column], name) for column in columns) for name in rows]
    lines.append("± standard error, clustered by question; the best of several is biased upwards")
    if not summary["final"]:
        lines.append(f"no evaluation after step {summary['last']['step']}: see `trainer.val_check_interval`")
    lines.append(f"{counted(summary['steps'], 'step')} in {summary['seconds']:.0f} s")
    if rho := summary["multiplier"]:
        lines[-1] += f", multiplier {rho['mean']:.3f} ± {rho['std']:.3f}"
    if summary["steps_without_signal"]:
        lines[-1] += (
            f", {counted(summary['steps_without_signal'], 'optimizer step')} skipped: no rollout was in the loss"
        )
    return "\n".join(lines)


def _cell(scores: dict[str, Any], name: str) -> str:
    error = scores["standard_error"].get(name)
    return f"{scores.get(name, math.nan):10.3f}" + (" " * 8 if error is None else f" ± {error:.3f}")


def _writer(trainer: L.Trainer) -> Any:
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def _as_text(row: Sample) -> str:
    teacher = row.reprompt if row.reprompt is not None else "(no teacher)"
    fields = {
        "reward": f"{row.verdict.reward:g}, {row.length} tokens{'' if row.rollout.finished else ', cut off'}",
        "prompt": row.rollout.question.messages()[-1]["content"],
        "response": row.rollout.text,
        "what the teacher sees": teacher,
    }
    return "\n\n".join(f"**{name}**\n\n{_indented(value)}" for name, value in fields.items())


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
