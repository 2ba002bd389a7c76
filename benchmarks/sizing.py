"""Predictions of `pgpo plan` compared with measurements of real steps: bytes by part and phase, and operations.

Each case builds a random model and SDPO's own module, samples with the package's engine, and takes optimizer steps, in a process
of its own. Measured are the storages of all tensors that are alive (sizing/counter.py), on a CPU; `rss` is beside it the whole
process' resident memory above what it was before the model, at its highest. From the root of the repository::

    OMP_NUM_THREADS=1 python -m benchmarks.sizing                    # all cases: an hour; the last needs over 24 GB of memory
    OMP_NUM_THREADS=1 python -m benchmarks.sizing --cases toy mid    # those whose names begin so
"""

import argparse
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Row

GIB = 2**30
TOY = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4}
TOY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 512}
MID = {"vocab_size": 32768, "hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 12}
MID |= {"num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 64, "max_position_embeddings": 2048}
QWEN3_8B = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 2}
QWEN3_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096}
OPTIMIZERS = ("AdamW", "SGD", "AdamW8bit")


@dataclass(frozen=True)
class Case:
    """One model with its settings.

    Args:
        shape: Shape of a Qwen3.
        dtype: Type of the weights.
        mixed: Whether products run in bf16.
        teacher: Kind.
        narrow: Whether the teacher's average is in bf16.
        optimizer: Name.
        budget: Most padded tokens of a forward pass.
        checkpointing: Whether activations are recomputed.
        selective: As `model_config.selective_ac_option`.
        questions: Questions of a step.
        samples: Responses to each.
        lengths: Tokens of prompt, teacher's prompt and response.
        spread: Spread of the responses' lengths.
        top_k: Top-k of the divergence.
        tied: Whether the head is the embedding.
        passes: Over a batch.
        operations: Whether they are counted too, in a step of its own.
    """

    shape: dict[str, int] = field(default_factory=lambda: MID)
    dtype: str = "float32"
    mixed: bool = False
    teacher: str = "ema"
    narrow: bool = False
    optimizer: str = "AdamW"
    budget: int = 512
    checkpointing: bool = False
    selective: int | str | None = None
    questions: int = 2
    samples: int = 4
    lengths: tuple[int, int, int] = (24, 64, 32)
    spread: float = 0.25
    top_k: int | None = None
    tied: bool = True
    passes: int = 1
    operations: bool = False


_TOY = Case(TOY, questions=16, samples=8, lengths=(48, 120, 28), budget=4096, operations=True)
_MID = Case()
_BIG = Case(QWEN3_8B, "bfloat16", teacher="live", optimizer="SGD", budget=4096, tied=False)
_BIG = replace(_BIG, questions=1, samples=2, lengths=(12, 24, 6))
CASES = {
    "toy": _TOY,
    "toy, top-100": replace(_TOY, top_k=100, operations=False),
    "toy, no budget": replace(_TOY, budget=16384, operations=False),
    "mid": replace(_MID, operations=True),
    "mid, bf16-mixed": replace(_MID, mixed=True),
    "mid, bf16-true": replace(_MID, dtype="bfloat16"),
    "mid, checkpointing": replace(_MID, checkpointing=True),
    "mid, bf16-mixed, checkpointing": replace(_MID, mixed=True, checkpointing=True),
    "mid, every 2nd": replace(_MID, checkpointing=True, selective=2, operations=True),
    "mid, op": replace(_MID, checkpointing=True, selective="op", operations=True),
    "mid, 8-bit": replace(_MID, optimizer="AdamW8bit"),
    "mid, SGD": replace(_MID, optimizer="SGD"),
    "mid, frozen": replace(_MID, teacher="frozen"),
    "mid, live": replace(_MID, teacher="live"),
    "mid, trust region": replace(_MID, teacher="trust-region"),
    "mid, teacher in bf16": replace(_MID, narrow=True),
    "mid, one micro-batch": replace(_MID, budget=4096),
    "mid, untied, two passes": replace(_MID, tied=False, passes=2),
    "8B, 2 layers, SGD, live": _BIG,
    "8B, 2 layers, SGD, live, checkpointing": replace(_BIG, checkpointing=True),
    "8B, 2 layers, SGD, frozen": replace(_BIG, teacher="frozen"),
    "8B, 2 layers, 8-bit, live": replace(_BIG, optimizer="AdamW8bit"),
}


