"""Peak memory of the package's own forward and backward passes, measured on tensors without data.

There are no formulas for activations, because models, precisions, checkpointing and layouts differ too much. The decoder runs
with two and with three layers at the real widths and lengths, on fake tensors that have shapes and types but no data.
:class:`~pgpo_lightning.memory_planner.counter.LiveBytes` counts the live bytes between named points. All layers are equal, so
each of these peaks is linear in the number of layers, and two points determine the line. Peaks inside the stack of layers are
not linear, but lie between those at its ends. If every n-th layer is recomputed, n layers take the place of one.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pgpo_lightning.memory_planner.counter import LiveBytes
from pgpo_lightning.memory_planner.flops import Recomputed
from pgpo_lightning.memory_planner.parameters import layers_of, with_layers
from pgpo_lightning.memory_planner.workload import Packed
from pgpo_lightning.models.lm_head import decoder
from pgpo_lightning.models.loading import evaluating
from pgpo_lightning.models.next_token import NextToken
from pgpo_lightning.models.recomputation import Selective, recompute_activations
from pgpo_lightning.models.sampling_weights import sampling_weights
from pgpo_lightning.models.shared_attention import Keys
from pgpo_lightning.models.shared_decoding import SharedPrompts

Peaks = dict[str, int]


@dataclass(frozen=True)
class Compute:
    """Types of the models, and how they compute.

    Args:
        student: Type of the student's weights.
        teacher: Type of the teacher's.
        autocast: Type that matrix products are cast to, if any.
        checkpointing: Whether activations are recomputed.
        attention: As `model_config.attn_implementation`.
        adapt: Freezes the student and adds adapters; by default all weights are trained.
        selective: As `model_config.selective_ac_option`.
    """

    student: torch.dtype = torch.float32
    teacher: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    attention: str | None = None
    adapt: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    selective: Selective | None = None

    @property
    def period(self) -> int:
        """Number of layers after which recomputed and other layers repeat."""
        return self.selective if self.checkpointing and isinstance(self.selective, int) else 1

    def recomputed(self, layers: int) -> Recomputed:
        """Return which share of a forward pass is repeated in the backward pass.

        Args:
            layers: Of the model.
        """
        share = -(-layers // self.period) / layers * self.checkpointing
        if self.selective == "op":
            return Recomputed(0.0, share if self.attention == "eager" else 0.0)
        return Recomputed(share, share)

    @property
    def narrow(self) -> torch.dtype:
        """The type of the operands of matrix products."""
        return self.autocast or self.student


def along_layers(run: Callable[[PretrainedConfig], Peaks], config: PretrainedConfig, period: int = 1) -> Peaks:
    """Return the result of `run` for all layers, extrapolated from two and three layers, or periods of layers."""
    layers = config.get_text_config().num_hidden_layers
    few = 2 * period + layers % period
    if layers <= few + period:
        return run(config)
    two, three = run(with_layers(config, few)), run(with_layers(config, few + period))
    return {name: two[name] + (layers - few) // period * (three[name] - two[name]) for name in two}


def along_both(
    run: Callable[[PretrainedConfig, PretrainedConfig], Peaks],
    config: PretrainedConfig,
    teacher: PretrainedConfig,
    period: int = 1,
) -> Peaks:
    """Return the result of `run` for all layers of student and teacher, extrapolated from few layers of each."""
    return along_layers(
        lambda few: along_layers(lambda few_of_teacher: run(few, few_of_teacher), teacher), config, period
    )


def update_peaks(
    config: PretrainedConfig,
    compute: Compute,
    student: Packed,
    teachers: list[tuple[str, Packed]],
    loss: int,
    accumulating: bool,
    teacher_config: PretrainedConfig | None = None,
) -> Peaks:
    """Return the peak bytes of every part of one micro-batch, without weights and existing gradients.

    Args:
        config: Configuration of the model with few layers; see :func:`along_layers`.
        compute: Types and checkpointing.
        student: The rows, packed for the student.
        teachers: The models of the teacher, ``own`` (its own weights) or ``student``, with the rows packed for each.
        loss: Peak bytes of the loss, without its input hidden states.
        accumulating: Whether gradients of an earlier micro-batch exist. They are not counted. Otherwise the gradients that the
            backward pass creates are counted.
        teacher_config: Configuration of the teacher's own model, if it is another than the student's.

    Returns:
        Bytes by name: `activations` after the student's forward pass, `hidden` states of student and teacher for the loss, and
        the peaks `student forward`, `teacher forward`, `loss` and several of `backward`.
    """
    with fake(compute) as (counter, as_fake):
        model = build(config, compute.student, compute)
        if accumulating:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        plain = dataclasses.replace(compute, checkpointing=False, adapt=None)
        own = build(teacher_config or config, compute.teacher, plain).eval()
        packed = as_fake(student)
        packed_for_teachers = [(own if whose == "own" else model, as_fake(rows)) for whose, rows in teachers]
        marks = _Marks(model, counter, compute.period)
        with counter, autocast(compute):
            marks.watch = "student forward"
            hidden = packed.hidden_states(decoder(model), model.config)
            marks.cut()
            peaks = {"activations": counter.live}
            marks.watch = "teacher forward"
            with (
                torch.no_grad(),
                evaluating(model),
            ):  # layers that recompute activations keep no cache of shared prompts
                teacher_hidden = [
                    rows.hidden_states(decoder(which), which.config) for which, rows in packed_for_teachers
                ]
            marks.cut()
            marks.watch = "backward"
            peaks["hidden"] = hidden.nbytes + sum(tensor.nbytes for tensor in teacher_hidden)
            peaks["loss"] = counter.live + loss
            gradients = _Gradients.apply(hidden, model.get_output_embeddings().weight)
            del hidden, teacher_hidden
            counter.restart()  # the peak of the loss is in `loss`
        with counter:
            gradients.backward()
        marks.cut()
    return peaks | marks.peaks


def prefill_peaks(
    config: PretrainedConfig, compute: Compute, prompts: list[int], samples: int, kind: type[Keys]
) -> Peaks:
    """Return the bytes of running the prompts, without weights and their copies.

    By name: the peak `prefill`; `prompts`, the keys and values of every prompt once; and `logits`.

    Args:
        config: Configuration of the model with few layers.
        compute: Types.
        prompts: Lengths of the prompts.
        samples: Responses per prompt.
        kind: How keys are kept.
    """
    with fake(compute) as (counter, _), autocast(compute), torch.no_grad():
        model = build(config, compute.student, compute).eval()
        with sampling_weights(model):
            run = NextToken(model)  # its copy of the head is counted with the others, by `sampling_copies`
            with counter:
                decoding = SharedPrompts(model, [[0] * n for n in prompts], samples, kinds=[kind], run=run)
        held = sum(part.nbytes for keys in decoding.keys if keys is not None for part in keys.prompts)
        return {"prefill": counter.peak, "prompts": held, "logits": decoding.logits.nbytes}


def decode_peaks(
    config: PretrainedConfig, compute: Compute, prompts: list[int], samples: int, age: int, kind: type[Keys]
) -> Peaks:
    """Return bytes above weights and cache in the forward pass of one new token per response: `decode`.

    Args:
        config: Of the model, with few layers.
        compute: How.
        prompts: Lengths of the prompts.
        samples: Responses per prompt.
        age: Tokens of every response so far.
        kind: How keys are kept.
    """
    with fake(compute) as (counter, _), autocast(compute), torch.no_grad():
        model = build(config, compute.student, compute).eval()
        with sampling_weights(model):
            decoding = grown(model, prompts, samples, age, kind)
            with counter:
                decoding.append(torch.zeros(len(decoding.rows), dtype=torch.int64))
    return {"decode": counter.peak}


def grown(model: PreTrainedModel, prompts: list[int], samples: int, age: int, kind: type[Keys]) -> SharedPrompts:
    """Return a decoding whose responses have so many tokens, and room for another one.

    Args:
        model: On a device without data.
        prompts: Lengths of the prompts.
        samples: Responses per prompt.
        age: Tokens of every response.
        kind: How keys are kept.
    """
    decoding = SharedPrompts(model, [[0] * n for n in prompts], samples, kinds=[kind])
    rows, decoding.room = len(decoding.rows), age + 1
    for keys in decoding.keys:
        if keys is not None:
            room = decoding.room + (keys.columns if keys.copied else 0)
            keys.own = [part.new_empty(rows, part.size(1), room, part.size(3)) for part in keys.prompts]
    decoding.place([age] * rows)
    return decoding


class _Gradients(torch.autograd.Function):
    """Stand-in for the loss that returns its two gradients in fp32, as the loss does."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor) -> Tensor:
        wanted = zip((hidden, head), ctx.needs_input_grad, strict=True)
        ctx.gradients = [torch.empty(t.shape, dtype=torch.float32) if needed else None for t, needed in wanted]
        ctx.dtypes = (hidden.dtype, head.dtype)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        gradients = [gradient if gradient is None else gradient.mul_(upstream).to(dtype) for gradient, dtype in pairs]
        ctx.gradients = None
        return tuple(gradients)


