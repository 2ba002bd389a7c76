"""Bytes per device by part, and the peak of every phase of a step."""

from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PretrainedConfig

from pgpo_lightning.memory_planner.dry_run import (
    Compute,
    Peaks,
    along_layers,
    decode_peaks,
    prefill_peaks,
    update_peaks,
)
from pgpo_lightning.memory_planner.loss import loss_bytes
from pgpo_lightning.memory_planner.optimizers import OptimizerNeed
from pgpo_lightning.memory_planner.parameters import Count
from pgpo_lightning.memory_planner.rollouts import roomy_tokens, sampler_bytes
from pgpo_lightning.memory_planner.workload import Layout, MicroBatch

GIB = 2**30


@dataclass(frozen=True)
class Sampled:
    """What is decoded at the same time.

    Args:
        prompts: Tokens of every prompt.
        samples: Responses to each.
        lengths: Tokens of every response.
        limit: Most tokens of a response.
        nucleus: Whether `top_p` is below 1.
    """

    prompts: list[int]
    samples: int
    lengths: list[int]
    limit: int
    nucleus: bool = False


@dataclass(frozen=True)
class Sharding:
    """How devices share the models.

    Args:
        devices: That take part in a step.
        kind: ``single``; ``ddp``: everybody holds everything, and the buckets in which gradients are exchanged; ``fsdp``:
            everybody holds an equal share of weights, gradients, optimizer state and teacher, and gathers what it computes with.
        one_file: Whether the first rank gathers the shares for a checkpoint.
    """

    devices: int = 1
    kind: str = "single"
    one_file: bool = False

    @property
    def shards(self) -> int:
        """Into how many shares models are cut."""
        return self.devices if self.kind == "fsdp" else 1


@dataclass
class Need:
    """Bytes of one device.

    Attributes:
        standing: What is there all the time between the first update and the end, by part.
        phases: What comes on top of it, by phase and part.
        absent: Parts of `standing` that a phase does not need.
    """

    standing: dict[str, int]
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    absent: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def peak(self, phase: str) -> int:
        """Return the most bytes of a phase."""
        there = (size for part, size in self.standing.items() if part not in self.absent.get(phase, ()))
        return sum(there) + sum(self.phases[phase].values())

    @property
    def peaks(self) -> dict[str, int]:
        """The peaks of all phases."""
        return {phase: self.peak(phase) for phase in self.phases}


