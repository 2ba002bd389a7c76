"""Predicted seconds as Markdown and for JSON, alone and beside those of a finished run."""

from dataclasses import asdict
from typing import Any

from pgpo_lightning.memory_planner.seconds import StepSeconds

MEASURED = {"rollouts": "timing_s/gen", "update": "timing_s/update_actor", "step": "timing_s/step"}
"""The curves of a run that predicted seconds are compared with."""


def seconds_table(found: StepSeconds) -> str:
    """Return predicted seconds by phase.

    Args:
        found: The prediction.
    """
    rates = found.rates
    lines = [
        f"Seconds per step, predicted and not measured, on {rates.name}: products at {rates.flops / 1e12:.4g} TFLOP/s, "
        f"memory at {rates.bandwidth / 1e9:.4g} GB/s, links at {rates.link / 1e9:.4g} GB/s, "
        f"{rates.overhead * 1e6:.3g} µs per operation:",
        "",
        "| | predicted s |",
        "|---|---:|",
    ]
    lines += [f"| {phase} | {seconds:.3g} |" for phase, seconds in found.phases.items()]
    lines.append(f"| **step** | **{found.step:.3g}** |")
    if found.evaluation is not None:
        lines.append(f"| one evaluation | {found.evaluation:.3g} |")
    if found.amortised is not None:
        share = found.amortised / found.step
        lines.append(f"| evaluation per step | {found.amortised:.3g} ({share:.1%} of training) |")
    return "\n".join(lines)


def seconds_content(found: StepSeconds) -> dict[str, Any]:
    """Return predicted seconds for JSON.

    Args:
        found: The prediction.
    """
    return {
        "rates": asdict(found.rates),
        "phases": found.phases,
        "step": found.step,
        "evaluation": found.evaluation,
        "evaluation_per_step": found.amortised,
    }


def beside(found: StepSeconds, scalars: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Return predicted beside measured seconds: `phase`, `predicted`, `measured` (the median over steps) and `ratio`.

    Args:
        found: The prediction.
        scalars: Curves of a run.

    Raises:
        ValueError: If the run has no times of steps.
    """
    predicted = {"rollouts": found.rollouts, "update": found.update, "step": found.step}
    rows = []
    for phase, tag in MEASURED.items():
        values = sorted(scalars.get(tag, {}).values())
        if not values:
            raise ValueError(f"Expected a run with the curve {tag}, but it has none.")
        measured = values[len(values) // 2]
        ratio = predicted[phase] / measured
        rows.append({"phase": phase, "predicted": predicted[phase], "measured": measured, "ratio": ratio})
    return rows


def beside_table(rows: list[dict[str, Any]], folder: str) -> str:
    """Return predicted beside measured seconds as Markdown.

    Args:
        rows: As :func:`beside` returns them.
        folder: Of the run.
    """
    lines = [
        f"Seconds per step, predicted and measured (median) in {folder}:",
        "",
        "| | predicted | measured | predicted / measured |",
        "|---|---:|---:|---:|",
    ]
    cells = ((row["phase"], *(f"{row[name]:.3g}" for name in ("predicted", "measured", "ratio"))) for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in cells)])
