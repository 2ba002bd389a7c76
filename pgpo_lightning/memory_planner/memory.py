"""Bytes per device by part, and the peak of every phase of a step."""

from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PretrainedConfig

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.memory_planner.averaging import rounding_bytes
from pgpo_lightning.memory_planner.dry_run import (
    Compute,
    Peaks,
    along_both,
    along_layers,
    decode_peaks,
    prefill_peaks,
    update_peaks,
)
from pgpo_lightning.memory_planner.external import External
from pgpo_lightning.memory_planner.loss import loss_bytes
from pgpo_lightning.memory_planner.optimizers import OptimizerNeed
from pgpo_lightning.memory_planner.parameters import Count
from pgpo_lightning.memory_planner.rollouts import roomy_tokens, sampler_bytes
from pgpo_lightning.memory_planner.workload import Layout, MicroBatch
from pgpo_lightning.models.shared_decoding import kind_of_keys

GIB = 2**30


@dataclass(frozen=True)
class Sampled:
    """Responses that are decoded at the same time.

    Args:
        prompts: Tokens of every prompt.
        samples: Responses per prompt.
        lengths: Tokens of every response.
        limit: Maximum tokens of a response.
        nucleus: Whether `top_p` is below 1.
    """

    prompts: list[int]
    samples: int
    lengths: list[int]
    limit: int
    nucleus: bool = False


@dataclass(frozen=True)
class Sharding:
    """Distribution of the models over devices.

    Args:
        devices: Number of devices in a step.
        kind: ``single``. ``ddp``: every device has everything, and the buckets in which gradients are exchanged. ``fsdp``:
            every device has an equal part of weights, gradients, optimizer state and teacher, and gathers weights as needed.
        one_file: Whether the first rank gathers all parts for a checkpoint.
        reduces: Whether gradients are exchanged after every micro-batch, with ``fsdp``. Otherwise once per optimizer step.
    """

    devices: int = 1
    kind: str = "single"
    one_file: bool = False
    reduces: bool = True

    @property
    def shards(self) -> int:
        """Number of parts into which the models are divided."""
        return self.devices if self.kind == "fsdp" else 1