def standing_bytes(
    weights: int,
    trainable: int,
    teacher: int,
    state: int,
    compute: Compute,
    sharding: Sharding,
    gradient: int | None = None,
) -> dict[str, int]:
    """Return what is there all the time.

    Weights take their type's size each, and so do gradients of those that are trained; Adam's moments are what the class keeps
    (:mod:`~pgpo_lightning.memory_planner.optimizers`); a teacher with weights of its own takes its type's size each, fp32
    for the moving
    average. Sharded, all of it is divided by the number of devices. DDP keeps a copy of all gradients in its buckets.

    Args:
        weights: Parameters of the student.
        trainable: Those of them that are trained.
        teacher: Parameters that the teacher has for itself: all for a moving average or frozen weights, none for ``live``; with
            adapters those of a second adapter.
        state: Bytes of the optimizer's state on one device that holds all of it.
        compute: Types.
        sharding: Over devices.
        gradient: Bytes of a gradient; by default those of a weight.
    """
    each = compute.student.itemsize
    parts = {
        "weights": weights * each,
        "gradients": trainable * (gradient or each),
        "optimizer state": state,
        "teacher": teacher * compute.teacher.itemsize,
    }
    parts = {name: -(-size // sharding.shards) for name, size in parts.items()}
    if sharding.kind == "ddp":
        parts["gradient buckets"] = parts["gradients"]
    return parts


def visiting_bytes(count: Count, compute: Compute) -> int:
    """Return the device's copy of a teacher whose weights are on the host (:mod:`pgpo_lightning.models.offload`).

    Matrices of linear layers in the type of the products, a head that is not tied among them; the rest in its own type.

    Args:
        count: Of the model.
        compute: Types.
    """
    linear = count.matrices + (0 if count.tied else count.head)
    narrow = (compute.autocast or compute.teacher).itemsize
    return linear * narrow + (count.total - linear) * compute.teacher.itemsize


def gathered_bytes(
    count: Count, own_teacher: bool, compute: Compute, sharding: Sharding, accumulating: bool
) -> dict[str, int]:
    """Return what FSDP2 holds whole, in the type of the products: in the update, and in rollouts.

    In the update: embedding and head, which stay whole between forward and backward, and the layer at work with the next one,
    with its gradient before it is cut up; of the teacher the same without gradients. With several micro-batches also all
    gradients, in fp32, which are exchanged once, after the last of them. In rollouts: the whole student, so that no token waits
    for a transfer. Taken from FSDP2's documentation, not measured.

    Args:
        count: Of the model.
        own_teacher: Whether the teacher has weights of its own.
        compute: Types.
        sharding: Over devices.
        accumulating: Whether there are several micro-batches.
    """
    if sharding.kind != "fsdp":
        return {"update": 0, "rollouts": 0}
    each = (compute.autocast or compute.student).itemsize
    student = (count.root + 3 * count.layer) * each
    teacher = (count.root + 2 * count.layer) * each if own_teacher else 0
    gradients = count.total * torch.float32.itemsize if accumulating else 0
    return {"update": student + teacher + gradients, "rollouts": count.total * each}


def micro_batch_bytes(
    config: PretrainedConfig,
    compute: Compute,
    micro_batch: MicroBatch,
    teachers: list[str],
    device: str,
    accumulating: bool,
    top_k: bool = False,
    trains_head: bool = True,
) -> tuple[dict[str, int], Peaks]:
    """Return what one micro-batch takes at its highest, by part, and the peaks it was chosen from.

    Args:
        config: Of the model.
        compute: How.
        micro_batch: The rows.
        teachers: Models that make up the teacher: ``own``, ``student``.
        device: cuda or cpu.
        accumulating: Whether there are more micro-batches, so that gradients exist from the start.
        top_k: Whether the divergence is over the likeliest tokens only.
        trains_head: Whether the head gets a gradient.
    """
    text = config.get_text_config()
    layout = Layout.of(micro_batch.student)
    loss = loss_bytes(
        layout.tokens, text.hidden_size, text.vocab_size, compute, device, len(teachers), trains_head, top_k
    )
    packed = [(whose, micro_batch.teacher) for whose in teachers if micro_batch.teacher is not None]
    run = partial(
        update_peaks,
        compute=compute,
        student=micro_batch.student,
        teachers=packed,
        loss=loss,
        accumulating=accumulating,
    )
    peaks = along_layers(run, config)
    held = {"activations": peaks.pop("activations"), "hidden states": peaks.pop("hidden")}
    highest = max(peaks, key=lambda name: peaks[name])
    # What of the peak is not held by the forward pass belongs to the part at work.
    if highest == "loss":
        parts = {"activations": peaks["loss"] - held["hidden states"] - loss, "loss buffers": loss}
        parts["hidden states"] = held["hidden states"]
    else:
        parts = {"activations": min(held["activations"], peaks[highest])}
        parts["temporary"] = peaks[highest] - parts["activations"]
    return parts, peaks | held | {"loss buffers": loss}


def sampling_bytes(
    config: PretrainedConfig, compute: Compute, sampled: Sampled, device: str
) -> tuple[dict[str, int], dict[str, int]]:
    """Return what sampling takes at its highest by part: keys and values, sampler, temporary tensors of the model.

    Args:
        config: Of the model.
        compute: How.
        sampled: What is decoded at the same time.
        device: cuda or cpu.

    Returns:
        The parts, and sizes they were made from.
    """
    text = config.get_text_config()
    longest, padded = max(sampled.prompts), min(sampled.prompts) < max(sampled.prompts)
    prefill = along_layers(
        lambda few: prefill_peaks(few, compute, sampled.prompts, sampled.samples, sampled.limit), config
    )
    rows, layers = len(sampled.lengths), text.num_hidden_layers
    tensors = 2 * layers
    per_token = prefill["cache"] / (rows * longest * tensors)  # of one tensor
    cache = round(roomy_tokens(longest, sampled.lengths, tensors, device) * per_token)
    # The most tokens that a forward pass ever attends to: responses still going, times their length so far.
    ordered = sorted(sampled.lengths, reverse=True)
    going, length = max(((i + 1, longest + n) for i, n in enumerate(ordered)), key=lambda pair: pair[0] * pair[1])
    decode = along_layers(lambda few: decode_peaks(few, compute, going, length, padded), config)["decode"]
    sampler = sampler_bytes(rows, text.vocab_size, prefill["logits"] // (rows * text.vocab_size), sampled.nucleus)
    kept = (
        2 * torch.float32.itemsize * rows * text.vocab_size
    )  # logits and probabilities of the step before stay in the way
    record = 12 * rows * sampled.limit  # tokens and their log-probabilities
    decoding = {"keys and values": cache, "sampler": max(sampler, kept) + record, "temporary": 0}
    decoding["temporary"] = max(0, kept + decode - decoding["sampler"])
    total = sum(decoding.values())
    if prefill["prefill"] > total:
        decoding = {
            "keys and values": prefill["cache"],
            "sampler": 0,
            "temporary": prefill["prefill"] - prefill["cache"],
        }
    return decoding, {"prefill": prefill["prefill"], "decoding": total}


def update_need(
    count: Count, compute: Compute, optimizer: OptimizerNeed, ema: bool, sharding: Sharding
) -> dict[str, int]:
    """Return what the optimizer's step and the teacher's take on top of what stands: passing tensors.

    Clipping multiplies gradients in place. A moving average in another type than the student's copies one parameter at a time.

    Args:
        count: Of the model.
        compute: Types.
        optimizer: Its need, for the trainable parameters.
        ema: Whether the teacher is a moving average.
        sharding: Over devices.
    """
    copies = ema and compute.student != compute.teacher
    largest = max(torch.Size(shape).numel() for shape in count.shapes)
    passing = max(optimizer.passing, largest * compute.teacher.itemsize * copies)
    return {"temporary": -(-passing // sharding.shards)}
