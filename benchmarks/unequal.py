"""Whole steps of this package beside TRL's, with prompts and responses of unequal lengths: CPU seconds and memory.

SDPO with the Jensen-Shannon divergence over the whole vocabulary, SDPO over the student's 100 likeliest tokens with a tail, and
GRPO, each at two shapes that no setting was tuned for. Both sides have the same random Qwen3, prompts, reward and limits, fp32,
one thread, and default settings where they have a default. Some of the tokens end a response, so that lengths are about
geometric. TRL runs in an environment of its own (``requirements-trl.txt``), the two sides in turns, each in a fresh process. From
the root of the repository::

    python -m benchmarks.unequal --peer trl-env/bin/python
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.step import RATE, TEACHER_RATE, Clock, memory, score, tokenizer_and_prompts

SAMPLES, TRL_ROWS, TOP_K = 8, 32, 100
METHODS = ("jsd", "top100", "grpo")
COLUMNS = ("step", "generation", "update", "over_built_mib", "peak_mib", "length", "in_loss")


@dataclass(frozen=True)
class Shape:
    """Sizes of a step.

    Attributes:
        questions: Prompts of a step, each with 8 responses.
        prompt: Tokens of the shortest and of the longest prompt, about.
        response: Mean tokens of a response, about, and their maximum.
        vocabulary: Tokens of the vocabulary.
        hidden: Hidden size of the model.
        layers: Layers of the model.
    """

    questions: int
    prompt: tuple[int, int]
    response: tuple[int, int]
    vocabulary: int
    hidden: int
    layers: int


SHAPES = {
    "short": Shape(8, (20, 100), (40, 128), 4096, 128, 4),
    "long": Shape(4, (100, 400), (30, 96), 8192, 192, 3),
}


def write_model(folder: Path, shape: Shape) -> None:
    """Write a random model, its tokenizer and the prompts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer, _ = tokenizer_and_prompts(shape.vocabulary)
    rng = random.Random(1)
    words = [token for token in tokenizer.get_vocab() if token.isalpha() and len(token) > 2]
    prompts: list[list[dict[str, str]]] = []
    shortest, longest = shape.prompt
    for i in range(shape.questions):
        wanted = shortest + (longest - shortest) * i // (shape.questions - 1)
        text = "Repeat the good words:"
        while len(tokenizer(text)["input_ids"]) < wanted - 8:
            text += f" {rng.choice(words)}"
        prompts.append([{"role": "user", "content": text}])
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=shape.hidden, intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    # A random model is nearly indifferent between tokens, so the chance of an end is the share of tokens that end a response.
    ends = range(300, len(tokenizer), shape.response[0])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts.json").write_text(json.dumps(prompts))


