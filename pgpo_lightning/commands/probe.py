"""The command ``pgpo probe``: what each context of the self-teacher is worth, before training; and what that foretold.

It takes the configuration of the run to come, samples from the student and from the same weights reading each reprompt, and
compares their scores (arXiv 2605.30070, section 2). With ``--calibrate`` it fits the line from gaps to gains through finished
runs.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonargparse
import lightning as L
import numpy as np
from lightning.pytorch.cli import LightningArgumentParser
from transformers.utils import logging as transformers_logging

from pgpo_lightning.commands.building import BuildCommand
from pgpo_lightning.core.files import output_folder
from pgpo_lightning.core.settings import Count, Nucleus, Range, Temperature, Text, check, checked
from pgpo_lightning.core.types import Question
from pgpo_lightning.models.loading import fp32_by_default
from pgpo_lightning.modules import OnPolicyModule
from pgpo_lightning.probe.calibration import PROBE, Scale, bootstrap, points, read_probe
from pgpo_lightning.probe.contexts import CONTEXTS, CONTROLS, Context, contexts
from pgpo_lightning.probe.figures import draw_gaps, draw_line
from pgpo_lightning.probe.gaps import gap, question_draws, ratio
from pgpo_lightning.probe.line import fit
from pgpo_lightning.probe.measure import Prober, write
from pgpo_lightning.probe.probe_report import calibration_content, calibration_report, probe_report, summary
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.training.start_up import check_combination

QUESTIONS = 128

_UPDATE = (
    *("optimizer", "scheduler", "update", "mismatch", "evaluation", "num_generations", "temperature", "seed"),
    *("divergence", "teacher", "token_weights", "question_weight_exponent", "policy_gradient"),
    *("mixing", "mixing_steps", "evidence_clip"),
)
"""Settings of a module that the probe's rollouts do not depend on, or that it takes from elsewhere. Any other one makes another
probe."""


class ProbeCommand(BuildCommand):
    """Parses what `pgpo fit` parses, and measures what its contexts bring."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is measured, and where it goes."""
        super().add_arguments_to_parser(parser)
        known = f"Contexts to measure beside none: {', '.join(CONTEXTS)}."
        parser.add_argument("--contexts", type=list[str], default=list(CONTEXTS), help=known)
        parser.add_argument(
            "--templates",
            type=dict[str, str],
            default={},
            help="Contexts of your own, name to reprompt template: --templates.careful '{prompt} Check each step.'",
        )
        parser.add_argument(
            "--controls", type=list[str], default=list(CONTROLS), help=f"Leakage controls: {', '.join(CONTROLS)}."
        )
        parser.add_argument("--questions", type=int, default=QUESTIONS, help="Most questions to ask.")
        parser.add_argument("--samples", type=int | None, help="Per question; by default `num_generations`.")
        parser.add_argument("--split", type=str, default="validation", help="Whose questions: train or validation.")
        parser.add_argument("--temperature", type=float | None, help="By default that of the rollouts in training.")
        parser.add_argument("--top_p", type=float, default=1.0, help="Nucleus; 1.0 as in training.")
        parser.add_argument("--output", type=str, default="runs/probe", help="Folder of results and samples.")

    def run(self) -> dict[str, Any]:
        """Measure everything that is not measured yet, and write the report.

        Returns:
            What ``probe.json`` holds.

        Raises:
            ValueError: If a setting is out of range, or the folder holds a probe with others.
            FileExistsError: If `output` is a file.
        """
        module, config = self.model, self.config[self.subcommand]
        teaching = module.objective.teaching if isinstance(module, OnPolicyModule) else None
        if teaching is None:
            raise ValueError(
                f"Expected `model` to be a module with a self-teacher, such as SDPO, but got {type(module).__name__}."
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
        asked = contexts(config.contexts, config.templates, config.controls, teaching.builder)
        folder = output_folder(config.output)
        questions = self._questions(config.split, config.questions)
        settings = {"module": _plain(config.model.init_args), "split": config.split}
        settings["precision"] = str(config.trainer.precision)
        sampling = Sampling(module.max_response_length, temperature, config.top_p)
        chunk = min(self.datamodule.batch_size, len(questions))
        prober = Prober(module, questions, samples, sampling, chunk, module.seed, folder, settings)
        fabric = L.Fabric(
            accelerator=config.trainer.accelerator, devices=1, precision=config.trainer.precision or "32-true"
        )
        check_combination(module.engine, module.lora is not None, sharded=False)
        module.training_run = False  # no teacher's weights: it has the student's
        module.configure_model()
        fabric.setup_module(module)  # to its device, in its precision
        with fabric.autocast(), fp32_by_default():
            content = measure(prober, asked, settings | {"module": _plain(config.model.init_args, reprompt=True)})
        save(content, folder)
        return content

    def _questions(self, split: str, limit: int) -> list[Question]:
        data = self.datamodule
        data.setup("fit")
        data.drop_prompts(self.model.actor.too_long)
        if len(data.questions[split]) < 2:
            raise ValueError(
                f"Expected {split} questions to ask, but {type(data).__name__} has {len(data.questions[split])}."
            )
        return data.questions[split][:limit]


def measure(prober: Prober, asked: list[Context], settings: dict[str, Any]) -> dict[str, Any]:
    """Sample student and teacher, and compare them.

    Args:
        prober: What samples.
        asked: Contexts and controls, `none` first.
        settings: To be recorded beside the prober's own.
    """
    rows = prober.student()
    threshold = prober.module.reward.success_threshold
    student = np.array([row.verdict.reward for chunk in rows for row in chunk]).reshape(-1, prober.samples)
    measured = {context.name: prober.teacher(context, rows) for context in asked}
    draws = question_draws(len(student))
    gaps = {
        name: gap(student, measured["none"].reward, made.reward, threshold, draws) for name, made in measured.items()
    }
    failed = (student < threshold).mean()
    score = ratio(student.mean(axis=1), np.ones(len(student)), draws)
    return {
        "settings": prober.settings | settings | {"joint_sha256": prober.joint_sha256},
        "student": {"score": vars(score), "failed": float(failed)},
        "contexts": [
            summary(context, measured[context.name], gaps[context.name], gaps.get("sibling"), draws)
            for context in asked
        ],
    }


def save(content: dict[str, Any], folder: Path) -> None:
    """Write ``probe.json``, ``probe.md`` and ``probe.png``, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_gaps(content, folder / "probe.png")
    write(folder / PROBE, dumps(content))
    report = probe_report(content, "probe.png")
    write(folder / "probe.md", report.rstrip("\n"))
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
    """Fit the line from gaps before training to gains of training, and tell how well each run is foretold by the others.

    Args:
        runs: Folders with finished runs anywhere below them, of three or more contexts.
        gaps: Folder of the probe that was made before them; by default the nearest ``probe.json`` in a run's folder or above it.
        scale: Which net gap: ``all``, rollouts that can get the context do, as in training here; ``failed``, only failed ones.
        predict: Net gaps of configurations to predict, beside all contexts of the probes that no run was made with.
        extrapolate: Predict also outside of the calibrated range, marked as such.
        output: Folder of ``calibration.md``, ``.json`` and ``.png``.

    Returns:
        What ``calibration.json`` holds.

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
        # A run whose rollouts never get the context learns nothing: the line is not about it.
        left = {name: row for name, row in rows.items() if row["settings"] not in used and row["coverage"]}
        wanted += [(name, row[key]["value"], False) for name, row in left.items()]
    predictions = []
    for name, value, asked in wanted:
        inside = bool(line.gaps.min() <= value <= line.gaps.max())
        told: tuple[float | None, float | None] = (None, None)
        if inside or asked or extrapolate:
            told = line.predict(value, extrapolate=extrapolate)
        predictions.append({"name": name, "gap": value, "gain": told[0], "half": told[1], "inside": inside})
    content = calibration_content(line, found, bootstrap(found), predictions, scale)
    folder.mkdir(parents=True, exist_ok=True)
    draw_line(line, content, folder / "calibration.png")
    write(folder / "calibration.json", dumps(content))
    report = calibration_report(content, "calibration.png")
    write(folder / "calibration.md", report.rstrip("\n"))
    print(f"{report}\nreport: {folder / 'calibration.md'}")
    return content


def dumps(content: dict[str, Any]) -> str:
    """Return JSON with null where there is no number."""
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(settings: Any, reprompt: bool = False) -> dict[str, Any]:
    """Return what the rollouts depend on, as JSON; with `reprompt` also what the configured reprompts do."""
    idle = {*_UPDATE, *(() if reprompt else ("reprompt",))}
    kept = {name: value for name, value in settings.as_dict().items() if name not in idle}
    kept["model_config"].pop("gradient_checkpointing", None)
    return json.loads(json.dumps(kept, default=str))


def main(args: list[str]) -> dict[str, Any]:
    """Run the command: ``pgpo probe --config ...`` or ``pgpo probe --calibrate RUNS...``.

    Args:
        args: Without the program's name.
    """
    transformers_logging.set_verbosity_error()
    if any(word.split("=")[0] == "--calibrate" for word in args):
        parser = jsonargparse.ArgumentParser(prog="pgpo probe", description=(calibrate.__doc__ or "").splitlines()[0])
        # jsonargparse makes no list of words by itself.
        parser.add_argument("--calibrate", nargs="+", required=True, metavar="RUNS", help="folders with finished runs")
        parser.add_function_arguments(calibrate, skip={"runs", "extrapolate"})
        action = jsonargparse.ActionYesNo(no_prefix="no_")
        parser.add_argument(
            "--extrapolate", action=action, nargs="?", help="Predict outside of the calibrated range too."
        )
        given = vars(parser.parse_args(args))
        return calibrate(given.pop("calibrate"), **given)
    if {"-h", "--help"} & {*args}:
        print(
            "pgpo probe --calibrate RUNS ... fits the line from gaps to gains; pgpo probe --calibrate --help lists its options.\n"
        )
    return ProbeCommand(args).run()
