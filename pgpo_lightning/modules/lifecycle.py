"""What surrounds the steps of every module: loading, checks at start-up, optimizers, checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pgpo_lightning.checkpoints.checkpoint_io import check_checkpoint, install
from pgpo_lightning.core.settings import shown
from pgpo_lightning.core.types import Question
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.distributed.fsdp import FullySharded, Placement
from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.models.lm_head import check_head
from pgpo_lightning.models.loading import (
    architecture,
    check_architecture,
    known_tokens,
    load_model,
    positions,
    recompute_activations,
)
from pgpo_lightning.models.lora import LoRA, add_adapter, check_identity, identity, keep_adapter_only
from pgpo_lightning.models.narrow import warn_of_slow_products
from pgpo_lightning.models.soundness import check_padding, shares_prompts
from pgpo_lightning.modules.resuming import Resuming
from pgpo_lightning.teachers.base import Teacher
from pgpo_lightning.teachers.frozen import FrozenTeacher
from pgpo_lightning.training.rates import build_optimizer, check_rates

COUNTERS = ("steps", "skipped", "skipped_in_a_row", "steps_without_signal", "verifier_errors")


class Lifecycle(Resuming):
    """Lightning's hooks around training, none of which knows the objective."""

    given_model: str | PreTrainedModel
    loading: dict[str, Any]
    make_optimizer: OptimizerCallable
    make_scheduler: LRSchedulerCallable | None
    lora: LoRA | None
    base_identity: dict[str, Any] | None
    gradient_checkpointing: bool
    divergence: Divergence | None
    max_response_length: int
    updates_per_batch: int
    training_run: bool
    """False if the module only evaluates, which needs no teacher."""
    teacher: Teacher | None
    placement: Placement
    _warned_of_speed = False

    def setup(self, stage: str) -> None:
        """Check what can be checked before anything is computed, and drop prompts that are too long."""
        self.training_run = stage == "fit"
        if self.training_run and self.trainer.global_step == 0:  # it is compared with Lightning's count
            self.steps_without_signal = 0
        self.decide_seed()
        if stage == "fit":
            _check_strategy(self.trainer.strategy)
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        self._check_combination(sharded)
        known = install(self.trainer.strategy, evaluates=stage != "fit")
        path = self.trainer.ckpt_path
        _check_start(path)
        if known and sharded and path is not None and Path(path).exists():
            check_checkpoint(Path(path))  # sharded weights do not come through that plug-in
        if not self._warned_of_speed:
            self._warned_of_speed = True
            precision, device = str(self.trainer.precision), self.trainer.strategy.root_device
            warn_of_slow_products(precision, self.loading["dtype"], device)
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "drop_prompts"):
            data.drop_prompts(self._too_long)
            self.check_questions(question for questions in data.questions.values() for question in questions)
        if stage == "fit":
            self.collect_settings()
            if known and path is not None and Path(path).exists():
                self.compare_early(Path(path))

    def _check_combination(self, sharded: bool) -> None:
        name = type(self.engine).__name__
        if self.lora is not None and sharded:
            raise MisconfigurationException(
                "Expected no `lora` with sharded weights, but got ModelParallelStrategy. Set `trainer.strategy` to ddp."
            )
        if self.engine.has_weights and (self.lora is not None or sharded):
            what = "`lora`" if self.lora is not None else "sharded weights"
            raise MisconfigurationException(
                f"Expected no {what} with {name}, which takes over whole weights. Set `engine` to TransformersEngine."
            )

    def _too_long(self, question: Question) -> str | None:
        length = len(self.encoder.question(question))
        limit = self.max_prompt_length
        return f"{length} tokens, `max_prompt_length` is {limit}" if length > limit else None

    def configure_model(self) -> None:
        """Load the model, make the teacher, and shard both if the strategy says so; each once."""
        if self.model is None:
            self._load()
        if self.teacher is None and self.training_run:
            self.teacher = self.make_teacher()
        strategy = self.trainer.strategy if self._trainer is not None else None
        if isinstance(strategy, ModelParallelStrategy) and not self.placement.sharded:
            theirs = getattr(self.teacher, "model", None)
            mesh = strategy.device_mesh["data_parallel"]
            self.placement = FullySharded(self.model, theirs, mesh, self.trainer.precision_plugin)
            # Lightning then looks for every weight in a single file by its name; those of a frozen teacher are in none.
            self.strict_loading = not isinstance(self.teacher, FrozenTeacher)

    def _load(self) -> None:
        given = self.given_model
        self.model = load_model(given, **self.loading) if isinstance(given, str) else given
        check_head(self.model)
        self.encoder.know_rows(known_tokens(self.model))
        self._check_positions()
        self._check_top_k()
        if self.lora is not None:
            self._add_adapter(self.lora)
        if self.gradient_checkpointing:
            recompute_activations(self.model)
        self.model.train()
        longest = self.longest_prompt + self.max_response_length
        check_padding(self.model, longest)
        self.shares_prompts = shares_prompts(self.model, longest)
        self.engine.prepare(self.model, longest)

    def make_teacher(self) -> Teacher | None:
        """Return what the student is compared with, made from its weights as they are now."""
        return None

    def _add_adapter(self, lora: LoRA) -> None:
        name = self.given_model if isinstance(self.given_model, str) else self.model.config._name_or_path
        self.base_identity = identity(self.model, name, self.loading, lora)
        add_adapter(self.model, lora, self.seed)
        keep_adapter_only(self)

    @property
    def longest_prompt(self) -> int:
        """Most prompt tokens of any forward pass."""
        return self.max_prompt_length

    def _check_positions(self) -> None:
        there, needed = positions(self.model.config), self.longest_prompt + self.max_response_length
        if there is not None and needed > there:
            raise MisconfigurationException(
                f"Expected prompt and response to fit into the model's {there} positions, but the limits allow "
                f"{self.longest_prompt} + {self.max_response_length} tokens. Lower `max_response_length`, "
                "`max_prompt_length` or `max_reprompt_len`."
            )

    def _check_top_k(self) -> None:
        wanted, vocabulary = self.divergence and self.divergence.top_k, len(self.model.get_output_embeddings().weight)
        if wanted is not None and wanted > vocabulary:
            raise MisconfigurationException(
                f"Expected `distillation_topk` to be at most the {vocabulary} tokens of the model, but got {wanted}. Set it to "
                "null for the full vocabulary."
            )

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule; the module itself steps the schedule, once per batch."""
        optimizer = build_optimizer(self.make_optimizer, [p for p in self.model.parameters() if p.requires_grad])
        if self.placement.sharded and type(optimizer).__module__.startswith("bitsandbytes"):
            raise MisconfigurationException(
                f"Expected an `optimizer` that knows sharded weights, but got {type(optimizer).__name__} of bitsandbytes, which "
                "does not. torchao.optim.AdamW8bit is an 8-bit optimizer that does."
            )
        self._check_rounding(optimizer)
        scheduler = self.describe_optimizer(optimizer)
        if scheduler is None:
            return optimizer
        check_rates(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise MisconfigurationException(
                "Expected a `scheduler` that depends on the step alone, but got ReduceLROnPlateau: it needs a metric."
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _check_rounding(self, optimizer: Optimizer) -> None:
        narrow = {p.dtype for p in self.model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
        if narrow and not getattr(optimizer, "bf16_stochastic_round", False):
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in narrow)
            warnings.warn(
                f"Weights in {names} and an optimizer that rounds to nearest: most updates of a small learning rate are lost "
                "(docs/performance.md, bf16 weights). Keep `dtype` float32 with `trainer.precision` bf16-mixed, or take "
                "torchao.optim.AdamW8bit with `bf16_stochastic_round` true.",
                stacklevel=2,
            )

    def on_fit_start(self) -> None:
        """Check the batch against the number of updates."""
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if size is not None and size % self.updates_per_batch:
            raise MisconfigurationException(
                f"Expected `updates_per_batch` to divide the batch of {size} questions, but got {self.updates_per_batch}."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters, and what is needed to tell whether a checkpoint belongs to a configuration."""
        checkpoint["pgpo_lightning"] = {
            "module": type(self).__name__,
            "architecture": architecture(self.model),
            "lora": self.base_identity,
            "generation": self.model.generation_config.to_json_string(use_diff=True),
            "tokenizer": self.tokenizer.name_or_path,
            "seed": self.seed,
            "settings": self.settings,
            **{name: getattr(self, name) for name in COUNTERS},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs here, and take over the counters.

        Raises:
            MisconfigurationException: If it is another module's, another architecture's or another program's, or has nothing
                but weights where a run is to go on.
        """
        path = self.trainer.ckpt_path if self._trainer is not None else None
        where = f" ({path})" if path else ""
        mine = checkpoint.get("pgpo_lightning")
        if mine is None or mine["module"] != type(self).__name__:
            theirs = f"{mine['module']}'s" if mine else "another program's"
            raise MisconfigurationException(
                f"Expected a checkpoint of {type(self).__name__}, but it is {theirs}{where}."
            )
        check_architecture(mine["architecture"], self.model)
        if self.training_run:
            self.compare(mine)
        check_identity(mine.get("lora"), self.base_identity)
        fits = self._trainer is not None and self.training_run
        if fits and "optimizer_states" not in checkpoint and not self.placement.sharded:
            raise MisconfigurationException(
                f"Expected a checkpoint with the optimizer's state to go on from, but it has nothing but weights{where}. Start a "
                "new run from them: `pgpo export`, and `model` the folder."
            )
        if self.training_run:  # what only evaluates may draw other samples
            self.take_over_seed(mine.get("seed"))
        for name in COUNTERS:
            setattr(self, name, mine.get(name, 0))


def _check_start(path: str | Path | None) -> None:
    """Raise unless all ranks start from the same checkpoint, or none does: each looks for it in its own file system."""
    names = gather(None if path is None else Path(path).name)
    if len(set(names)) > 1:
        raise MisconfigurationException(
            f"Expected every rank to start from the same checkpoint, but ranks found {', '.join(map(shown, names))}. Put the "
            "run's folder on a file system that all nodes share, or copy the checkpoint to each."
        )


def _check_strategy(strategy: Strategy) -> None:
    """Raise unless the steps of this project are right under the strategy."""
    known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy))
    if not known or isinstance(strategy, DeepSpeedStrategy):  # Lightning's DeepSpeed is a kind of DDP
        raise MisconfigurationException(
            f"Expected `trainer.strategy` auto, ddp or {ModelParallelStrategy.__module__}.ModelParallelStrategy (FSDP2), but "
            f"got {strategy.__class__.__name__}: {_why_not(strategy)}."
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise MisconfigurationException(
            f"Expected `tensor_parallel_size` of 1, because no layer is split within itself, but got {size}. Set it, and "
            "`data_parallel_size` to the number of all devices."
        )


def _why_not(strategy: Strategy) -> str:
    if isinstance(strategy, DeepSpeedStrategy):
        return (
            "its engine keeps gradients to itself and clips and counts them by itself, so that no step here would see any. "
            "For sharded weights take FSDP2, for a smaller optimizer alone ddp with bitsandbytes.optim.AdamW8bit"
        )
    if isinstance(strategy, FSDPStrategy):
        return "FSDP1 has no weights outside of the forward pass it wraps, where the loss needs the head. Take FSDP2"
    return "gradients would not be exchanged between ranks"
