"""The specification of a run, and the memory and operations that the run needs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from pgpo_lightning.core.settings import Range, checked, one_of
from pgpo_lightning.core.types import Sample
from pgpo_lightning.memory_planner import flops
from pgpo_lightning.memory_planner.adapters import Adapters
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.external import External
from pgpo_lightning.memory_planner.memory import (
    GIB,
    Need,
    Sampled,
    Sharding,
    gathered_bytes,
    micro_batch_bytes,
    sampling_bytes,
    sampling_copies,
    standing_bytes,
    update_need,
    visiting_bytes,
)
from pgpo_lightning.memory_planner.optimizers import OptimizerNeed, optimizer_need
from pgpo_lightning.memory_planner.parameters import Count, count
from pgpo_lightning.memory_planner.saving import MOVING, Saving, saving
from pgpo_lightning.memory_planner.workload import (
    EngineKind,
    Evaluations,
    Layout,
    Lengths,
    MicroBatch,
    group,
    with_demonstrations,
)
from pgpo_lightning.models.packing import Packing, PromptSharing

TEACHERS = {
    "ema": ["own"],
    "restart": ["own"],
    "gated": ["own"],
    "frozen": ["own"],
    "live": ["student"],
    "trust-region": ["own", "student"],
    "external": ["own"],
    "none": [],
}
AVERAGING = ("ema", "restart")
"""Teachers whose weights are fp32, or, of ``ema`` only, bf16 that is rounded stochastically."""


@checked
@dataclass(frozen=True)
class RunSpec:
    """Everything about a run that its memory and its operations depend on.

    Args:
        config: Configuration of the model.
        compute: Types of weights and products; checkpointing.
        optimizer: Function from parameters to an optimizer.
        teacher: A key of :data:`TEACHERS`.
        lengths: Assumed lengths in tokens.
        questions: Questions per device and step.
        samples: Responses per question.
        longest_response: Maximum tokens of a response.
        at_once: Maximum number of responses decoded at the same time; None for all.
        captured: Whether a step of decoding is a CUDA graph.
        micro_batch_tokens: Maximum padded tokens of a forward pass.
        padding_free: Whether sequences are concatenated in one row.
        updates: Optimizer steps per pass over a batch.
        passes: Passes over a batch.
        top_k: Whether the divergence is over the most probable tokens only.
        independent: Whether every row has its own teacher's prompt.
        evaluated: Maximum responses decoded at the same time in an evaluation; 0 for no evaluation.
        eval_samples: Responses per question in an evaluation.
        nucleus: Whether `top_p` is below 1 in an evaluation.
        sharding: Distribution over devices.
        device: cuda or cpu.
        adapters: Adapters that are trained instead of all weights.
        offload: Whether the teacher's weights are on the host, with a copy on the device while gradients are computed.
        demonstration: Assumed tokens of a demonstration that replaces a rollout in each group (HAPO); None for none.
        keep: Number of checkpoints that are kept; None for all.
        external: The teacher's model, for an external one. Its type is that of the teacher in `compute`.
        contrasted: Whether the teacher reads two prompts (CEPO). Its second pass, before the student's, takes less memory.
        recomputes_logits: Whether the loss depends on whole responses (DRIFT, weights of responses). All responses count as such.
        reference: Whether there is a frozen copy of the initial weights, or adapter, for a KL divergence from it.
        engine: What samples.
        engine_memory: GiB that vLLM takes on a device.
        engine_sleeps: Whether it takes them while it samples only.
        evaluations: Questions of an evaluation and their number per step; None for no evaluation.
        nodes: Number of machines.
    """

    config: PretrainedConfig
    compute: Compute
    optimizer: Callable[[Any], torch.optim.Optimizer]
    teacher: str
    lengths: Lengths
    questions: Annotated[int, Range(least=1)]
    samples: Annotated[int, Range(least=1)]
    longest_response: int
    at_once: int | None = None
    captured: bool = False
    micro_batch_tokens: int = 16384
    padding_free: bool = False
    updates: int = 1
    passes: int = 1
    top_k: bool = False
    independent: bool = False
    evaluated: int = 0
    eval_samples: int = 1
    nucleus: bool = False
    sharding: Sharding = Sharding()
    device: Literal["cuda", "cpu"] = "cuda"
    adapters: Adapters | None = None
    offload: bool = False
    demonstration: int | None = None
    keep: int | None = 1
    external: External | None = None
    contrasted: bool = False
    recomputes_logits: bool = False
    reference: bool = False
    engine: EngineKind = "transformers"
    engine_memory: float = 0.0
    engine_sleeps: bool = False
    evaluations: Evaluations | None = None
    nodes: int = 1

    def __post_init__(self) -> None:
        one_of(tuple(TEACHERS), teacher=self.teacher)

    @property
    def rounded(self) -> bool:
        """Whether the teacher is an average whose weights are rounded to bf16."""
        return self.teacher == "ema" and self.adapters is None and self.compute.teacher == torch.bfloat16

    @property
    def packings(self) -> tuple[Packing, Packing]:
        """Layouts of student and teacher in the module, derived from the configuration."""
        shared: PromptSharing = "always" if self.sharding.kind == "fsdp" else "if-cheaper"
        theirs = self.config if self.external is None else self.external.config
        shares = [
            all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
            for config in (self.config, theirs)
        ]
        student = shares[0] and not self.compute.checkpointing
        return (
            Packing(shared if student else "never", self.padding_free),
            Packing(shared if shares[1] else "never", self.padding_free),
        )

    def rows(self) -> list[Sample]:
        """Return the sampled rows of a step of one device."""
        return self.lengths.rows(self.questions, self.samples, self.independent)

    def micro_batches(self, rows: list[Sample]) -> list[MicroBatch]:
        """Return the micro-batches of one optimizer step of one device.

        Args:
            rows: The sampled rows of a step.
        """
        tokens, sharded = self.demonstration, self.sharding.kind == "fsdp"
        learned = rows if tokens is None else with_demonstrations(rows, self.samples, tokens)
        mini_batch = learned[: -(-len(learned) // self.updates)]
        return group(mini_batch, self.micro_batch_tokens, self.packings, bool(TEACHERS[self.teacher]), sharded)


@dataclass
class MemoryPlan:
    """Memory and operations of a run.

    Attributes:
        run: The run.
        count: Its parameters.
        trainable: Number of trained parameters.
        optimizer: Memory of the optimizer.
        need: Bytes on one device.
        tokens: Per device and step, by name.
        flops: Per device and step, by phase.
        micro_batches: Number of micro-batches in one pass over the batch.
        largest: Layout of the largest micro-batch for student and teacher.
        dry_run: Peaks of the largest micro-batch in the dry run.
        saving: Memory of a checkpoint.
        host: Bytes of host memory that the teacher takes per device.
    """

    run: RunSpec
    count: Count
    trainable: int
    optimizer: OptimizerNeed
    need: Need
    tokens: dict[str, int]
    flops: dict[str, int]
    micro_batches: int
    largest: dict[str, Layout]
    dry_run: dict[str, int]
    saving: Saving
    host: int = 0


def plan_memory(run: RunSpec, rows: list[Sample] | None = None) -> MemoryPlan:
    """Calculate the memory and operations of a run, without its weights and data.

    Args:
        run: The run.
        rows: Samples of a step of one device; by default made from the assumed lengths.
    """
    counted = count(run.config)
    teachers = TEACHERS[run.teacher]
    external = run.external
    owned = "own" in teachers or run.reference
    own = None if not owned or (run.adapters is not None and external is None) else counted
    own = own if external is None else external.count()
    compute = run.compute
    shapes: list[tuple[int, ...]] = list(counted.shapes)
    kind = compute.student
    if run.adapters is not None:
        shapes, kind = run.adapters.shapes(run.config), run.adapters.dtype
        theirs = compute.student if external is None else compute.teacher
        compute = replace(compute, adapt=run.adapters.wrap, teacher=theirs)
    trainable = sum(torch.Size(shape).numel() for shape in shapes)
    optimizer = optimizer_need(run.optimizer, shapes, kind, run.device)
    need = Need(_standing(run, counted, trainable, optimizer, kind, own))
    host = need.standing.pop("teacher") if run.offload else 0

    rows = rows or run.rows()
    batches = run.micro_batches(rows)
    largest = max(batches, key=lambda batch: batch.weight)
    accumulating = len(batches) > 1
    adapter = 0 if run.adapters is None else trainable
    gathered = gathered_bytes(counted, own, compute, run.sharding, accumulating, adapter, owned and external is None)

    sampled = _sampled(run, rows)
    sampling, _ = sampling_bytes(run.config, compute, sampled, run.device)
    sharded = run.sharding.kind == "fsdp"  # gathered in the type of the products
    held = replace(compute, student=compute.narrow) if sharded else compute
    standing = {"gathered weights": gathered["rollouts"], "16-bit copies": sampling_copies(counted, held, run.device)}
    need.phases["rollouts"] = sampling | standing
    need.absent["rollouts"] = ("gradients",)
    if run.evaluated:
        n, each = run.evaluated, min(run.eval_samples, run.evaluated)  # every response may reach the limit
        prompts = [run.lengths.prompt] * (n // each)
        tested = Sampled(
            prompts, each, [run.longest_response] * (len(prompts) * each), run.longest_response, run.nucleus
        )
        like = replace(sampled, nucleus=run.nucleus)
        other = tested != like or run.nucleus
        found = sampling_bytes(run.config, compute, tested, run.device)[0] if other else sampling
        need.phases["evaluation"] = found | standing
        need.absent["evaluation"] = ("gradients",)
    if run.engine != "transformers":  # weights reach it one tensor at a time
        taken = {"vLLM": int(run.engine_memory * GIB)} if run.engine == "vllm" else {}
        need.standing |= {} if run.engine_sleeps else taken
        need.phases |= {phase: taken if run.engine_sleeps else {} for phase in need.phases}

    teachers_run = ["student"] * len(teachers) if run.adapters is not None and external is None else teachers
    parts, peaks = micro_batch_bytes(
        run.config, compute, largest, teachers_run, run.device, accumulating, run.top_k, not adapter, external
    )
    parts["gathered weights"] = gathered["update"]
    if run.offload:
        parts["teacher"] = visiting_bytes(own or counted, compute)
    if run.passes > 1 and teachers == ["own"]:
        tokens = sum(row.length for row in rows)
        theirs_config = run.config if external is None else external.config
        cached = tokens * theirs_config.get_text_config().hidden_size * compute.teacher.itemsize
        kept = tokens * torch.float32.itemsize * run.contrasted  # log-probabilities of the second pass
        parts["teacher's hidden states"] = cached + kept
    need.phases["gradients"] = parts
    if not accumulating:  # the backward pass of the only micro-batch creates them
        need.absent["gradients"] = ("gradients",)
    # On the host it takes no memory of the device, unless it is rounded, which the device does.
    averaged = run.teacher in AVERAGING and own is not None and not run.offload
    need.phases["optimizer"] = update_need(counted, compute, optimizer, averaged, run.sharding, run.rounded)
    return MemoryPlan(
        run,
        counted,
        trainable,
        optimizer,
        need,
        _tokens(rows, batches, 1 + run.contrasted),
        step_flops(run, counted, trainable, batches, rows),
        len(batches) * run.updates,
        {n: Layout.of(p) for n, p in (("student", largest.student), ("teacher", largest.teacher)) if p is not None},
        peaks,
        _saving(run, trainable, shapes, optimizer, kind),
        host,
    )


def _standing(
    run: RunSpec, counted: Count, trainable: int, optimizer: OptimizerNeed, kind: torch.dtype, own: Count | None
) -> dict[str, int]:
    state = 0 if optimizer.paged else optimizer.state
    if run.adapters is None:
        teacher = 0 if own is None else own.total
        parts = standing_bytes(counted.total, trainable, teacher, state, run.compute, run.sharding)
    else:
        parts = standing_bytes(counted.total, trainable, 0, state, run.compute, run.sharding, gradient=kind.itemsize)
        adapters = -(-trainable * kind.itemsize // run.sharding.shards)
        parts["weights"] += adapters
        second = "own" in TEACHERS[run.teacher] or run.reference  # adapter, fp32
        parts["teacher"] = -(-trainable * 4 // run.sharding.shards) if second else 0
    if run.external is not None:
        parts["teacher"] = -(-run.external.weight_bytes(run.compute.teacher) // run.sharding.shards)
    return parts


def _saving(
    run: RunSpec, trainable: int, shapes: list[tuple[int, ...]], optimizer: OptimizerNeed, kind: torch.dtype
) -> Saving:
    teacher = torch.float32 if run.adapters is not None else run.compute.teacher
    copied = run.adapters is not None and run.external is None
    saved = "own" in TEACHERS[run.teacher] or run.reference if copied else run.teacher in MOVING
    return saving(
        weights=trainable * kind.itemsize,
        teacher=trainable * teacher.itemsize * saved,
        state=optimizer.state,
        largest=max(torch.Size(shape).numel() for shape in shapes) * max(kind.itemsize, teacher.itemsize),
        device=run.device,
        gathered=run.sharding.one_file,
        keep=run.keep,
    )


def _sampled(run: RunSpec, rows: list[Sample]) -> Sampled:
    """Return the responses that are decoded at the same time, whole questions if possible, as in the engine."""
    limit = run.at_once or len(rows)
    questions, samples = max(1, limit // run.samples), min(run.samples, limit)
    # The longest come together in the worst case.
    groups = [rows[i : i + run.samples][:samples] for i in range(0, len(rows), run.samples)]
    groups.sort(key=lambda some: -max(row.length + len(row.rollout.prompt_ids) for row in some))
    chosen = groups[:questions]
    prompts = [len(some[0].rollout.prompt_ids) for some in chosen]
    return Sampled(prompts, samples, [row.length for some in chosen for row in some], run.longest_response)


def _tokens(rows: list[Sample], batches: list[Any], prompts: int) -> dict[str, int]:
    layouts = [(Layout.of(b.student), None if b.teacher is None else Layout.of(b.teacher)) for b in batches]
    return {
        "responses": len(rows),
        "response tokens": sum(row.length for row in rows),
        "prompt tokens": sum({row.rollout.question.index: len(row.rollout.prompt_ids) for row in rows}.values()),
        "student's padded tokens": sum(student.padded for student, _ in layouts),
        "teacher's padded tokens": prompts * sum(teacher.padded for _, teacher in layouts if teacher is not None),
    }


def step_flops(
    run: RunSpec, counted: Count, trainable: int, batches: list[MicroBatch], rows: list[Sample]
) -> dict[str, int]:
    """Return the FLOPs of a step by phase.

    Args:
        run: The run.
        counted: Parameters of its model.
        trainable: Number of trained parameters.
        batches: Micro-batches of one optimizer step.
        rows: Sampled rows of the step.
    """
    width = flops.Width.of(run.config, counted)
    other = width if run.external is None else flops.Width.of(run.external.config, run.external.count())
    teachers = len(TEACHERS[run.teacher])
    prompts = [len(rows[i].rollout.prompt_ids) for i in range(0, len(rows), run.samples)]
    ways = [(Layout.of(batch.student), batch.teacher) for batch in batches]
    share = trainable / counted.matrices if run.adapters is not None else 1.0
    times, recomputed = run.passes * run.updates, run.compute.recomputed(counted.layers)
    moving = run.teacher in ("live", "trust-region")
    tokens = sum(layout.tokens for layout, _ in ways)
    again = 2 * other.head * tokens * (1 + teachers) * run.contrasted  # the heads of the second pass
    repeated = 2 * (width.head + other.head * teachers) * tokens * run.recomputes_logits
    once = run.updates * (sum(flops.forward(width, layout) for layout, _ in ways) + 2 * width.head * tokens)
    reference = {"reference forward": once} if run.reference else {}
    return {
        "rollouts": flops.prefill(width, prompts) + flops.decoding(width, prompts, [row.length for row in rows]),
        "student forward": times * sum(flops.forward(width, layout) for layout, _ in ways),
        "student backward": times
        * sum(flops.backward(width, layout, recomputed, min(1.0, share)) for layout, _ in ways),
        # Hidden states of a teacher that stands still are kept for later passes.
        "teacher forward": (run.passes if moving else 1)
        * run.updates
        * teachers
        * (1 + run.contrasted)
        * sum(flops.forward(other, Layout.of(teacher)) for _, teacher in ways if teacher is not None),
        "loss": times
        * sum(
            flops.loss(width, layout.tokens, teachers, run.adapters is None)
            + 2 * (other.head - width.head) * layout.tokens * min(teachers, 1)
            for layout, _ in ways
        )
        + (times if moving else run.updates) * again
        + times * repeated,
        **reference,
    }
