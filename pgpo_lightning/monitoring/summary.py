"""The summary of a run, and the table of its scores before and after training."""

import math
import statistics
from typing import Any

from pgpo_lightning.core.texts import counted
from pgpo_lightning.monitoring.curves import Scalars, error_tag, series


def summarise(scalars: Scalars, steps: int, seconds: float, k: int) -> dict[str, Any]:
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
