"""A whole step at the size of the paper's run on one accelerator, with the memory that `pgpo plan` predicts beside it.

Qwen3-8B's shapes with random weights in bf16, 8-bit AdamW, an EMA teacher in fp32; 32 questions with 8 responses each, which end
after different numbers of tokens. One call takes at most nine minutes; nothing has to be installed but torch, transformers,
lightning and bitsandbytes (without it AdamW of torch, which the table says). From the root of the repository::

    python -m benchmarks.large --json large.jsonl
    python -m benchmarks.large --tiny              # the same code on a CPU, in seconds

A line is written as soon as something is known: the plan, every step's rollouts, every step's update. What is not reached in time
is missing, and the last line says so. The first step compiles and makes the optimizer's state, and is not to be counted.

Settings are tried one after the other: prompts run once for all of their responses (`shared`), and recomputed activations
(`checkpointing`), which excludes that.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.accelerators import QWEN3_8B, SMALL, eight_bit_adamw, free, print_tables, size, stopped_after, summary
from benchmarks.measure import Row

GIB = 2**30


@dataclass(frozen=True)
class Setup:
    """Where and at which sizes.

    Args:
        device: cuda or cpu.
        shape: Shape of the model.
        questions: Questions of a step.
        samples: Responses to each.
        prompt: Mean tokens of the student's prompt.
        reprompt: Mean tokens of the teacher's prompt.
        response: Mean tokens of a response.
        spread: Responses are spread from ``1 - spread`` to ``1 + spread`` of that.
        longest: Limit of a response.
        at_once: Most responses decoded at the same time.
        shared_tokens: Most padded tokens of a forward pass without checkpointing.
        checkpointing_tokens: With it.
        steps: Steps of every setting.
    """

    device: str
    shape: dict[str, int]
    questions: int = 32
    samples: int = 8
    prompt: int = 300
    reprompt: int = 1000
    response: int = 600
    spread: float = 0.6
    longest: int = 1024
    at_once: int = 128
    shared_tokens: int = 4096
    checkpointing_tokens: int = 16384
    steps: int = 2


TINY = {"questions": 2, "samples": 3, "prompt": 12, "reprompt": 24, "response": 10, "longest": 16, "at_once": 3}
TINY |= {"shared_tokens": 128, "checkpointing_tokens": 128}


def lengths_of(setup: Setup) -> Any:
    from pgpo_lightning.memory_planner.workload import Lengths

    return Lengths(setup.prompt, setup.reprompt, setup.response, setup.spread, setup.longest)


def planned(setup: Setup, checkpointing: bool, optimizer: Callable[[Any], torch.optim.Optimizer]) -> tuple[Row, Any]:
    """Return the plan of a setting, as a row and as a :class:`MemoryPlan`."""
    from transformers import Qwen3Config

    from pgpo_lightning.memory_planner.dry_run import Compute
    from pgpo_lightning.memory_planner.plan import RunSpec, plan_memory

    on_gpu = setup.device == "cuda"
    memory_plan = plan_memory(
        RunSpec(
            config=Qwen3Config(**setup.shape, tie_word_embeddings=False),
            compute=Compute(torch.bfloat16, torch.float32, torch.bfloat16 if on_gpu else None, checkpointing),
            optimizer=optimizer,
            teacher="ema",
            lengths=lengths_of(setup),
            questions=setup.questions,
            samples=setup.samples,
            longest_response=setup.longest,
            at_once=setup.at_once,
            micro_batch_tokens=setup.checkpointing_tokens if checkpointing else setup.shared_tokens,
            device=setup.device,
        )
    )
    row = {
        "parameters": memory_plan.count.total,
        "micro_batches": memory_plan.micro_batches,
        "tflop": sum(memory_plan.flops.values()) / 1e12,
    }
    row |= {f"{phase}_gib": peak / GIB for phase, peak in memory_plan.need.peaks.items()}
    return row | {f"{name}_gib": bytes_ / GIB for name, bytes_ in memory_plan.need.standing.items()}, memory_plan


def steps(setup: Setup, checkpointing: bool) -> Iterator[Row]:
    """Take whole steps under one setting: sampling, then the module's own update."""
    from benchmarks.standalone import Standalone, fixed_lengths, random_qwen3
    from pgpo_lightning.core.types import Sample, Verdict
    from pgpo_lightning.rollout.engine import Sampling
    from pgpo_lightning.rollout.transformers_engine import TransformersEngine
    from pgpo_lightning.training.configs import UpdateConfig

    name, optimizer = eight_bit_adamw(setup.device)
    about: Row = {"setting": "checkpointing" if checkpointing else "shared", "optimizer": name}
    plan, memory_plan = planned(setup, checkpointing, optimizer)
    yield about | {"what": "plan"} | plan
    rows = lengths_of(setup).rows(setup.questions, setup.samples)
    policy = Standalone(
        random_qwen3(setup.device, torch.bfloat16, **setup.shape),
        optimizer,
        UpdateConfig(micro_batch_tokens=setup.checkpointing_tokens if checkpointing else setup.shared_tokens),
        gradient_checkpointing=checkpointing,
    )
    engine = TransformersEngine(setup.at_once)
    asked = [row.rollout for row in rows[:: setup.samples]]
    each = max(1, setup.at_once // setup.samples) * setup.samples  # decoded at the same time

    def sample() -> list[Any]:
        done = []
        for start in range(0, len(rows), each):
            some = asked[start // setup.samples : (start + each) // setup.samples]
            with fixed_lengths([row.length for row in rows[start : start + each]]):
                questions, prompts = [r.question for r in some], [r.prompt_ids for r in some]
                sampling = Sampling(setup.longest)
                done += engine.generate(policy.model, policy.tokenizer, questions, prompts, setup.samples, sampling)
        return done

    for i in range(setup.steps):
        peak, (seconds, sampled) = measured(sample, setup)
        tokens = sum(len(one.response_ids) for one in sampled)
        row = about | {"what": "rollouts", "step": i, "seconds": seconds, "response_tokens": tokens}
        yield row | {"tokens_per_s": tokens / seconds, "peak_gib": peak} | against(peak, plan["rollouts_gib"], setup)
        batch = [Sample(one, Verdict(0.0), row.reprompt_ids) for one, row in zip(sampled, rows, strict=True)]
        peak, (seconds, value) = measured(partial(policy.step, batch), setup)
        row = about | {"what": "update", "step": i, "seconds": seconds, "loss": value, "response_tokens": tokens}
        row |= {f"{part}_s": spent for part, spent in policy.seconds.items()}
        operations = sum(flop for phase, flop in memory_plan.flops.items() if phase != "rollouts")
        row |= {"tokens_per_s": tokens / seconds, "tflops": operations / seconds / 1e12, "peak_gib": peak}
        yield row | against(peak, max(plan["gradients_gib"], plan["optimizer_gib"]), setup)


def measured(run: Callable[[], Any], setup: Setup) -> tuple[float, tuple[float, Any]]:
    """Return the peak of allocated GiB, seconds and the result; on a CPU the peak of resident memory above what was there."""

    def timed() -> tuple[float, Any]:
        start = time.perf_counter()
        result = run()
        if setup.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    peak, result = measure.device_peak(timed, setup.device)
    return torch.cuda.max_memory_allocated() / GIB if setup.device == "cuda" else peak / 1024, result


def against(peak: float, plan: float, setup: Setup) -> Row:
    """Return the predicted bytes beside the measured ones. The peak of a CPU measures something else."""
    return {"plan_gib": plan} | ({"plan_to_measured": plan / peak} if setup.device == "cuda" else {})


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU unless `--device` says otherwise")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument(
        "--settings", choices=("shared", "checkpointing"), nargs="+", default=["shared", "checkpointing"]
    )
    parser.add_argument("--budget", type=float, default=530, help="seconds after which nothing goes on")
    for name, kind in (("questions", int), ("samples", int), ("prompt", int), ("reprompt", int), ("response", int),
                       ("spread", float), ("longest", int), ("at_once", int), ("shared_tokens", int),
                       ("checkpointing_tokens", int), ("steps", int)):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"by default {getattr(Setup, name)}")
    parser.add_argument(
        "--shape", type=size, nargs="+", default=[], metavar="NAME=SIZE", help="changes of the model's shape"
    )
    parser.add_argument("--json", type=Path, help="where the JSON lines go; by default before the tables")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    setup = Setup(device, (SMALL if options.tiny else QWEN3_8B) | dict(options.shape))
    changes = {name: value for name, value in vars(options).items() if value is not None and name in asdict(setup)}
    setup = replace(setup, **((TINY if options.tiny else {}) | changes | {"shape": setup.shape, "device": device}))
    rows: list[Row] = []
    end = time.monotonic() + options.budget
    with options.json.open("w", encoding="utf-8") if options.json else nullcontext(sys.stdout) as file:

        def record(row: Row) -> None:
            rows.append({"program": "large", "part": row.get("what", "end")} | row)
            print(json.dumps(rows[-1]), file=file, flush=True)

        if device == "cuda":
            record({"what": "environment", "device": torch.cuda.get_device_name(), "torch": torch.__version__})
        for setting in options.settings:
            try:
                with stopped_after(max(1.0, end - time.monotonic())):
                    for row in steps(setup, setting == "checkpointing"):
                        record(row)
            except Exception as error:
                traceback.print_exc()
                record({"setting": setting, "error": summary(error)})
            free(device)
    print_tables(rows)
    return rows


if __name__ == "__main__":
    main()
