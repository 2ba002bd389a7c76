"""Runs on the pretended GPU: which settings are combined, and a whole fit of each combination."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

from pgpo_lightning import modules
from pgpo_lightning.callbacks import InformationMultiplier, KLAdaptiveMultiplier
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.models.shared_decoding import SharedPrompts
from pgpo_lightning.objectives.gates import ConfidenceGate
from pgpo_lightning.rollout import transformers_engine
from pgpo_lightning.teachers.configs import RepromptConfig
from pgpo_lightning.training.learner import Learner
from tests.support.adapters import lora
from tests.support.helpers import GRPO_LIMITS, LIMITS, TOKENIZER, build, half_right, loader, questions, tiny_model
from tests.support.offload import OPEN
from tests.support.pretended_gpu import Counts, counting
from tests.support.pretended_gpu.trainer import PRECISIONS, gpu_trainer

OWN = ("ema", "frozen", "trust-region", "restart", "gated")
FACTORS: dict[str, tuple[Any, ...]] = {
    "module": ("SDPO", "SRPO", "RLSD", "CEPO", "DRIFT", "TGPO", "OPD", "GRPO", "HAPO"),
    "teacher": ("none", "reference", "live", "external", "narrow", *OWN),
    "precision": PRECISIONS,
    "offload": (False, True),
    "checkpointing": (False, True),
    "lora": (False, True),
    "allocation": (None, "token", "sequence"),
    "multiplier": (None, "information", "kl"),
}


def valid(run: dict[str, Any]) -> bool:
    """Return whether the settings go together."""
    module, teacher = run["module"], run["teacher"]
    if module in ("GRPO", "HAPO"):
        goes = teacher in ("none", "reference")[: 1 + (module == "GRPO")] and run["multiplier"] != "information"
    else:
        goes = teacher == "external" if module == "OPD" else teacher not in ("none", "reference")
    if run["offload"]:
        goes &= teacher in ("external", "narrow", *OWN) and (teacher == "external" or not run["lora"])
    if teacher == "narrow":
        goes &= not run["lora"]
    if run["allocation"] is not None:
        goes &= module in ("SDPO", "SRPO", "OPD")
    return goes


def covering_runs() -> list[dict[str, Any]]:
    """Return runs in which every pair of settings that go together occurs (pairwise testing), chosen greedily."""
    number: dict[Any, int] = {}
    runs = []
    for values in product(*FACTORS.values()):
        run = dict(zip(FACTORS, values, strict=True))
        if valid(run):
            pairs = combinations(run.items(), 2)
            runs.append((sum(1 << number.setdefault(pair, len(number)) for pair in pairs), run))
    missing, chosen = (1 << len(number)) - 1, []
    while missing:
        covered, run = max(runs, key=lambda each: (each[0] & missing).bit_count())
        missing &= ~covered
        chosen.append(run)
    return chosen


@dataclass
class Fit:
    """A finished fit.

    Attributes:
        module: The module, with its counters.
        decoding: What all sampling took.
        tokens: Tokens that were decoded after the first, each for a whole batch of responses.
        batches: Batches of responses that were sampled.
        learning: What all micro-batches took, backward passes apart.
        passes: Micro-batches.
        moving: What all moves of the teacher took.
    """

    module: Any
    decoding: Counts = field(default_factory=Counts)
    tokens: int = 0
    batches: int = 0
    learning: Counts = field(default_factory=Counts)
    passes: int = 0
    moving: Counts = field(default_factory=Counts)


def settings_of(run: dict[str, Any], external: str) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of the module of a run.

    Args:
        run: From :func:`covering_runs`.
        external: Folder of a teacher of its own.
    """
    teacher = run["teacher"]
    yield from (GRPO_LIMITS if run["module"] in ("GRPO", "HAPO", "OPD", "TGPO") else LIMITS).items()
    if run["module"] == "TGPO" and teacher != "external":
        yield "reprompt", RepromptConfig(max_reprompt_len=LIMITS["max_reprompt_len"])
    if teacher == "reference":
        yield "kl_to_reference", 0.1
    elif teacher == "external":
        yield "teacher.model", external
        yield "teacher_regularization", "frozen"
    elif teacher == "narrow":
        yield "teacher_regularization", "ema"
        yield "teacher.dtype", "bfloat16"
    elif teacher != "none":
        yield "teacher_regularization", teacher
    if teacher == "restart":
        yield "teacher_period", 2
    if teacher == "gated":
        yield "teacher_gate", OPEN
    if run["module"] == "HAPO":
        yield "gate", ConfidenceGate(0.9)  # opens always
        yield "max_response_length", 32  # room for demonstrations
    if run["offload"]:
        yield "teacher_offload", True
    if run["checkpointing"]:
        yield "gradient_checkpointing", True
    if run["lora"]:
        yield "lora", lora()
    if run["allocation"]:
        yield "token_weights", TokenWeights(run["allocation"])


def fit(run: dict[str, Any], folder: Path, external: str, patch: Any, **settings: Any) -> Fit:
    """Train for two steps and evaluate.

    Args:
        run: From :func:`covering_runs`.
        folder: For what the run writes.
        external: Folder of a teacher of its own.
        patch: pytest's `monkeypatch`.
        settings: Of the Trainer.

    Raises:
        DeviceMismatchError: If devices are mixed anywhere.
    """
    base = getattr(modules, run["module"])
    made = build(
        base, tiny_model(tie_word_embeddings=run["lora"]), half_right, tokenizer=TOKENIZER, num_generations=4, eval_samples=2,
        **dict(settings_of(run, external)),
    )  # fmt: skip
    done = Fit(made)
    sample, learn, append = transformers_engine._sample, Learner._micro_batch, SharedPrompts.append
    move = Learner.move_teacher

    def sampled(*args: Any) -> Any:
        done.batches += 1
        with counting(done.decoding):
            return sample(*args)

    def appended(*args: Any) -> None:
        done.tokens += 1
        append(*args)

    def learnt(*args: Any) -> Any:
        done.passes += 1
        with counting(done.learning):
            return learn(*args)

    patch.setattr(transformers_engine, "_sample", sampled)

    def moved(learner: Learner) -> None:
        with counting(done.moving):
            move(learner)

    patch.setattr(Learner, "_micro_batch", learnt)
    patch.setattr(Learner, "move_teacher", moved)
    patch.setattr(SharedPrompts, "append", appended)
    multiplier = {"information": InformationMultiplier(1.0), "kl": KLAdaptiveMultiplier()}
    callbacks = [multiplier[run["multiplier"]]] if run["multiplier"] else []
    trainer = gpu_trainer(
        folder, run["precision"], max_steps=2, val_check_interval=2, check_val_every_n_epoch=None, callbacks=callbacks,
        **settings,
    )  # fmt: skip
    trainer.fit(made, loader(questions(4), 2), loader(questions(2), 2))
    return done
