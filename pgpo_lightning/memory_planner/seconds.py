"""Seconds of a step by phase, and of an evaluation, predicted from operations, bytes and FLOPs on a named card."""

from dataclasses import dataclass, field, replace

import torch

from pgpo_lightning.core.types import Sample
from pgpo_lightning.memory_planner import flops
from pgpo_lightning.memory_planner.averaging import rounding_work
from pgpo_lightning.memory_planner.cards import Rates
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.flops import Width
from pgpo_lightning.memory_planner.generation import Generation, Group, Sampling
from pgpo_lightning.memory_planner.optimizers import optimizer_need
from pgpo_lightning.memory_planner.parameters import Count, count
from pgpo_lightning.memory_planner.passes import student_work, teacher_work
from pgpo_lightning.memory_planner.plan import AVERAGING, TEACHERS, RunSpec, step_flops
from pgpo_lightning.memory_planner.work import Work
from pgpo_lightning.memory_planner.workload import Layout, MicroBatch

ROLLOUTS = ("weight sync", "prefill", "decode")
"""The phases of a step that are rollouts. All others are the update."""

_WIDE = 4  # bytes of logits, gradients and reduced gradients


@dataclass
class StepSeconds:
    """Predicted seconds of a run.

    Attributes:
        rates: What they are calculated from.
        phases: Seconds of a step by phase, without evaluation. Communication is not hidden behind computation.
        evaluation: Seconds of one evaluation; None if there is none or the number of questions is unknown.
        evaluations: Evaluations per step, over the whole run; None if they are not counted in steps.
    """

    rates: Rates
    phases: dict[str, float] = field(default_factory=dict)
    evaluation: float | None = None
    evaluations: float | None = None

    @property
    def step(self) -> float:
        """Seconds of a step without evaluation."""
        return sum(self.phases.values())

    @property
    def rollouts(self) -> float:
        """Seconds of its rollouts."""
        return sum(seconds for phase, seconds in self.phases.items() if phase in ROLLOUTS)

    @property
    def update(self) -> float:
        """Seconds of its update."""
        return sum(seconds for phase, seconds in self.phases.items() if phase not in ROLLOUTS)

    @property
    def amortised(self) -> float | None:
        """Seconds of evaluation per step."""
        return None if self.evaluation is None or self.evaluations is None else self.evaluation * self.evaluations


def step_seconds(run: RunSpec, rates: Rates) -> StepSeconds:
    """Predict the seconds of a step and of an evaluation.

    Not included: the verifier, tokenization, checkpoints, the loss' launches, and what the host does between phases.

    Args:
        run: The run.
        rates: Of the device.
    """
    counted, rows = count(run.config), run.rows()
    batches = run.micro_batches(rows)
    generation = Generation(run.config, sampling_compute(run), Width.of(run.config, counted), rates, run.device)
    sampling = Sampling(run.longest_response, run.engine, run.at_once, captured=run.captured)
    phases = {"weight sync": sync_seconds(run, counted, rates)}
    phases |= generation.seconds(groups_of(rows, run.samples), sampling)
    phases |= update_seconds(run, counted, batches, rows, rates)
    phases |= exchange_seconds(run, counted, len(batches), rates)
    phases["optimizer and teacher"] = optimizer_seconds(run, counted, rates)
    found = StepSeconds(rates, {name: seconds for name, seconds in phases.items() if seconds})
    if run.evaluations is not None:
        found.evaluations = run.evaluations.per_step
        if run.evaluations.questions is not None:
            found.evaluation = evaluation_seconds(run, run.evaluations.questions, generation, phases["weight sync"])
    return found


def sampling_compute(run: RunSpec) -> Compute:
    """Return the types that the sampler computes with.

    Sharded weights are gathered in the type of the products, and vLLM holds its weights in it.
    """
    compute = replace(run.compute, checkpointing=False)
    if run.adapters is not None:
        return replace(compute, adapt=run.adapters.wrap)
    narrow = run.sharding.kind == "fsdp" or run.engine != "transformers"
    return replace(compute, student=compute.narrow if narrow else compute.student)


def groups_of(rows: list[Sample], samples: int) -> list[Group]:
    """Return the questions of sampled rows.

    Args:
        rows: The rows; those of a question are adjacent.
        samples: Responses per question.
    """
    parts = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    return [Group(len(part[0].rollout.prompt_ids), tuple(row.length for row in part)) for part in parts]


