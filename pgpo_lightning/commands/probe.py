"""The command ``pgpo probe``: estimate, before training, how much each teacher context helps, and check it on finished runs.

The command takes the configuration of a run. It samples from the student, and from the same weights with each reprompt, and
compares the scores (arXiv 2605.30070, section 2). With ``--calibrate`` it fits a line from gaps to gains of finished runs.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonargparse
import numpy as np
from lightning.pytorch.cli import LightningArgumentParser
from transformers.utils import logging as transformers_logging

from pgpo_lightning.commands.building import BuildCommand
from pgpo_lightning.core.files import output_folder, plain, replacing, write_json, write_text
from pgpo_lightning.core.run_settings import describe
from pgpo_lightning.core.settings import Count, Nucleus, Range, Temperature, Text, check, checked
from pgpo_lightning.core.types import Question
from pgpo_lightning.modules import OnPolicyModule
from pgpo_lightning.probe.calibration import PROBE, Scale, arguments, bootstrap, points, read_probe
from pgpo_lightning.probe.contexts import CONTEXTS, DEFAULT_CONTROLS, Context, contexts
from pgpo_lightning.probe.figures import draw_gaps, draw_line
from pgpo_lightning.probe.gaps import gap, question_draws, ratio
from pgpo_lightning.probe.line import fit
from pgpo_lightning.probe.measure import Prober
from pgpo_lightning.probe.probe_report import calibration_content, calibration_report, probe_report, summary
from pgpo_lightning.rollout.engine import Sampling

_UPDATE = (
    *("optimizer", "scheduler", "update", "mismatch", "evaluation", "num_generations", "temperature", "seed"),
    *("divergence", "teacher", "token_weights", "question_weight_exponent", "policy_gradient"),
    *("mixing", "mixing_steps", "evidence_clip", "evidence", "difficulty", "rhythm"),
)
"""Settings of a module that the probe's rollouts do not depend on, or that the probe sets itself.

A change of any other setting makes a different probe.
"""


@dataclass
class ProbeOptions:
    """What `pgpo probe` takes beside the arguments of `pgpo fit`.

    Args:
        contexts: Contexts to measure in addition to none; by default all of feedback, own, own+feedback, sibling,
            sibling+feedback and configured.
        templates: More contexts, name to reprompt template: --templates.careful '{prompt} Check each step.'
        controls: Controls for leakage of the answer, among answer, first-step, numbers, contradiction, wrong and other; by
            default answer, wrong and other.
        questions: Maximum number of questions.
        samples: Responses per question; by default `num_generations`.
        split: Split of the questions, train or validation.
        temperature: Sampling temperature; by default that of the rollouts in training.
        top_p: Nucleus sampling; 1.0 as in training.
        output: Folder of the results and samples.
    """

    contexts: list[str] = field(default_factory=lambda: list(CONTEXTS))
    templates: dict[str, str] = field(default_factory=dict)
    controls: list[str] = field(default_factory=lambda: list(DEFAULT_CONTROLS))
    questions: int = 128
    samples: int | None = None
    split: str = "validation"
    temperature: float | None = None
    top_p: float = 1.0
    output: str = "runs/probe"


class ProbeCommand(BuildCommand):
    """Parses the arguments of `pgpo fit` and measures the gap of each context."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the probe."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(ProbeOptions, instantiate=False)

    def run(self) -> dict[str, Any]:
        """Measure all contexts that are not measured yet, and write the report.

        Returns:
            The content of ``probe.json``.

        Raises:
            ValueError: If a setting is out of range, or the folder contains a probe with other settings.
            FileExistsError: If `output` is a file.
        """
        module, config = self.model, self.config[self.subcommand]
        teaching = module.objective.teaching if isinstance(module, OnPolicyModule) else None
        if teaching is None:
            raise ValueError(
                f"Expected `model` to be a module with a self-teacher, such as SDPO, but got {type(module).__name__}."
            )
        if teaching.config.model is not None:
            raise ValueError(
                "Expected no `teacher.model`, because a probe samples the teacher's answers from the student's weights, but got "
                f"{teaching.config.model}."
            )
        if config.ckpt_path is not None:
            raise ValueError(
                f"Expected no `ckpt_path`, but got {config.ckpt_path}. Write the checkpoint with `pgpo export`, and give the "
                "folder as `model.init_args.model`."
            )
        samples = module.num_generations if config.samples is None else config.samples
        temperature = module.training_sampling.temperature if config.temperature is None else config.temperature
        check("questions", config.questions, Annotated[int, Range(least=2)])
        check("samples", samples, Count)
        check("temperature", temperature, Temperature)
        check("top_p", config.top_p, Nucleus)
        check("split", config.split, Literal["train", "validation"])
        wanted = contexts(config.contexts, config.templates, config.controls, teaching.builder)
        folder = output_folder(config.output)
        questions = self._questions(config.split, config.questions)
        settings = {"module": _relevant(config.model.init_args), "split": config.split}
        settings["precision"] = str(config.trainer.precision)
        sampling = Sampling(module.max_response_length, temperature, config.top_p)
        chunk = min(self.datamodule.batch_size, len(questions))
        prober = Prober(module, questions, samples, sampling, chunk, module.seed, folder, settings)
        with self.model_ready():  # the teacher has the student's weights
            content = measure(prober, wanted, settings | {"module": _relevant(config.model.init_args, reprompt=True)})
        save(content, folder)
        return content

    def _questions(self, split: str, limit: int) -> list[Question]:
        data = self.datamodule
        data.setup("fit")
        data.drop_prompts(self.model.actor.too_long)
        if len(data.questions[split]) < 2:
            raise ValueError(
                f"Expected at least 2 {split} questions, but {type(data).__name__} has {len(data.questions[split])}."
            )
        return data.questions[split][:limit]


