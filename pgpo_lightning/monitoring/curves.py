"""The curves of a run: how to read a TensorBoard log, which curves belong together, and a picture of its stability."""

import math
from pathlib import Path
from typing import Any

Scalars = dict[str, dict[int, float]]
"""Tag to step to value."""

PANELS: list[tuple[str, list[str]]] = [
    ("reward of rollouts", ["critic/score/mean"]),
    ("held-out score", ["val/avg@*", "val/pass@*", "val/solution_probability"]),
    ("information I (nats)", ["information/mean"]),
    ("multiplier ρ", ["lr/multiplier"]),
    ("entropy (nats per token)", ["rollout/neg_log_prob", "self_distillation/teacher_entropy"]),
    ("response length (tokens)", ["response_length/mean", "response_length/max", "val/length"]),
    ("divergence (nats per token)", ["self_distillation/divergence_success", "self_distillation/divergence_failure"]),
    ("gradient norm", ["actor/grad_norm"]),
    ("fractions", ["self_distillation/reprompt_sample_fraction", "hapo/injected_groups", "response_length/clip_ratio"]),
]
"""The panels of ``stability.png`` and the tags in each; ``*`` stands for the number of samples."""

INFORMATION = {
    "I": ["Multiline", ["information/(mean|kl|log_ratio)"]],
    "standard error of I": ["Multiline", ["information/standard_error"]],
}
MULTIPLIER = {
    "multiplier": ["Multiline", ["lr/multiplier"]],
    "learning rate": ["Multiline", ["lr/(base|effective)"]],
}


def layout(teacher: bool, multiplier: bool, demonstrations: bool) -> dict[str, Any]:
    """Return TensorBoard's custom-scalars layout: the curves that belong together, as regular expressions of tags.

    Args:
        teacher: Whether the run has a teacher, so that it has its curves.
        multiplier: Whether it has a multiplier.
        demonstrations: Whether it may add demonstrations to groups (HAPO).
    """
    entropy = ["rollout/neg_log_prob", "actor/entropy", *(["self_distillation/teacher_entropy"] if teacher else [])]
    stability = {
        "score": ["Multiline", ["critic/score/mean", "val/avg@.*", "val/pass@.*", "val/solution_probability"]],
        "entropy": ["Multiline", entropy],
        "gradient norm": ["Multiline", ["actor/grad_norm"]],
        "sampler against trainer": ["Multiline", ["rollout_corr/(gap|log_ratio.*)"]],
    }
    if teacher:
        stability |= {
            "divergence": ["Multiline", ["self_distillation/divergence_(success|failure|bound)"]],
            "objective": ["Multiline", ["self_distillation/objective"]],
            "rows with a teacher": ["Multiline", ["self_distillation/(reprompt_sample|success_group)_fraction"]],
        }
    if demonstrations:
        stability["groups with a demonstration"] = ["Multiline", ["hapo/(gate_open|injected_groups|all_failed)"]]
    information = (INFORMATION if teacher else {}) | (MULTIPLIER if multiplier else {})
    return {"stability": stability} | ({"information": information} if information else {}) | LENGTHS_AND_SPEED


LENGTHS_AND_SPEED = {
    "lengths": {
        "response": ["Multiline", ["response_length/(mean|max|min)", "val/length"]],
        "cut off": ["Multiline", ["response_length/clip_ratio", "val/cut_off"]],
        "prompt": ["Multiline", ["prompt_length/mean"]],
    },
    "speed": {
        "seconds": ["Multiline", ["timing_s/.*"]],
        "tokens per second": ["Multiline", ["perf/tokens_per_s"]],
    },
}


def read_scalars(folder: str | Path) -> Scalars:
    """Read all scalars of a run.

    Where a resumed run logged a step again, the later value counts.

    Args:
        folder: With the TensorBoard event files of one run.
    """
    # TensorBoard takes a second to import, which training itself does without.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [
        tag for tag in events.Tags()["scalars"] if tag != "hp_metric"
    ]  # Lightning's placeholder beside hyperparameters
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def series(scalars: Scalars, tag: str) -> tuple[list[int], list[float]]:
    """Return steps and finite values of a tag, in order of steps."""
    points = sorted((step, value) for step, value in scalars.get(tag, {}).items() if math.isfinite(value))
    return [step for step, _ in points], [value for _, value in points]


def matching(scalars: Scalars, pattern: str) -> list[str]:
    """Return the tags that a pattern of :data:`PANELS` stands for."""
    stem, star, _ = pattern.partition("*")
    return [tag for tag in sorted(scalars) if tag == pattern or (star and tag.startswith(stem))]


def error_tag(tag: str) -> str:
    """Return the tag of a mean's standard error, which is clustered by question.

    Example:
        >>> error_tag("val/avg@8"), error_tag("information/mean")
        ('val_standard_error/avg@8', 'information/standard_error')
    """
    group, _, name = tag.partition("/")
    return f"{group}/standard_error" if name == "mean" else f"{group}_standard_error/{name}"


def draw_stability(scalars: Scalars, path: str | Path, title: str) -> None:
    """Draw the curves that show a collapse early, as a PNG.

    Args:
        scalars: Of one run.
        path: Of the picture.
        title: Of the picture.
    """
    from matplotlib.figure import Figure  # not pyplot, which would select a window system

    figure = Figure(figsize=(13, 9))
    figure.suptitle(title)
    # Margins by hand: `layout="constrained"` draws everything twice, which is half a second.
    margins = {"left": 0.04, "right": 0.995, "bottom": 0.05, "top": 0.93, "wspace": 0.14, "hspace": 0.28}
    for axis, (name, patterns) in zip(figure.subplots(3, 3, gridspec_kw=margins).flat, PANELS, strict=True):
        for tag in (tag for pattern in patterns for tag in matching(scalars, pattern)):
            steps, values = series(scalars, tag)
            axis.plot(steps, values, label=tag, marker="o" if len(steps) < 15 else None, markersize=3)
            if errors := scalars.get(error_tag(tag), {}):
                low = [v - errors.get(s, 0.0) for s, v in zip(steps, values, strict=True)]
                high = [v + errors.get(s, 0.0) for s, v in zip(steps, values, strict=True)]
                axis.fill_between(steps, low, high, alpha=0.3, label="± standard error, clustered by question")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