@dataclass
class Need:
    """Bytes of one device.

    Attributes:
        standing: Bytes that exist from the first update to the end, by part.
        phases: Additional bytes of each phase, by phase and part.
        absent: Parts of `standing` that do not exist in a phase.
    """

    standing: dict[str, int]
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    absent: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def peak(self, phase: str) -> int:
        """Return the peak bytes of a phase."""
        present = (size for part, size in self.standing.items() if part not in self.absent.get(phase, ()))
        return sum(present) + sum(self.phases[phase].values())

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
    """Return the bytes that exist during the whole run, by part.

    Weights, and gradients of trained weights, have the size of their type. The optimizer's state is that of its class
    (:mod:`~pgpo_lightning.memory_planner.optimizers`). A teacher with its own weights has the size of its type. With sharding
    everything is divided by the number of devices. DDP has a copy of all gradients in its buckets.

    Args:
        weights: Parameters of the student.
        trainable: Number of trained parameters.
        teacher: Number of the teacher's own parameters: all for a moving average or frozen weights, none for ``live``. With
            adapters, those of a second adapter.
        state: Bytes of the optimizer's state without sharding.
        compute: Types.
        sharding: Distribution over devices.
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
    """Return the bytes of the device's copy of a teacher on the host (:mod:`pgpo_lightning.models.offload`).

    Matrices of linear layers, including a head that is not tied, have the type of the products. The rest has its own type.

    Args:
        count: Parameters of the model.
        compute: Types.
    """
    linear = count.matrices + (0 if count.tied else count.head)
    narrow = (compute.autocast or compute.teacher).itemsize
    return linear * narrow + (count.total - linear) * compute.teacher.itemsize


def sampling_copies(count: Count, compute: Compute, device: str) -> int:
    """Return the bytes of the weights that are copied for sampling (:mod:`pgpo_lightning.models.sampling_weights`).

    Args:
        count: Parameters of the model.
        compute: Types.
        device: cuda or cpu.
    """
    linear = count.matrices * compute.narrow.itemsize if compute.autocast not in (None, compute.student) else 0
    if compute.narrow == torch.float32:
        return linear
    native = is_gpu(device) and compute.narrow == torch.bfloat16
    same = native and compute.student == compute.narrow
    return linear + count.head * (0 if same else compute.narrow.itemsize if native else torch.float32.itemsize)


def gathered_bytes(
    count: Count,
    own_teacher: Count | None,
    compute: Compute,
    sharding: Sharding,
    accumulating: bool,
    adapter: int = 0,
    copied: bool = False,
) -> dict[str, int]:
    """Return the bytes of weights that FSDP2 gathers, in the type of the products, in the update and in rollouts.

    In the update: embedding and head, which stay gathered between forward and backward, and the current layer, the next one,
    and a gradient before it is sharded. For the teacher the same without gradients. With several micro-batches whose gradients
    are exchanged once, after the last, also all gradients in fp32. In rollouts: the whole student, so that no token waits for a
    transfer. Of a layer with an adapter only the adapter has gradients. A teacher's adapter is gathered at once, in fp32. From
    FSDP2's documentation, not measured.

    Args:
        count: Parameters of the model.
        own_teacher: Parameters of the teacher's own weights; None if it has none.
        compute: Types.
        sharding: Distribution over devices.
        accumulating: Whether there are several micro-batches.
        adapter: Parameters of the student's adapter; 0 if all weights are trained.
        copied: Whether the teacher is a second adapter.
    """
    if sharding.kind != "fsdp":
        return {"update": 0, "rollouts": 0}
    each = (compute.autocast or compute.student).itemsize
    of_layer = adapter // count.layers
    trained = 3 * of_layer * torch.float32.itemsize if adapter else count.layer * each
    student = (count.root + 2 * count.layer) * each + trained
    theirs = min(each, compute.teacher.itemsize)  # gathering narrows weights, and never widens them
    teacher = 0 if own_teacher is None else (own_teacher.root + 2 * own_teacher.layer) * theirs
    teacher += adapter * torch.float32.itemsize * copied
    gradients = (adapter or count.total) * torch.float32.itemsize if accumulating and not sharding.reduces else 0
    rollouts = count.total * each + adapter * torch.float32.itemsize
    return {"update": student + teacher + gradients, "rollouts": rollouts}


def micro_batch_bytes(
    config: PretrainedConfig,
    compute: Compute,
    micro_batch: MicroBatch,
    teachers: list[str],
    device: str,
    accumulating: bool,
    top_k: bool = False,
    trains_head: bool = True,
    external: External | None = None,
) -> tuple[dict[str, int], Peaks]:
    """Return the peak bytes of one micro-batch by part, and the peaks of all of its pieces.

    Args:
        config: Configuration of the model.
        compute: Types and checkpointing.
        micro_batch: The rows.
        teachers: Models that make up the teacher: ``own``, ``student``.
        device: cuda or cpu.
        accumulating: Whether there are more micro-batches, so that gradients exist from the start.
        top_k: Whether the divergence is over the most probable tokens only.
        trains_head: Whether the head gets a gradient.
        external: The teacher's own model, if it is another than the student's.
    """
    text = config.get_text_config()
    layout = Layout.of(micro_batch.student)
    sizes = (layout.tokens, text.hidden_size, text.vocab_size, compute, device, len(teachers), trains_head, top_k)
    loss = loss_bytes(*sizes, None if external is None else external.config.get_text_config().hidden_size)
    packed = [(whose, micro_batch.teacher) for whose in teachers if micro_batch.teacher is not None]
    run = partial(
        update_peaks,
        compute=compute,
        student=micro_batch.student,
        teachers=packed,
        loss=loss,
        accumulating=accumulating,
    )
    if external is None:
        peaks = along_layers(run, config, compute.period)
    else:
        both = partial(along_both, period=compute.period)
        peaks = both(lambda few, of_teacher: run(few, teacher_config=of_teacher), config, external.config)
        passing = external.temporary_bytes(compute.narrow)
        peaks |= {name: peak + passing for name, peak in peaks.items() if name.startswith("teacher forward")}
    held = {"activations": peaks.pop("activations"), "hidden states": peaks.pop("hidden")}
    highest = max(peaks, key=lambda name: peaks[name])
    # The part of the peak that the forward pass does not hold is temporary.
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
    """Return the peak bytes of sampling by part: keys and values, sampler, temporary tensors of the model.

    Args:
        config: Configuration of the model.
        compute: Types.
        sampled: Responses that are decoded at the same time.
        device: cuda or cpu.

    Returns:
        The parts, and the peaks of prefill and decoding.
    """
    text = config.get_text_config()
    kind = kind_of_keys(sampled.prompts, sampled.samples, is_gpu(device))
    prefill = along_layers(lambda few: prefill_peaks(few, compute, sampled.prompts, sampled.samples, kind), config)
    rows, prompts, longest = len(sampled.lengths), len(sampled.prompts), max(sampled.prompts)
    tensors = 2 * text.num_hidden_layers
    per_token = prefill["prompts"] / (prompts * longest * tensors)  # of one tensor
    cache = round(roomy_tokens(prompts, longest, sampled.lengths, tensors, device, kind.copied) * per_token)
    # The maximum number of tokens that a forward pass attends to: active responses times their current length.
    ordered = sorted(sampled.lengths, reverse=True)
    going, age = max(((i + 1, n) for i, n in enumerate(ordered)), key=lambda pair: pair[0] * (longest + pair[1]))
    few_prompts = sampled.prompts[: -(-going // sampled.samples)]
    decode = along_layers(lambda few: decode_peaks(few, compute, few_prompts, sampled.samples, age - 1, kind), config)[
        "decode"
    ]
    sampler = sampler_bytes(rows, text.vocab_size, prefill["logits"] // (rows * text.vocab_size), sampled.nucleus)
    # Logits and probabilities of the previous step still exist.
    kept = 2 * torch.float32.itemsize * rows * text.vocab_size
    record = 12 * rows * sampled.limit  # tokens and their log-probabilities
    decoding = {"keys and values": cache, "sampler": max(sampler, kept) + record, "temporary": 0}
    decoding["temporary"] = max(0, kept + decode - decoding["sampler"])
    total = sum(decoding.values())
    if prefill["prefill"] > total:
        decoding = {
            "keys and values": prefill["prompts"],
            "sampler": 0,
            "temporary": prefill["prefill"] - prefill["prompts"],
        }
    return decoding, {"prefill": prefill["prefill"], "decoding": total}


def update_need(
    count: Count, compute: Compute, optimizer: OptimizerNeed, ema: bool, sharding: Sharding, rounded: bool = False
) -> dict[str, int]:
    """Return the temporary bytes of the optimizer step and of the teacher's update.

    Clipping multiplies gradients in place. A moving average in another type than the student's copies one parameter at a time; in
    bf16, where it is rounded stochastically, a slice of one.

    Args:
        count: Parameters of the model.
        compute: Types.
        optimizer: Memory of the optimizer for the trained parameters.
        ema: Whether the teacher is a moving average.
        sharding: Distribution over devices.
        rounded: Whether the average is in bf16.
    """
    copies = ema and not rounded and compute.student != compute.teacher
    largest = max(torch.Size(shape).numel() for shape in count.shapes)
    passing = max(optimizer.passing, largest * compute.teacher.itemsize * copies)
    slices = rounding_bytes(list(count.shapes), compute.student, sharding.shards) if rounded else 0
    return {"temporary": max(-(-passing // sharding.shards), slices)}