class _Marks:
    """Divides a run where the first and the last layers begin and end, and records the peak of every piece.

    Args:
        model: That is run.
        counter: Of its bytes.
        period: Number of first and of last layers.
    """

    def __init__(self, model: PreTrainedModel, counter: LiveBytes, period: int) -> None:
        self.counter, self.watch = counter, ""
        self.peaks: Peaks = {}
        layers = layers_of(model)
        layers[-1].register_forward_pre_hook(lambda *_: self.cut() if self.watch != "backward" else None)
        for layer in {*layers[:period], *layers[-period:]}:
            layer.register_forward_hook(self._follow)

    def cut(self) -> None:
        """End a piece."""
        name = f"{self.watch} {sum(name.startswith(self.watch) for name in self.peaks)}"
        self.peaks[name] = self.counter.restart()

    def _follow(self, _: nn.Module, __: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if self.watch == "student forward" and output.requires_grad:
            output.register_hook(lambda _: self.cut())


def build(config: PretrainedConfig, dtype: torch.dtype, compute: Compute) -> PreTrainedModel:
    """Return a model for a dry run, in training mode."""
    # Kernels that need a package or a GPU store the same as sdpa: the output and one number per query and head.
    attention = compute.attention if compute.attention in (None, "eager", "sdpa") else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if compute.adapt is not None:
        model = compute.adapt(model)
    if compute.checkpointing:
        recompute_activations(model, compute.selective)
    return model.train()


def autocast(compute: Compute) -> Any:
    """Return the context in which products have the type that they have in a run."""
    # Without a cache of cast weights, as in Lightning: each product casts its own.
    return torch.autocast("cpu", compute.autocast or torch.bfloat16, compute.autocast is not None, cache_enabled=False)


@contextmanager
def _without_data() -> Iterator[None]:
    """Context in which grouped products of experts need only shapes, and what does need data is an error of one line.

    torch's own grouped product accepts only bf16 if tensors have no data; transformers' operation in its place takes any type.
    """
    try:
        with mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False):
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"Expected `model` to compute shapes that do not depend on its data, but its forward pass calls {error.func}: what "
            "it needs cannot be predicted."
        ) from error


@contextmanager
def fake(compute: Compute) -> Iterator[tuple[LiveBytes, Callable[[Packed], Packed]]]:
    """Context in which tensors have no data: a counter of bytes, and a function from packed rows to such tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def as_fake(packed: Packed) -> Packed:
        fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
        changes: dict[str, Any] = {name: mode.from_tensor(t) for name, t in fields.items() if isinstance(t, Tensor)}
        return dataclasses.replace(packed, **changes)

    with warnings.catch_warnings(), ExitStack() as stack:
        # There is never more than one sequence in a row, but transformers cannot determine this without data.
        stack.enter_context(mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None))
        stack.enter_context(_without_data())
        stack.enter_context(mode)
        yield LiveBytes(), as_fake
