"""The model card of an exported model: what it was trained from, on what and how, and how good it is."""

import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from pgpo_lightning.core.shipped_configs import SHIPPED
from pgpo_lightning.monitoring.configurations import CONFIG
from pgpo_lightning.monitoring.curves import Scalars
from pgpo_lightning.monitoring.summary import summarise

PACKAGES = ("pgpo-lightning", "torch", "transformers", "lightning", "peft")

PAPERS = {
    "pgpo": ("Physics-Guided Policy Optimization with Self-Distillation", "2606.03620"),
    "sdpo": ("Self-Distilled Policy Optimization", "2601.20802"),
    "grpo": ("DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", "2402.03300"),
    "hapo": ("Hindsight-Anchored Policy Optimization", "2603.11321"),
}
PRIVATE = ("default_root_dir",)
"""Settings of the Trainer that say nothing but where files lie."""


def model_card(saved: dict[str, Any], checkpoint: Path, weights: str, adapter: bool) -> str:
    """Return the README.md of an exported model, with the metadata that the Hub reads.

    Args:
        saved: Content of the checkpoint, with or without tensors.
        checkpoint: Its path. The summary and the configuration are read from the run's folder, if it lies in one.
        weights: ``student`` or ``teacher``.
        adapter: Whether an adapter was exported without its base model.
    """
    about, run = saved["pgpo_lightning"], checkpoint.resolve().parent.parent
    settings = about["settings"] or {}
    base = (settings.get("model") or {}).get("model")
    base = base if isinstance(base, str) else None
    data = settings.get("data") or {}
    dataset = str(data.get("dataset") or "")
    multiplier = dict(settings.get("multiplier") or {})
    metadata = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        datasets=[dataset] if _is_hub_id(dataset) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["pgpo-lightning", about["module"].lower(), *(["pgpo"] if _is_pgpo(multiplier) else [])],
    )
    config = run / CONFIG
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {run.name}: {about['module']}{' + PGPO' if _is_pgpo(multiplier) else ''}",
        f"The {weights} of step {about['steps']} of a run of pgpo-lightning.",
        _table(_facts(saved, base, data, multiplier)),
        "## Held-out scores\n\n" + _scores(saved, run, weights),
        _configuration(config),
        "## Versions\n\n" + _table({name: found for name in PACKAGES if (found := _version(name))}),
        "## Citation\n\n" + _citation(about["module"].lower()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(saved: dict[str, Any], base: str | None, data: dict[str, Any], multiplier: dict[str, Any]) -> dict[str, str]:
    about = saved["pgpo_lightning"]
    groups = (about["settings"] or {}).get("optimizer", {}).get("groups") or [{}]
    kind = multiplier.pop("class", None)
    given = ", ".join(f"{name} {value}" for name, value in multiplier.items())
    sources = {name: data[name] for name in ("dataset", "train", "path", "domains") if data.get(name)}
    read = ", ".join(f"{name} {value}" for name, value in sources.items())
    states = saved.get("callbacks", {}).values()
    rho: list[float] = next((s["history"] for s in states if isinstance(s, dict) and "history" in s), [])
    return {
        "base model": base or "a model object; not recorded",
        "data": f"{data.get('class', 'not recorded').rpartition('.')[2]}{f' ({read})' if read else ''}",
        "questions (SHA-256)": str(data.get("questions") or "not recorded"),
        "method": about["module"],
        "multiplier": f"{kind.rpartition('.')[2]} ({given})" if kind else "none",
        "dose (mean rho)": f"{fmean(rho):.4f} over {len(rho)} optimizer steps" if rho else "1, without a multiplier",
        "learning rate": f"{groups[0].get('initial_lr', groups[0].get('lr', 'not recorded'))}",
        "seed": str(about["seed"]),
    }


def _scores(saved: dict[str, Any], run: Path, weights: str) -> str:
    """Return the scores of the student before training, at the best evaluation until the checkpoint, and at the checkpoint."""
    states = saved.get("callbacks", {})
    curves = _curves((states.get("RunSummary") or {}).get("curves") or {})
    names = {int(m[1]) for tag in curves if (m := re.fullmatch(r"val/avg@(\d+)", tag))}
    if not names:
        return "The run was not evaluated."
    k, steps = names.pop(), saved["pgpo_lightning"]["steps"]
    summary = summarise(curves, steps, 0.0, k)
    rows = []
    for name, title in (
        ("base", "before training"),
        ("best", "best"),
        ("final", "final, these weights" if weights == "student" else "final, the student beside it"),
        ("last", "last"),
    ):
        found = summary[name]
        if found is None or (name == "last" and summary["final"]):
            continue
        title += f" of {found['of']} evaluations" if name == "best" else ""
        rows.append([title, str(found["step"]), *(_score(found, score, k) for score in ("avg", "pass", "maj"))])
    later = run / "summary.json"  # of a run that went on
    end = json.loads(later.read_text(encoding="utf-8")).get("final") if later.is_file() else None
    if end is not None and end["step"] > steps:
        rows.append(["end of the run", str(end["step"]), *(_score(end, score, k) for score in ("avg", "pass", "maj"))])
    heads = ["evaluation", "step", f"avg@{k}", f"pass@{k}", f"maj@{k}"]
    lines = [heads, ["---"] * len(heads), *rows]
    questions = _questions(run, max(curves[f"val/avg@{k}"]))
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + f"\n\n{k} samples per question{f', {questions} questions' if questions else ''}; ± standard error, clustered by "
        "question. The best of several noisy scores is biased upwards."
    )


def _curves(state: dict[str, Any]) -> Scalars:
    return {tag: dict(zip(steps.tolist(), values.tolist(), strict=True)) for tag, (steps, values) in state.items()}


def _score(found: dict[str, Any], name: str, k: int) -> str:
    value, error = found.get(f"{name}@{k}"), found["standard_error"].get(f"{name}@{k}")
    return "" if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _questions(run: Path, step: int) -> int:
    answers = run / "validation" / f"step={step:06d}.jsonl"
    return sum(1 for _ in answers.open(encoding="utf-8")) if answers.is_file() else 0


def _configuration(config: Path) -> str:
    if not config.is_file():
        return ""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    for name in PRIVATE:
        settings.get("trainer", {}).pop(name, None)
    settings.pop("ckpt_path", None)
    text = yaml.safe_dump(settings, sort_keys=False).replace(str(SHIPPED.parent), "pgpo_lightning")
    return f"<details><summary>Configuration</summary>\n\n```yaml\n{text}```\n\n</details>"


def _citation(method: str) -> str:
    used = {"pgpo", "sdpo", *(["grpo"] if method == "hapo" else [])}
    lines = ["```bibtex"]
    for key, (title, number) in PAPERS.items():
        if key in used or key in method:
            lines += [f"@misc{{{key},", f"  title = {{{title}}},", f"  eprint = {{{number}}},"]
            lines += ["  archivePrefix = {arXiv},", f"  year = {{20{number[:2]}}}", "}"]
    return "\n".join([*lines, "```"])


def _is_pgpo(multiplier: dict[str, Any]) -> bool:
    return str(multiplier.get("class")).endswith(".InformationMultiplier")


def _is_hub_id(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