def run_ours(folder: Path, shape: Shape, method: str, steps: int, clock: Clock) -> Callable[[], dict[str, float]]:
    """Prepare this package's run. Only what TRL has no counterpart of is switched off."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from pgpo_lightning.core.types import Question, Verdict
    from pgpo_lightning.modules import GRPO, SDPO
    from pgpo_lightning.objectives.configs import DivergenceConfig
    from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
    from pgpo_lightning.training.configs import MismatchConfig

    seen: dict[str, list[float]] = {"length": [], "in_loss": []}
    kind: Any = GRPO if method == "grpo" else SDPO

    class Step(kind):  # type: ignore[misc]
        def judge(self, rollouts: list[Any]) -> list[Verdict]:
            seen["length"] += [len(rollout.response_ids) for rollout in rollouts]
            return [Verdict(score(rollout.response_ids)) for rollout in rollouts]

    class EndOfStep(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            clock.start = time.process_time()

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            clock.end_of_step()
            seen["in_loss"].append(module.scalars.get("self_distillation/reprompt_sample_fraction", 1.0))

    settings: dict[str, Any] = {}
    if method != "grpo":
        top_k = {"distillation_topk": TOP_K, "distillation_add_tail": True} if method == "top100" else {}
        divergence = DivergenceConfig(alpha=0.5, **top_k)
        settings = {"divergence": divergence, "teacher": TeacherConfig(update_rate=TEACHER_RATE)}
        settings["reprompt"] = RepromptConfig(max_reprompt_len=1024)
    module = Step(
        model=str(folder),
        verifier=lambda question, response: 0.0,
        num_generations=SAMPLES,
        max_prompt_length=512,
        max_response_length=shape.response[1],
        mismatch=MismatchConfig(importance_weight_cap=None),  # TRL weighs nothing in the first pass over a batch
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE),
        **settings,
    )
    clock.wrap(module, "sample", "generation")
    chats = json.loads((folder / "prompts.json").read_text())
    questions = [Question(chat, None, index=i) for i, chat in enumerate(chats)]
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, limit_val_batches=0, logger=False, callbacks=[EndOfStep()],
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip

    def run() -> dict[str, float]:
        trainer.fit(module, DataLoader(questions, batch_size=shape.questions, collate_fn=list))
        return {name: statistics.mean(values) for name, values in seen.items()}

    return run


def run_trl(folder: Path, shape: Shape, method: str, steps: int, clock: Clock) -> Callable[[], dict[str, float]]:
    """Prepare TRL's run: all rollouts in one batch, micro-batches of 32 rows."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    lengths: list[int] = []

    class EndOfStep(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_of_step()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [score(ids) for ids in completion_ids]

    rows = shape.questions * SAMPLES
    common = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": min(TRL_ROWS, rows),
        "gradient_accumulation_steps": max(1, rows // TRL_ROWS), "num_generations": SAMPLES, "max_steps": steps,
        "max_completion_length": shape.response[1], "learning_rate": RATE, "lr_scheduler_type": "constant",
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none", "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    if method == "grpo":
        config, trainer_class = GRPOConfig(**common), GRPOTrainer
    else:
        over: dict[str, Any] = {"distillation_mode": "full_logits"}
        if method == "top100":
            over = {
                "distillation_mode": "topk_logits", "distillation_topk": TOP_K, "distillation_add_tail": True,
            }  # fmt: skip
        config = SDPOConfig(
            **common, **over, max_prompt_length=512, distillation_alpha=0.5, distillation_weight=1.0,
            teacher_model_kind="ema", teacher_update_rate=TEACHER_RATE, diagnostics_warning_interval=0,
        )  # fmt: skip
        trainer_class = SDPOTrainer
    trainer = trainer_class(
        model=str(folder),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": json.loads((folder / "prompts.json").read_text())}),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        callbacks=[EndOfStep()],
    )
    clock.wrap(trainer, "_generate", "generation")
    name = "self_distillation/reprompt_sample_fraction"

    def run() -> dict[str, float]:
        trainer.train()
        taught = [line[name] for line in trainer.state.log_history if name in line]
        return {"length": statistics.mean(lengths), "in_loss": statistics.mean(taught or [1.0])}

    return run


def measure(side: str, folder: Path, shape: Shape, method: str, steps: int) -> dict[str, Any]:
    """Run one side in this process; medians over steps, the first left out."""
    import torch

    torch.set_num_threads(1)
    clock = Clock()
    run = (run_ours if side == "ours" else run_trl)(folder, shape, method, steps, clock)
    built, _ = memory()
    extra = run()
    _, peak = memory()
    medians = {
        name: statistics.median(step.get(name, 0.0) for step in clock.steps[1:]) for name in ("step", "generation")
    }
    medians["update"] = medians["step"] - medians["generation"]
    rounded = {name: round(value, 3) for name, value in {**medians, **extra}.items()}
    return {"side": side, **rounded, "peak_mib": round(peak), "over_built_mib": round(peak - built)}


def main() -> None:
    """Run both sides in turns, and print a line of ratios per shape and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of the environment with TRL; without it only this side runs")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps, the first of which is not counted")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.folder, SHAPES[args.shapes[0]], args.methods[0], args.steps)))
        return
    pythons = {"ours": sys.executable} | ({"trl": args.peer} if args.peer else {})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    table = ["| shape | method | side | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), SHAPES[shape])
            for method in args.methods:
                runs: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
                for _ in range(args.rounds):
                    for side, python in pythons.items():
                        command = [python, "-m", "benchmarks.unequal", "--side", side, "--folder", folder]
                        command += ["--shapes", shape, "--methods", method, "--steps", str(args.steps)]
                        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                        runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                        print(json.dumps({"shape": shape, "method": method, **runs[side][-1]}), flush=True)
                found = {
                    side: {name: statistics.median(run[name] for run in runs[side]) for name in COLUMNS}
                    for side in runs
                }
                if args.peer:
                    found["ours / trl"] = {name: found["ours"][name] / (found["trl"][name] or 1.0) for name in COLUMNS}
                for side, values in found.items():
                    table.append(
                        f"| {shape} | {method} | {side} | " + " | ".join(f"{values[c]:.3g}" for c in COLUMNS) + " |"
                    )
    print("\n".join(["", *table]))


if __name__ == "__main__":
    main()
