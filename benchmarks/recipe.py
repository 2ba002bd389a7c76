"""A shipped recipe with random weights and short responses, run by the Trainer, and what `pgpo plan` predicts for it.

The recipe is ``configs/sciknoweval.yaml`` under one of ``configs/scale/``: its module, precision, optimizer, teacher, loss and
engine. Changed are what a machine without a model hub cannot have (weights, tokenizer, questions) and what would take hours
(lengths, numbers of questions).
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.accelerators import SMALL
from benchmarks.measure import Row
from benchmarks.standalone import random_qwen3
from pgpo_lightning.core.types import Question
from pgpo_lightning.memory_planner.cards import Rates
from pgpo_lightning.memory_planner.memory import GIB
from pgpo_lightning.memory_planner.parameters import with_layers
from pgpo_lightning.memory_planner.plan import MemoryPlan, RunSpec, plan_memory
from pgpo_lightning.memory_planner.seconds import step_seconds
from pgpo_lightning.memory_planner.workload import Lengths
from pgpo_lightning.modules import OnPolicyModule

CONFIGS = Path(__file__).parents[1] / "configs"
ROOM = 0.85
"""Fraction of the card's memory that a plan may fill."""


@dataclass(frozen=True)
class Sizes:
    """What is changed of a recipe.

    Args:
        device: cuda or cpu.
        tiny: Whether the model is a toy.
        questions: Questions of a step.
        response: Tokens of every response: random weights end none by themselves.
        held_out: Questions of an evaluation.
        samples: Answers to each of them.
        at_once: Responses decoded at the same time; None for an engine that decides itself.
    """

    device: str
    tiny: bool = False
    questions: int = 4
    response: int = 256
    held_out: int = 8
    samples: int = 4
    at_once: int | None = 32


TINY = {"questions": 2, "response": 6, "held_out": 3, "samples": 2, "at_once": 16}


def even(question: Question, response: str) -> float:
    """Reward a response whose number of characters is even, so that about half of all random ones have a teacher."""
    return float(len(response) % 2 == 0)


def write_data(folder: Path, count: int = 64) -> None:
    """Write questions in the format of SciKnowEval's files."""
    rows = [{"prompt": f"What is {i} + {i + 1}? Choose A, B, C or D.", "answer": "A"} for i in range(count)]
    (folder / "chemistry").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (folder / "chemistry" / f"{split}.json").write_text(json.dumps(rows))


def arguments(overlay: str | None, sizes: Sizes, folder: Path, *more: str) -> list[str]:
    """Return the arguments of `pgpo` for a recipe.

    Args:
        overlay: A file of ``configs/scale``; None for none.
        sizes: What is changed.
        folder: Where the questions are.
        more: Further arguments.
    """
    overlays = [] if overlay is None else ["--config", str(CONFIGS / "scale" / f"{overlay}.yaml")]
    changed = {
        "trainer.default_root_dir": folder / "runs",
        "trainer.accelerator": "gpu" if sizes.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "model.verifier": "benchmarks.recipe.even",
        "model.model_config.tokenizer": "toy",
        "model.max_prompt_length": 256,
        "model.max_response_length": sizes.response,
        "model.reprompt.max_reprompt_len": 256 + sizes.response,
        "model.evaluation.samples": sizes.samples,
        "data.path": folder,
        "data.batch_size": sizes.questions,
        "data.limit_val": sizes.held_out,
    }
    if sizes.at_once is not None:
        changed["model.evaluation.max_sequences"] = sizes.at_once
    if sizes.tiny:  # a vocabulary of 512
        changed["model.divergence.distillation_topk"] = 20
    flags = [part for name, value in changed.items() for part in (f"--{name}", str(value))]
    return ["--config", str(CONFIGS / "sciknoweval.yaml"), *overlays, *flags, *more]


def fitting(run: RunSpec, memory: float | None) -> RunSpec:
    """Return the run with as many layers as the memory has room for; with all of them if it is unknown.

    Peaks are linear in the number of layers, so two plans tell it.

    Args:
        run: With all layers.
        memory: GiB of the card.

    Raises:
        ValueError: If not even two layers fit.
    """
    layers = run.config.get_text_config().num_hidden_layers
    if memory is None or layers <= 4:
        return run
    few, more = (
        max(plan_memory(replace(run, config=with_layers(run.config, n))).need.peaks.values()) / GIB for n in (2, 4)
    )
    fits = 2 + int((ROOM * memory - few) / ((more - few) / 2))
    if fits < 2:
        raise ValueError(f"Expected two layers of the recipe to fit {memory:.1f} GiB, but they take {few:.1f} GiB.")
    return replace(run, config=with_layers(run.config, min(layers, fits)))