def evaluation_seconds(run: RunSpec, questions: int, generation: Generation, sync: float) -> float:
    """Return the seconds of one evaluation, of the device with the most questions.

    Args:
        run: The run; its assumed lengths are those of evaluations too.
        questions: Held-out questions of all devices.
        generation: Of the run.
        sync: Seconds of a weight sync, which sharded weights need for every call of the engine.
    """
    mine = -(-questions // run.sharding.devices)
    groups = groups_of(run.lengths.rows(mine, run.eval_samples), run.eval_samples)
    at_once, each = run.at_once, mine
    if run.evaluations is not None:
        at_once, each = run.evaluations.at_once or at_once, run.evaluations.batch or mine
    sampling = Sampling(run.longest_response, run.engine, at_once, run.nucleus, run.captured)
    calls = [groups[i : i + each] for i in range(0, mine, each)]
    syncs = len(calls) if run.sharding.kind == "fsdp" else 1
    return syncs * sync + sum(sum(generation.seconds(call, sampling).values()) for call in calls)


def sync_seconds(run: RunSpec, counted: Count, rates: Rates) -> float:
    """Return the seconds in which the engine gets the student's weights.

    Sharded weights are gathered once per call. vLLM in this process reads the student's weights and writes its own. A server's
    weights are written to a folder and read from it.

    Args:
        run: The run.
        counted: Parameters of its model.
        rates: Of the device.
    """
    own = counted.total * run.compute.student.itemsize
    seconds = _gathering(run, counted, rates) if run.sharding.kind == "fsdp" else 0.0
    if run.engine == "vllm":
        seconds += (own + counted.total * run.compute.narrow.itemsize) / rates.bandwidth
    if run.engine == "vllm server":
        seconds += 2 * own / rates.disk
    return seconds


def update_seconds(
    run: RunSpec, counted: Count, batches: list[MicroBatch], rows: list[Sample], rates: Rates
) -> dict[str, float]:
    """Return the seconds of forward and backward passes and of the loss.

    The largest micro-batch is counted on tensors without data. Others have as many operations, bytes in proportion to their
    padded tokens, and FLOPs in proportion to those of the formulas in :mod:`~pgpo_lightning.memory_planner.flops`.

    Args:
        run: The run.
        counted: Parameters of its model.
        batches: Micro-batches of an optimizer step.
        rows: Sampled rows of a step.
        rates: Of the device.
    """
    largest = max(batches, key=lambda batch: batch.weight)
    compute = run.compute if run.adapters is None else replace(run.compute, adapt=run.adapters.wrap)
    times = run.passes * run.updates
    students = [Layout.of(batch.student) for batch in batches]
    work = student_work(run.config, compute, largest.student)
    width, own = Width.of(run.config, counted), Layout.of(largest.student)
    found = {f"student {name}": _scaled(one, width, students, own, times).seconds(rates) for name, one in work.items()}
    if run.reference:
        passing = teacher_work(run.config, compute, largest.student)
        found["reference forward"] = _scaled(passing, width, students, own, run.updates).seconds(rates)
    if largest.teacher is not None:
        moving = run.teacher in ("live", "trust-region")  # others are kept for later passes
        passes = (run.passes if moving else 1) * run.updates * len(TEACHERS[run.teacher]) * (1 + run.contrasted)
        config = run.config if run.external is None else run.external.config
        theirs = compute if _shares_weights(run) else replace(compute, student=compute.teacher, adapt=None)
        other = Width.of(config, counted if run.external is None else run.external.count())
        teachers = [Layout.of(batch.teacher) for batch in batches if batch.teacher is not None]
        passing = teacher_work(config, theirs, largest.teacher)
        scaled = _scaled(passing, other, teachers, Layout.of(largest.teacher), passes)
        found["teacher forward"] = scaled.seconds(rates)
    trainable = sum(torch.Size(shape).numel() for shape in _trained(run, counted))
    operations = step_flops(run, counted, trainable, batches, rows)["loss"]
    tokens = times * sum(layout.tokens for layout in students)
    found["loss"] = loss_work(operations, tokens, counted.head, run, len(TEACHERS[run.teacher])).seconds(rates)
    return found


def _shares_weights(run: RunSpec) -> bool:
    """Return whether the teacher is the student's own model, perhaps with another adapter."""
    return run.external is None and (run.adapters is not None or run.teacher == "live")


def _scaled(one: Work, width: Width, layouts: list[Layout], largest: Layout, times: int) -> Work:
    """Return the work of several micro-batches from that of the largest one, which is run `times` times."""
    operations = sum(flops.forward(width, layout) for layout in layouts) / flops.forward(width, largest)
    tokens = sum(layout.padded for layout in layouts) / largest.padded
    return Work(
        one.launches * len(layouts) * times,
        one.flops * operations * times,
        one.product_bytes * tokens * times,
        one.other_bytes * tokens * times,
    )


def loss_work(operations: int, tokens: int, head: int, run: RunSpec, teachers: int) -> Work:
    """Return the work of the loss: its products, and logits that fused operations read and write in fp32.

    The logits of student and teachers are written, read for the statistics, and read again for the gradient, which is written in
    the type of the products and read twice. Top-k selects from both once more.

    Args:
        operations: FLOPs of the products.
        tokens: Tokens with a loss.
        head: Parameters of the head.
        run: The run.
        teachers: Number of models that make up the teacher.
    """
    vocabulary = run.config.get_text_config().vocab_size
    per_logit = _WIDE * (1 + teachers) * (3 + run.top_k) + 3 * run.compute.narrow.itemsize
    weights = head * run.compute.narrow.itemsize * (3 + teachers) * tokens / 1024  # for every chunk
    return Work(0, operations, weights, per_logit * vocabulary * tokens)


def exchange_seconds(run: RunSpec, counted: Count, micro_batches: int, rates: Rates) -> dict[str, float]:
    """Return the seconds in which ranks exchange weights and gradients in the update, one after the other in a ring.

    DDP reduces all gradients, which every rank sends twice. FSDP2 gathers the weights for every forward and backward pass and
    for every pass of a teacher, and reduces gradients once per optimizer step, or after every micro-batch.

    Args:
        run: The run.
        counted: Parameters of its model.
        micro_batches: Number of micro-batches of an optimizer step.
        rates: Of the device.
    """
    ranks, steps = run.sharding.devices, run.updates * run.passes
    share = (ranks - 1) / ranks
    trained = _trained(run, counted)
    gradients = sum(torch.Size(shape).numel() for shape in trained) * _WIDE
    if run.sharding.kind == "ddp":
        return {"gradient reduction": 2 * share * gradients * steps / rates.link}
    if run.sharding.kind != "fsdp":
        return {}
    gathering = 2 * _gathering(run, counted, rates) * steps
    if "own" in TEACHERS[run.teacher]:
        theirs = counted if run.external is None else run.external.count()
        gathering += _gathering(run, theirs, rates) * run.updates
    steps *= micro_batches if run.sharding.reduces else 1
    return {"weight gathering": micro_batches * gathering, "gradient reduction": share * gradients * steps / rates.link}


def _gathering(run: RunSpec, counted: Count, rates: Rates) -> float:
    share = (run.sharding.devices - 1) / run.sharding.devices
    return share * counted.total * run.compute.narrow.itemsize / rates.link


def _trained(run: RunSpec, counted: Count) -> list[tuple[int, ...]]:
    return list(counted.shapes) if run.adapters is None else run.adapters.shapes(run.config)


def optimizer_seconds(run: RunSpec, counted: Count, rates: Rates) -> float:
    """Return the seconds of clipping, the optimizer step and the teacher's update, which the memory's bandwidth bounds.

    Clipping reads the gradients twice and writes them. A moving average reads student and teacher and writes the teacher.
    Stochastic rounding takes the operations of :mod:`pgpo_lightning.models.rounding`.

    Args:
        run: The run.
        counted: Parameters of its model.
        rates: Of the device.
    """
    shapes = _trained(run, counted)
    kind = run.compute.student if run.adapters is None else run.adapters.dtype
    need = optimizer_need(run.optimizer, shapes, kind, run.device)
    trained = sum(torch.Size(shape).numel() for shape in shapes)
    clipping = 3 * trained * kind.itemsize
    teacher = torch.float32.itemsize if run.adapters is not None else run.compute.teacher.itemsize
    averaging = trained * (kind.itemsize + 2 * teacher) * (run.teacher in AVERAGING and not run.rounded)
    moved = (need.traffic + clipping) * run.updates * run.passes + averaging
    rounding = rounding_work(shapes, kind, run.sharding.shards).seconds(rates) if run.rounded else 0.0
    return moved / run.sharding.shards / rates.bandwidth + rounding