def make_optimizer(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    if name == "AdamW8bit":
        from bitsandbytes.optim import AdamW8bit

        return partial(AdamW8bit, lr=1e-5)
    return partial({"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[name], lr=1e-5)


def predicted(case: Case) -> tuple[Row, Row]:
    """Return the plan's bytes and operations."""
    from transformers import Qwen3Config

    from pgpo_lightning.memory_planner.dry_run import Compute
    from pgpo_lightning.memory_planner.plan import RunSpec, plan_memory

    dtype = getattr(torch, case.dtype)
    teacher = torch.bfloat16 if case.narrow else torch.float32 if case.teacher == "ema" else dtype
    narrow = torch.bfloat16 if case.mixed else None
    compute = Compute(dtype, teacher, narrow, case.checkpointing, selective=case.selective)
    made = plan_memory(
        RunSpec(
            config=Qwen3Config(**case.shape, tie_word_embeddings=case.tied),
            compute=compute,
            optimizer=make_optimizer(case.optimizer),
            teacher=case.teacher,
            lengths=lengths_of(case),
            questions=case.questions,
            samples=case.samples,
            longest_response=max(row.length for row in rows_of(case)),
            micro_batch_tokens=case.budget,
            passes=case.passes,
            top_k=case.top_k is not None,
            device="cpu",
        )
    )
    sizes = made.need.standing | {f"peak, {phase}": peak for phase, peak in made.need.peaks.items()}
    sizes |= {name: made.dry_run[name] for name in ("activations", "loss buffers")}
    sizes["keys and values"] = made.need.phases["rollouts"]["keys and values"]
    return sizes, made.flops


def lengths_of(case: Case) -> Any:
    from pgpo_lightning.memory_planner.workload import Lengths

    return Lengths(*case.lengths, spread=case.spread)


def rows_of(case: Case) -> list[Any]:
    return lengths_of(case).rows(case.questions, case.samples)


def observe(case: Case) -> tuple[Row, Row]:
    """Take a step with the optimizer's state in place and return bytes; and another for the operations."""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.standalone import Standalone, fixed_lengths, random_qwen3
    from pgpo_lightning.memory_planner.counter import LiveBytes
    from pgpo_lightning.memory_planner.optimizers import state_bytes
    from pgpo_lightning.objectives.configs import DivergenceConfig
    from pgpo_lightning.rollout.engine import Sampling
    from pgpo_lightning.rollout.transformers_engine import TransformersEngine
    from pgpo_lightning.teachers.configs import TeacherConfig
    from pgpo_lightning.training import learner
    from pgpo_lightning.training.configs import ModelConfig, UpdateConfig

    torch.set_num_threads(1)
    measure.trim()
    before = measure.status("VmRSS")
    rows = rows_of(case)
    model = random_qwen3("cpu", getattr(torch, case.dtype), case.tied, case.shape["hidden_size"] > 1024, **case.shape)
    policy = Standalone(
        model,
        make_optimizer(case.optimizer),
        update=UpdateConfig(micro_batch_tokens=case.budget, num_iterations=case.passes),
        teacher=TeacherConfig(case.teacher, dtype="bfloat16" if case.narrow else None),
        divergence=DivergenceConfig(distillation_topk=case.top_k),
        model_config=ModelConfig(gradient_checkpointing=case.checkpointing, selective_ac_option=case.selective),
    )
    seen: Row = {}
    counter = LiveBytes()

    @contextmanager
    def piece(function: Callable[..., Any], name: str, held: bool) -> Iterator[Callable[..., Any]]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            kept, start = counter.peak, counter.live
            counter.restart()
            result = function(*args, **kwargs)
            size = counter.live - start if held else counter.peak - start
            seen[name] = max(seen.get(name, 0), size)
            counter.peak = max(kept, counter.peak)
            return result

        original = getattr(learner, function.__name__)
        setattr(learner, function.__name__, watched)
        try:
            yield watched
        finally:
            setattr(learner, function.__name__, original)

    def passes() -> float:
        for _ in range(case.passes):
            step = policy.accumulate(rows)
            seen["gradients"] = sum(p.grad.nbytes for p in policy.model.parameters())
            if counter.live:
                seen["peak, gradients"] = max(seen.get("peak, gradients", 0), counter.restart())
            policy.learner.apply(policy.optimizer, step)
            if counter.peak:
                seen["peak, optimizer"] = max(seen.get("peak, optimizer", 0), counter.restart())
        policy.learner.move_teacher()
        if counter.peak:
            seen["peak, optimizer"] = max(seen["peak, optimizer"], counter.restart())
        for row in rows:
            row.teacher_hidden = None
        return step.loss

    engine, limits = TransformersEngine(), Sampling(max(row.length for row in rows))
    # Its trials run before anything is counted.
    engine.prepare(model, max(len(row.rollout.prompt_ids) for row in rows) + limits.max_tokens)

    def sample() -> None:
        questions = {row.rollout.question.index: row.rollout for row in rows}
        with fixed_lengths([row.length for row in rows]):
            engine.generate(
                policy.model,
                policy.tokenizer,
                [rollout.question for rollout in questions.values()],
                [rollout.prompt_ids for rollout in questions.values()],
                case.samples,
                limits,
            )

    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    policy.optimizer.step()  # makes its state
    policy.optimizer.zero_grad()
    gc.collect()
    mixed = torch.autocast("cpu", torch.bfloat16, case.mixed, cache_enabled=False)
    with (
        mixed,
        piece(learner.source, "activations", True),
        piece(learner.linear_distillation, "loss buffers", False),
        counter,
    ):
        sample()
        seen["peak, rollouts"] = counter.restart()
        passes()
    high = measure.status("VmHWM") - before
    weights = sum(p.nbytes for p in policy.model.parameters())
    teacher = sum(p.nbytes for p in policy.teacher.parameters())
    standing = {"weights": weights, "optimizer state": state_bytes(policy.optimizer), "teacher": teacher}
    for name in [name for name in seen if name.startswith("peak")]:
        seen[name] += sum(standing.values())
    operations: Row = {}
    if not case.operations:
        return standing | seen | {"rss": high * measure.MIB}, operations
    for each in {policy.model, getattr(policy.teacher, "model", policy.model)}:
        each.set_attn_implementation("eager")  # the CPU's fused attention is not counted by torch
    original = policy.backward
    with mixed, FlopCounterMode(display=False) as all_of_it:
        with FlopCounterMode(display=False) as sampling:
            sample()
        policy.backward = counted(original, operations, "student backward")
        passes()
        policy.backward = original
    operations |= {"rollouts": sampling.get_total_flops(), "all": all_of_it.get_total_flops()}
    return standing | seen | {"rss": high * measure.MIB}, operations


def counted(function: Callable[..., Any], into: Row, name: str) -> Callable[..., Any]:
    from torch.utils.flop_counter import FlopCounterMode

    def wrapped(*args: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = function(*args)
        into[name] = into.get(name, 0) + counter.get_total_flops()
        return result

    return wrapped


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a process of its own, the child of one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "lightning"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def compare(name: str, case: Case, separate: bool = True) -> list[Row]:
    """Return a row for each part, with its share of the highest measured peak."""
    start = time.monotonic()
    sizes, operations = predicted(case)
    middle = time.monotonic()
    measured, counted_operations = alone(observe, case) if separate else observe(case)
    print(f"{name}: plan {middle - start:.0f} s, steps {time.monotonic() - middle:.0f} s", flush=True)
    highest = max(size for part, size in measured.items() if part.startswith("peak"))
    operations = operations | {"all": sum(operations.values())}
    rows = []
    for unit, mine, theirs in (("bytes", sizes, measured), ("operations", operations, counted_operations)):
        for part, there in theirs.items():
            row = {"program": "sizing", "case": name, "unit": unit, "part": part, "measured": there}
            row["share"] = there / (highest if unit == "bytes" else theirs["all"])
            if part in mine:
                row |= {"plan": mine[part]} | ({"plan / measured": mine[part] / there} if there else {})
            rows.append(row)
    peak = max(size for part, size in sizes.items() if part.startswith("peak"))
    about = {"program": "sizing", "case": name, "unit": "bytes", "part": "highest peak"}
    return [*rows, about | {"measured": highest, "share": 1.0, "plan": peak, "plan / measured": peak / highest}]


def print_case(name: str, rows: list[Row]) -> None:
    shown = []
    for row in rows:
        scale, unit = (2**20, "MiB") if row["unit"] == "bytes" else (1e9, "GFLOP")
        sizes = {key: row[key] / scale for key in ("measured", "plan") if key in row}
        shown.append(row | sizes | {"unit": unit})
    columns = {"part": "", "unit": "", "measured": ".4g", "plan": ".4g", "plan / measured": ".3f", "share": ".2f"}
    measure.print_table(name, shown, columns)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--here", action="store_true", help="in this process; then `rss` means nothing")
    parser.add_argument("--json", type=Path, help="where the JSON lines go; by default after the tables")
    options = parser.parse_args(arguments)
    rows = []
    for name, case in CASES.items():
        if any(name.startswith(start) for start in options.cases):
            rows += (mine := compare(name, case, separate=not options.here))
            print_case(name, mine)
    off = [r for r in rows if r["share"] >= 0.1 and abs(r.get("plan / measured", 1) - 1) > 0.1]
    print(f"\nparts of at least a tenth whose prediction is off by more than 10 %: {len(off)}")
    for row in off:
        print(f"- {row['case']}: {row['part']}, {row['plan / measured']:.3f}")
    measure.write_json(rows, options.json)
    return rows


if __name__ == "__main__":
    main()