class Watch(L.Callback):
    """Records every step: seconds by phase, and on a GPU the peaks of allocated and reserved memory of rollouts and update."""

    def __init__(self, module: OnPolicyModule) -> None:
        self.steps: list[Row] = []
        self.prompts: list[tuple[int, int]] = []
        self._peaks: Row = {}
        judge = module.judge

        def after_rollouts(*args: Any) -> Any:
            self._peak("rollouts")
            return judge(*args)

        module.judge = after_rollouts  # type: ignore[method-assign]

    def on_train_batch_start(self, *_: Any) -> None:
        """Forget the peaks of what came before."""
        self._peaks = {}
        self._restart()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Record the step."""
        self._peak("update")
        found = pl_module.reported
        row = {name: found[f"timing_s/{tag}"] for name, tag in (("rollouts", "gen"), ("update", "update_actor"))}
        self.steps.append(row | {"step": found["timing_s/step"]} | self._peaks)
        for sample in pl_module.last_samples:
            if sample.reprompt_ids is not None:
                self.prompts.append((len(sample.rollout.prompt_ids), len(sample.reprompt_ids)))

    def _peak(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self._peaks[f"{phase}_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
            self._peaks[f"{phase}_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
            self._restart()

    def _restart(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measure(
    command: Any, run: RunSpec, sizes: Sizes, rates: Rates, peak_flops: float, record: Callable[[Row], None]
) -> None:
    """Take the steps of a recipe and one evaluation, and record measured values beside predicted ones.

    Args:
        command: The parsed recipe, with module and data.
        run: What it is planned as, with the layers that fit.
        sizes: What is changed.
        rates: What predictions are made from.
        peak_flops: Of the card, for utilisation.
        record: Takes each row when it is known.
    """
    module, data, trainer = command.model, command.datamodule, command._get(command.config, "trainer")
    text = run.config.get_text_config()
    shape = {name: getattr(text, name) for name in SMALL}
    dtype = getattr(torch, module.student.config.dtype)
    module.student.given = random_qwen3(sizes.device, dtype, tied=text.tie_word_embeddings, tiled=True, **shape)
    watch = Watch(module)
    loop = L.Trainer(
        accelerator=trainer.accelerator,
        devices=1,
        precision=trainer.precision,
        max_steps=trainer.max_steps,
        limit_val_batches=0,
        callbacks=[watch],
        default_root_dir=trainer.default_root_dir,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loop.fit(module, data)
    if not watch.prompts:
        raise RuntimeError("Expected some rollouts with a teacher, but no response was rewarded.")
    prompt, reprompt = (round(statistics.fmean(lengths)) for lengths in zip(*watch.prompts, strict=True))
    lengths = Lengths(prompt, reprompt, run.longest_response, longest=run.longest_response)
    plan = plan_memory(replace(run, lengths=lengths))
    predicted = step_seconds(plan.run, rates)
    record({"what": "plan", "layers": text.num_hidden_layers, "prompt_tokens": prompt, "reprompt_tokens": reprompt})
    seconds = {"rollouts": predicted.rollouts, "update": predicted.update, "step": predicted.step}
    for number, step in enumerate(watch.steps):
        for phase in ("rollouts", "update"):
            record(
                {"what": phase, "step": number, "seconds": step[phase], "predicted_s": seconds[phase]}
                | {"predicted_to_measured": seconds[phase] / step[phase]}
                | {"utilisation": _operations(plan, phase) / step[phase] / peak_flops}
                | {name.removeprefix(f"{phase}_"): size for name, size in step.items() if name.startswith(f"{phase}_")}
                | {"plan_gib": _peak(plan, phase) / GIB}
            )
        ratio = {"predicted_s": predicted.step, "predicted_to_measured": predicted.step / step["step"]}
        record({"what": "step", "step": number, "seconds": step["step"]} | ratio)
    tester = L.Trainer(
        accelerator=trainer.accelerator,
        devices=1,
        precision=trainer.precision,
        default_root_dir=trainer.default_root_dir,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    start = time.perf_counter()
    tester.validate(module, data, verbose=False)
    spent, expected = time.perf_counter() - start, predicted.evaluation
    row: Row = {"what": "evaluation", "answers": sizes.held_out * sizes.samples, "seconds": spent}
    record(row | ({} if expected is None else {"predicted_s": expected, "predicted_to_measured": expected / spent}))


def _operations(plan: MemoryPlan, phase: str) -> float:
    return sum(flop for name, flop in plan.flops.items() if (name == "rollouts") == (phase == "rollouts"))


def _peak(plan: MemoryPlan, phase: str) -> int:
    peaks = plan.need.peaks
    return peaks["rollouts"] if phase == "rollouts" else max(peaks["gradients"], peaks["optimizer"])
