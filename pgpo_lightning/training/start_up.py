"""Checks before anything is computed: strategy, lengths, and combinations of settings that do not go together."""

import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pgpo_lightning.checkpoints.checkpoint_io import check_checkpoint, install
from pgpo_lightning.core.texts import shown
from pgpo_lightning.distributed.collectives import gather
from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.models.loading import positions
from pgpo_lightning.models.quantization import Quantization
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.teachers.configs import TeacherConfig
from pgpo_lightning.training.actor import Actor
from pgpo_lightning.training.configs import UpdateConfig
from pgpo_lightning.training.evaluator import Evaluator


def is_sharded(trainer: L.Trainer) -> bool:
    """Return whether weights are sharded over ranks."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def data_mesh(trainer: L.Trainer | None) -> DeviceMesh | None:
    """Return the ranks over which weights are sharded; ``None`` where they are not."""
    strategy = None if trainer is None else trainer.strategy
    return strategy.device_mesh["data_parallel"] if isinstance(strategy, ModelParallelStrategy) else None


def check_trainer(trainer: L.Trainer, fits: bool) -> Path | None:
    """Check the strategy, and the checkpoint that a run starts from; let the strategy read and write this project's files.

    Args:
        trainer: Trainer of the run.
        fits: Whether it trains.

    Returns:
        The checkpoint, if it exists and this project's plug-in reads it.

    Raises:
        MisconfigurationException: If the strategy is none that is supported, or ranks found different checkpoints.
    """
    if fits:
        check_strategy(trainer.strategy)
    known = install(trainer.strategy, evaluates=not fits)
    path = trainer.ckpt_path
    check_same_checkpoint(path)
    if not known or path is None or not Path(path).exists():
        return None
    if is_sharded(trainer):
        check_checkpoint(Path(path))  # sharded weights do not come through that plug-in
    return Path(path)


def check_data(data: Any, actor: Actor, evaluator: Evaluator) -> None:
    """Drop prompts that are too long, and let the verifier and the evaluation look at the rest.

    Args:
        data: The Trainer's data module; others than this project's are checked batch by batch.
        actor: Actor of the run.
        evaluator: Evaluator of the run.

    Raises:
        ValueError: If the verifier cannot judge a question, or a held-out question has no worked solution; names the row.
    """
    if hasattr(data, "drop_prompts"):
        data.drop_prompts(actor.too_long)
        rows = [(split, question) for split, questions in data.questions.items() for question in questions]
        actor.check_questions(q for split, q in rows if split != "predict" or q.answer is not None)
        evaluator.check_questions(q for split, q in rows if split not in ("train", "predict"))


def count_batches(trainer: L.Trainer, update: UpdateConfig) -> float:
    """Return how many batches a run will train on, infinity if that is not known.

    It makes Lightning build the training data loader earlier than it would, so it is not called without need.
    """
    batches = trainer.estimated_stepping_batches
    if trainer.max_steps >= 0:
        batches = min(batches, -(-trainer.max_steps // update.steps_per_batch))
    return batches if batches >= 0 else math.inf


def check_strategy(strategy: Strategy) -> None:
    """Raise unless the steps of this project are right under the strategy.

    Raises:
        MisconfigurationException: Names the strategy and what to set instead.
    """
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


def check_combination(
    engine: Engine,
    quantization: Quantization | None,
    sharded: bool,
    teacher: TeacherConfig | None = None,
    update: UpdateConfig | None = None,
) -> None:
    """Raise if parts do not go together.

    Args:
        engine: Samples rollouts.
        quantization: Of the weights under an adapter, if there is one.
        sharded: Whether weights are sharded over ranks.
        teacher: Settings of the teacher, if there is one.
        update: How a batch becomes optimizer steps.

    Raises:
        MisconfigurationException: Names the setting and what to set instead.
    """
    engine.check()
    if update is not None:
        check_reduction(update, sharded)
    if sharded and quantization is not None:
        raise MisconfigurationException(
            "Expected no `quantization` with sharded weights, because quantised ones cannot be sharded, but got "
            "ModelParallelStrategy. Set `quantization` to null, or `trainer.strategy` to ddp."
        )
    if sharded and teacher is not None and teacher.quantization is not None:
        raise MisconfigurationException(
            "Expected no `teacher.quantization` with sharded weights, because quantised ones cannot be sharded, but got "
            "ModelParallelStrategy. Set `teacher.quantization` to null, or `trainer.strategy` to ddp."
        )
    if sharded and teacher is not None and teacher.offload:
        raise MisconfigurationException(
            "Expected no `teacher.offload` with sharded weights, of which each device holds a part only, but got "
            "ModelParallelStrategy. Set `teacher.offload` to false, or `trainer.strategy` to ddp."
        )


def check_reduction(update: UpdateConfig, sharded: bool) -> None:
    """Raise if it is set how often gradients of shards are exchanged, and there are no shards.

    Args:
        update: How a batch becomes optimizer steps.
        sharded: Whether weights are sharded over ranks.

    Raises:
        MisconfigurationException: Names the setting and what to set instead.
    """
    if not sharded and update.reduce_every_pass is not None:
        raise MisconfigurationException(
            f"Expected no `update.reduce_every_pass` without sharded weights, where it has no effect, but got "
            f"{update.reduce_every_pass}. Set it to null, or `trainer.strategy` to ModelParallelStrategy (FSDP2)."
        )


def check_same_checkpoint(path: str | Path | None) -> None:
    """Raise unless all ranks start from the same checkpoint, or none does: each looks for it in its own file system.

    Raises:
        MisconfigurationException: Names what the ranks found.
    """
    names = gather(None if path is None else Path(path).name)
    if len(set(names)) > 1:
        found = ", ".join("null" if name is None else shown(name) for name in names)
        raise MisconfigurationException(
            f"Expected every rank to start from the same checkpoint, but ranks found {found}. Put the "
            "run's folder on a file system that all nodes share, or copy the checkpoint to each."
        )


def check_positions(model: PreTrainedModel, longest_prompt: int, max_response_length: int) -> None:
    """Raise if prompt and response may be longer than the model's positions.

    Raises:
        MisconfigurationException: Names the limits.
    """
    available, needed = positions(model.config), longest_prompt + max_response_length
    if available is not None and needed > available:
        raise MisconfigurationException(
            f"Expected prompt and response to fit into the model's {available} positions, but the limits allow "
            f"{longest_prompt} + {max_response_length} tokens. Lower `max_response_length`, "
            "`max_prompt_length` or `reprompt.max_reprompt_len`."
        )


def check_top_k(model: PreTrainedModel, divergence: Divergence | None) -> None:
    """Raise if the divergence is over more tokens than the model has.

    Raises:
        MisconfigurationException: Names the field.
    """
    wanted = None if divergence is None else divergence.top_k
    vocabulary = len(model.get_output_embeddings().weight)
    if wanted is not None and wanted > vocabulary:
        raise MisconfigurationException(
            f"Expected `divergence.distillation_topk` to be at most the {vocabulary} tokens of the model, but got {wanted}. Set "
            "it to null for the full vocabulary."
        )


def gathers_checkpoints(trainer: L.Trainer | None) -> bool:
    """Return whether the first rank gathers the shards of all ranks and writes them as one file."""
    strategy = None if trainer is None else trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) and not strategy._save_distributed_checkpoint


def check_optimizer_fits(optimizer: Optimizer, model: PreTrainedModel, sharded: bool, gathered: bool = False) -> None:
    """Raise if the optimizer cannot step or save sharded weights; warn if it loses small updates of narrow ones.

    Args:
        optimizer: The optimizer.
        model: The student.
        sharded: Whether its weights are sharded over ranks.
        gathered: See :func:`gathers_checkpoints`.

    Raises:
        MisconfigurationException: Names the optimizer and another one.
    """
    if sharded and type(optimizer).__module__.startswith("bitsandbytes"):
        raise MisconfigurationException(
            f"Expected an `optimizer` that knows sharded weights, but got {type(optimizer).__name__} of bitsandbytes, which "
            "does not. torchao.optim.AdamW8bit does, with conditions (docs/scaling.md, optimizers with a small state)."
        )
    if gathered and type(optimizer).__module__.startswith("torchao"):
        block = int(getattr(optimizer, "block_size", 1))
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor) and _differs_by_rank(parameter, block):
                raise MisconfigurationException(
                    f"Expected `trainer.strategy.init_args.save_distributed_checkpoint` true with {type(optimizer).__name__} of "
                    f"torchao, whose state of unequal shards, as of {name} {tuple(parameter.shape)}, cannot be gathered into one "
                    "file, but got false. Set it to true: every rank then writes its part into a folder."
                )
    narrow = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
    if narrow and not getattr(optimizer, "bf16_stochastic_round", False):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in narrow)
        warnings.warn(
            f"Weights in {names} and an optimizer that rounds to nearest: most updates of a small learning rate are lost "
            "(docs/performance.md, bf16 weights). Keep `model_config.dtype` float32 with `trainer.precision` bf16-mixed, or "
            "take torchao.optim.AdamW8bit with `bf16_stochastic_round` true.",
            stacklevel=3,
        )


def _differs_by_rank(parameter: DTensor, block: int) -> bool:
    """Return whether ranks have shards of unequal sizes, and torchao's state of some of them is quantised.

    It is from 4,096 numbers, if they fill whole blocks. So one rank may have 8 bits and another 32.
    """
    rows, ranks = parameter.shape[0], parameter.device_mesh.size()
    each = -(-rows // ranks)
    sizes = {max(0, min(each, rows - rank * each)) * (parameter.numel() // rows) for rank in range(ranks)}
    return len(sizes) > 1 and any(size >= 4096 and size % block == 0 for size in sizes)


def check_schedule(scheduler: Any) -> None:
    """Raise if the schedule depends on a metric.

    Raises:
        MisconfigurationException: Names the schedule.
    """
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise MisconfigurationException(
            "Expected a `scheduler` that depends on the step alone, but got ReduceLROnPlateau: it needs a metric."
        )


def check_batch_size(size: int | None, updates_per_batch: int) -> None:
    """Raise if a batch cannot be divided into that many updates.

    Raises:
        MisconfigurationException: Names the field.
    """
    if size is not None and size % updates_per_batch:
        raise MisconfigurationException(
            f"Expected `update.updates_per_batch` to divide the batch of {size} questions, but got {updates_per_batch}."
        )
