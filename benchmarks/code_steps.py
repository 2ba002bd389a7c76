"""Seconds of verification within training steps: beside sampling and update, and while responses are still being sampled.

    OMP_NUM_THREADS=1 python -m benchmarks.code_steps --rollouts 256 --tests 12
    OMP_NUM_THREADS=1 python -m benchmarks.code_steps --model 256x4 --response 128

SDPO on the toy programs, fp32. What is graded in place of a response is a program of the benchmark, each another one, half of
them right, so that every response costs as many tests whatever the model writes. The model is ``toy-code`` (0.67 million
parameters), or a random Qwen3 of a hidden size and a number of layers with the same tokenizer, whose responses have geometric
lengths. Runs that grade while others are sampled and runs that grade afterwards take turns; the first step of each is left out.

Beside the seconds on the clock, which on a busy machine are longer, it prints CPU seconds: of sampling and update in the main
thread, and of verification in the workers, their start included.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.code_cost import CODE, rollouts
from pgpo_lightning import SDPO
from pgpo_lightning.core.types import Rollout, Verdict
from pgpo_lightning.data.toy_code import BASE_CODE_MODEL, ToyPrograms
from pgpo_lightning.modules import on_policy
from pgpo_lightning.rewards import CodeExecution
from pgpo_lightning.rewards.code import pool
from pgpo_lightning.rollout import TransformersEngine
from pgpo_lightning.teachers.configs import RepromptConfig
from pgpo_lightning.training.configs import ModelConfig, RewardConfig
from pgpo_lightning.training.step_report import Timer
from tests.support.programs import fenced

CPU = {"sampling cpu": "gen", "update cpu": "update_actor"}
PHASES = {
    "sampling": "gen",
    "waited": "reward",
    "verification": "reward_total",
    "update": "update_actor",
    "step": "step",
}
SAMPLES = 8


class FixedPrograms(CodeExecution):
    """Grades programs of the benchmark in place of the responses.

    Args:
        tests: Number of tests of each.
    """

    def __init__(self, tests: int) -> None:
        super().__init__()
        self.question = rollouts(1, tests)[0].question
        self.graded = 0

    def check_question(self, question: Any) -> None:
        """Accept every question, since its own tests are not used."""

    def grade_batch(self, rollouts: list[Rollout], step: int) -> list[Verdict]:
        """Grade as many programs as there are responses; every second one prints a number too large by 1."""
        attempts = []
        for _ in rollouts:
            self.graded += 1
            wrong = " + 1" if self.graded % 2 else ""
            code = CODE.replace("print(a + b)", f"print(a + b{wrong})  # {self.graded}")
            attempts.append((self.question, fenced(code), False))
        return self.judge(attempts)


def student(name: str, response: int) -> tuple[Any, str]:
    """Return a model and the name of its tokenizer.

    Args:
        name: ``toy-code``, or hidden size and layers such as ``256x4``.
        response: Longest response in tokens; the mean of a random model's is about half of it.
    """
    if name == "toy-code":
        return name, name
    hidden, layers = map(int, name.split("x"))
    tokenizer = AutoTokenizer.from_pretrained(BASE_CODE_MODEL)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    ends = max(1, round(2 * len(tokenizer) / response))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(20, 20 + ends - 1)]
    return model, str(BASE_CODE_MODEL)


class ThreadTimer(Timer):
    """Also keeps the CPU seconds of the main thread in each phase of the step."""

    cpu: dict[str, float] = {}  # noqa: RUF012  (of the current step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is enclosed."""
        start = time.thread_time()
        with super().phase(name):
            yield
        self.cpu[name] = time.thread_time() - start


class Seconds(L.Callback):
    """Keeps the seconds of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Read what the step has logged."""
        found = pl_module.reported
        row = {name: found.get(f"timing_s/{tag}", found["timing_s/reward"]) for name, tag in PHASES.items()}
        row |= {name: ThreadTimer.cpu[tag] for name, tag in CPU.items()}
        self.rows.append(row | {"length": found["response_length/mean"]})


def of_workers() -> float:
    """Return CPU seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train(options: argparse.Namespace, early: bool) -> list[dict[str, float]]:
    """Return the seconds of training steps, without those of the first."""
    model, tokenizer = student(options.model, options.response)
    module = SDPO(
        model,
        FixedPrograms(options.tests),
        engine=TransformersEngine(options.max_sequences),
        num_generations=SAMPLES,
        max_prompt_length=32,
        max_response_length=options.response,
        reprompt=RepromptConfig(max_reprompt_len=192),
        model_config=ModelConfig(tokenizer=tokenizer),
        reward=RewardConfig(while_sampling=early),
        seed=0,
    )
    seconds = Seconds()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=1 + options.steps, limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[seconds],
        )  # fmt: skip
        trainer.fit(module, ToyPrograms(batch_size=options.rollouts // SAMPLES))
    return seconds.rows[1:]


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the steps and print medians of their seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--tests", type=int, default=12)
    parser.add_argument("--model", default="toy-code", help="toy-code, or hidden size x layers")
    parser.add_argument("--response", type=int, default=48, help="longest response in tokens")
    parser.add_argument("--max_sequences", type=int, help="responses decoded at the same time; by default all")
    parser.add_argument("--steps", type=int, default=2, help="steps of a run that are counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", help="file for all rows")
    options = parser.parse_args(arguments)
    rows: dict[str, list[dict[str, float]]] = {"afterwards": [], "while sampling": []}
    spent: dict[str, list[float]] = {name: [] for name in rows}
    on_policy.Timer = ThreadTimer  # type: ignore[misc]
    for _ in range(options.rounds):
        for name in rows:
            before = of_workers()
            rows[name] += train(options, early=name != "afterwards")
            pool.close_all()  # so that their CPU seconds are known
            spent[name].append((of_workers() - before) / (1 + options.steps))
    columns = [*PHASES, *CPU, "verification cpu"]
    print(f"{options.rollouts} rollouts x {options.tests} tests, {options.model}\n")
    print(f"| grading | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    found = {}
    for name, each in rows.items():
        found[name] = {column: statistics.median(row[column] for row in each) for column in each[0]}
        found[name]["verification cpu"] = statistics.median(spent[name])
        print(f"| {name} | {' | '.join(f'{found[name][column]:.1f}' for column in columns)} |")
    print(f"\nMean length {found['afterwards']['length']:.0f} tokens.")
    if options.json:
        Path(options.json).write_text(json.dumps(rows))
    return found


if __name__ == "__main__":
    main()
