"""Operations, FLOPs and bytes of the package's own forward and backward passes, counted on tensors without data.

As for memory there are no formulas for a model's layers: the decoder runs with two and with three layers at its real widths, and
a dispatch mode sees every operation. What it counts is linear in the number of layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pgpo_lightning.memory_planner import dry_run
from pgpo_lightning.memory_planner.dry_run import Compute, along_layers
from pgpo_lightning.memory_planner.work import TokenWork, Work, WorkCounter
from pgpo_lightning.memory_planner.workload import Packed
from pgpo_lightning.models.lm_head import decoder
from pgpo_lightning.models.sampling_weights import sampling_weights
from pgpo_lightning.models.shared_attention import CopiedKeys, Keys


def _along_layers(
    run: Callable[[PretrainedConfig], dict[str, Work]], config: PretrainedConfig, period: int = 1
) -> dict[str, Work]:
    names: list[str] = []

    def flat(few: PretrainedConfig) -> dict[str, Any]:
        found = run(few)
        names[:] = list(found)
        return {f"{name}/{field}": number for name in found for field, number in vars(found[name]).items()}

    numbers = along_layers(flat, config, period)
    fields = [field.name for field in dataclasses.fields(Work)]
    return {name: Work(*(numbers[f"{name}/{field}"] for field in fields)) for name in names}


def decode_work(config: PretrainedConfig, compute: Compute, padded: bool, kind: type[Keys] = CopiedKeys) -> TokenWork:
    """Return the work of the forward pass of one new token per response, without drawing it.

    It is counted at three sizes, because it is linear in rows and in the tokens of all contexts. Weights and logits are those of
    the sampler: 16-bit copies where products are in 16 bits, and fp32 sums.

    Args:
        config: Configuration of the model.
        compute: Types.
        padded: Whether prompts have different lengths, which takes a mask.
        kind: How keys are kept. Where siblings share them, a prompt is one context and each of its responses another.
    """
    sizes = {"base": (2, 64), "wider": (4, 64), "longer": (2, 128)}

    def run(few: PretrainedConfig) -> dict[str, Work]:
        with dry_run.fake(compute):
            model = dry_run.build(few, compute.student, compute).eval()
            return {name: _decode(model, compute, *size, padded, kind) for name, size in sizes.items()}

    found = _along_layers(run, config)
    base = found["base"]
    context = (found["longer"] + base * -1) * (1 / 128)
    row = (found["wider"] + base * -1) * 0.5 + context * -64
    return TokenWork(base + row * -2 + context * -128, row, context)


def _decode(model: PreTrainedModel, compute: Compute, rows: int, length: int, padded: bool, kind: type[Keys]) -> Work:
    prompts = [length // 2] * (rows - 1) + [length // 2 - padded]
    with dry_run.autocast(compute), torch.no_grad(), sampling_weights(model):
        decoding = dry_run.grown(model, prompts, 1, length - length // 2 - 1, kind)
        with WorkCounter() as counter:
            decoding.append(torch.zeros(rows, dtype=torch.int64))
    return counter.work


def prefill_work(config: PretrainedConfig, compute: Compute, tokens: int) -> Work:
    """Return the work of running a prompt of this length; all but its FLOPs is linear in the number of tokens.

    Args:
        config: Configuration of the model.
        compute: Types.
        tokens: Padded tokens.
    """

    def run(few: PretrainedConfig) -> dict[str, Work]:
        counter = WorkCounter()
        with dry_run.fake(compute):
            model = dry_run.build(few, compute.student, compute).eval()
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            with dry_run.autocast(compute), torch.no_grad(), counter:
                model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return {"prefill": counter.work}

    return _along_layers(run, config)["prefill"]


def student_work(config: PretrainedConfig, compute: Compute, rows: Packed) -> dict[str, Work]:
    """Return the work of the student's passes over a micro-batch, without the loss: `forward` and `backward`.

    Args:
        config: Configuration of the model.
        compute: Types and checkpointing.
        rows: The rows, packed for the student.
    """

    def run(few: PretrainedConfig) -> dict[str, Work]:
        forward, backward = WorkCounter(), WorkCounter()
        with dry_run.fake(compute) as (_, fake):
            model, packed = dry_run.build(few, compute.student, compute), fake(rows)
            for parameter in model.parameters():  # gradients of later micro-batches are added to existing ones
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            with dry_run.autocast(compute), forward:
                hidden = packed.hidden_states(decoder(model), model.config)
            with backward:
                hidden.backward(torch.empty_like(hidden))
        return {"forward": forward.work, "backward": backward.work}

    return _along_layers(run, config, compute.period)


def teacher_work(config: PretrainedConfig, compute: Compute, rows: Packed) -> Work:
    """Return the work of the teacher's pass over a micro-batch, without the loss.

    Args:
        config: Configuration of the teacher's model.
        compute: Types. The weights of the model have the type `student`.
        rows: The rows, packed for the teacher.
    """
    plain = dataclasses.replace(compute, checkpointing=False)

    def run(few: PretrainedConfig) -> dict[str, Work]:
        counter = WorkCounter()
        with dry_run.fake(plain) as (_, fake):
            model, packed = dry_run.build(few, plain.student, plain).eval(), fake(rows)
            with dry_run.autocast(plain), torch.no_grad(), counter:
                packed.hidden_states(decoder(model), model.config)
        return {"forward": counter.work}

    return _along_layers(run, config)["forward"]