def measure(prober: Prober, wanted: list[Context], settings: dict[str, Any]) -> dict[str, Any]:
    """Sample from student and teacher, and compare the scores.

    Args:
        prober: Samples and grades.
        wanted: Contexts and controls, `none` first.
        settings: Settings to record in addition to the prober's own.
    """
    rows = prober.student()
    threshold = prober.module.reward.success_threshold
    student = np.array([row.verdict.reward for chunk in rows for row in chunk]).reshape(-1, prober.samples)
    measured = {context.name: prober.teacher(context, rows) for context in wanted}
    draws = question_draws(len(student))
    gaps = {name: gap(student, measured["none"].reward, one.reward, threshold, draws) for name, one in measured.items()}
    failed = (student < threshold).mean()
    score = ratio(student.mean(axis=1), np.ones(len(student)), draws)
    return {
        "settings": prober.settings | settings | {"joint_sha256": prober.joint_sha256},
        "student": {"score": vars(score), "failed": float(failed)},
        "contexts": [
            summary(context, measured[context.name], gaps[context.name], gaps.get("sibling"), draws)
            for context in wanted
        ],
    }


def save(content: dict[str, Any], folder: Path) -> None:
    """Write ``probe.json``, ``probe.md`` and ``probe.png``, and print the table."""
    with replacing(folder / "probe.png") as file:
        draw_gaps(content, file.stream)
    write_json(folder / PROBE, plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    report = probe_report(content, "probe.png")
    write_text(folder / "probe.md", report)
    print("\n" + report.split("## How to read it")[0].strip() + f"\n\nreport: {folder / 'probe.md'}")


@checked
def calibrate(
    runs: list[str],
    gaps: Text | None = None,
    scale: Scale = "all",
    predict: list[float] | None = None,
    extrapolate: bool = False,
    output: Text = "runs/calibration",
) -> dict[str, Any]:
    """Fit the line from gaps before training to gains from training, and report the leave-one-out prediction error.

    Args:
        runs: Folders that contain finished runs at any depth, of three or more contexts.
        gaps: Folder of their probe; by default the nearest ``probe.json`` in a run's folder or above it.
        scale: Scale of the net gap. ``all``: every rollout for which the context is available gets it, as in training here.
            ``failed``: only failed rollouts.
        predict: Net gaps to predict a gain for, in addition to those of all probed contexts without a run.
        extrapolate: Also predict outside the calibrated range; such predictions are marked.
        output: Folder of ``calibration.md``, ``.json`` and ``.png``.

    Returns:
        The content of ``calibration.json``.

    Raises:
        ValueError: If there are fewer than three configurations, a run has no probe, or a gap in `predict` is out of range.
        FileExistsError: If `output` is a file.
    """
    folder = output_folder(output)
    found = points([Path(path) for path in runs], None if gaps is None else Path(gaps), scale)
    line = fit(np.array([point.gap.mean() for point in found]), np.array([point.gain.mean() for point in found]))
    wanted = [(f"g = {gap:g}", gap, True) for gap in predict or []]
    key = "net" if scale == "all" else "net_failed"
    for source in sorted({point.probe for point in found}):
        rows = {row["name"]: row for row in read_probe(source)["contexts"] if row["control"] is None}
        used = [rows[point.context]["settings"] for point in found if point.probe == source]
        # The line is not valid for a context that no rollout gets, because training with it changes nothing.
        left = {name: row for name, row in rows.items() if row["settings"] not in used and row["coverage"]}
        wanted += [(name, row[key]["value"], False) for name, row in left.items()]
    predictions = []
    for name, value, explicit in wanted:
        inside = bool(line.gaps.min() <= value <= line.gaps.max())
        gain: float | None = None
        half: float | None = None
        if inside or explicit or extrapolate:
            gain, half = line.predict(value, extrapolate=extrapolate)
        predictions.append({"name": name, "gap": value, "gain": gain, "half": half, "inside": inside})
    content = calibration_content(line, found, bootstrap(found), predictions, scale)
    with replacing(folder / "calibration.png") as file:
        draw_line(line, content, file.stream)
    write_json(folder / "calibration.json", plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    report = calibration_report(content, "calibration.png")
    write_text(folder / "calibration.md", report)
    print(f"{report}\nreport: {folder / 'calibration.md'}")
    return content


def _relevant(settings: Any, reprompt: bool = False) -> dict[str, Any]:
    """Return the settings that the rollouts depend on, as JSON; with `reprompt` also those of the configured reprompts."""
    idle = {*_UPDATE, *(() if reprompt else ("reprompt",))}
    kept = {name: value for name, value in settings.as_dict().items() if name not in idle}
    for name in ("gradient_checkpointing", "selective_ac_option"):
        arguments(kept["model_config"]).pop(name, None)
    return json.loads(json.dumps(kept, default=describe))  # a function by its name, not by its address


def main(args: list[str]) -> dict[str, Any]:
    """Run the command: ``pgpo probe --config ...`` or ``pgpo probe --calibrate RUNS...``.

    Args:
        args: Without the program's name.
    """
    transformers_logging.set_verbosity_error()
    if any(word.split("=")[0] == "--calibrate" for word in args):
        parser = jsonargparse.ArgumentParser(prog="pgpo probe", description=(calibrate.__doc__ or "").splitlines()[0])
        # jsonargparse makes no list of positional words by itself.
        parser.add_argument("--calibrate", nargs="+", required=True, metavar="RUNS", help="folders with finished runs")
        parser.add_function_arguments(calibrate, skip={"runs", "extrapolate"})
        action = jsonargparse.ActionYesNo(no_prefix="no_")
        parser.add_argument(
            "--extrapolate", action=action, nargs="?", help="Also predict outside the calibrated range."
        )
        options = vars(parser.parse_args(args))
        return calibrate(options.pop("calibrate"), **options)
    return ProbeCommand(args).run()
