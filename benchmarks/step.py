"""One whole SDPO step of this package beside one of TRL's SDPOTrainer: CPU seconds by phase, and peak memory.

Same model (Qwen3 with hidden 128, 4 layers, tied head), prompts (64 of about 40 tokens), 8 responses of up to 32 tokens each,
reverse KL over the whole vocabulary, EMA teacher, fp32, one thread. A response succeeds when at least half of its token ids
are even, so nearly every row has a teacher and nothing is won by skipping rows. TRL runs in an environment of its own
(``requirements-trl.txt``), the two sides in turns, each in a fresh process. From the root of the repository::

    python -m benchmarks.step --peer trl-env/bin/python --rounds 3
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
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

PROMPTS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS, TRL_MICRO_BATCH = 64, 8, 40, 32, 64
RATE, TEACHER_RATE = 1e-5, 0.05
PHASES = ("generation", "forwards", "loss", "backward", "optimizer", "rest")


class Clock:
    """CPU seconds of this process per phase and step; a phase inside another counts for itself only."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = defaultdict(float)
        self.inside: list[float] = []
        self.start = time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens as this phase."""
        start = time.process_time()
        self.inside.append(0.0)
        try:
            yield
        finally:
            spent = time.process_time() - start
            self.now[name] += spent - self.inside.pop()
            if self.inside:
                self.inside[-1] += spent

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Count every call of a method or function as this phase."""
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def end_of_step(self) -> None:
        """Close a step."""
        total = time.process_time() - self.start
        self.steps.append({**self.now, "rest": total - sum(self.now.values()), "step": total})
        self.now.clear()
        self.start = time.process_time()


def memory() -> tuple[float, float]:
    """Return resident memory now and its highest value so far, in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def tokenizer_and_prompts(vocabulary: int) -> tuple[Any, list[list[dict[str, str]]]]:
    """Train a tokenizer on made-up words, and make prompts of one length from them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = sorted({"".join(rng.choice(syllables) for _ in range(rng.randint(2, 4))) for _ in range(2 * vocabulary)})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    corpus = [" ".join(rng.choice(words) for _ in range(12)) for _ in range(6000)]
    corpus += ["Correct solution: Correctly solve the original question. user assistant"] * 50
    settings = {
        "vocab_size": vocabulary,
        "special_tokens": special,
        "show_progress": False,
        "initial_alphabet": alphabet,
    }
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(**settings))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>", padding_side="left", truncation_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def prompt() -> list[dict[str, str]]:
        text = "Repeat the good words:"
        while True:
            longer = [{"role": "user", "content": f"{text} {rng.choice(words[:400])}"}]
            ids = tokenizer.apply_chat_template(longer, add_generation_prompt=True, return_dict=True)["input_ids"]
            if len(ids) > PROMPT_TOKENS:
                return [{"role": "user", "content": text}]
            text = longer[0]["content"]

    return tokenizer, [prompt() for _ in range(PROMPTS)]


def make_model(folder: Path, vocabulary: int) -> list[list[dict[str, str]]]:
    """Write a random model with its tokenizer; return the prompts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer, prompts = tokenizer_and_prompts(vocabulary)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return prompts


def score(ids: list[int]) -> float:
    """Return 1 if at least half of the token ids are even, else their share."""
    share = sum(token % 2 == 0 for token in ids) / max(1, len(ids))
    return 1.0 if share >= 0.5 else share


def run_ours(
    folder: Path, prompts: list[list[dict[str, str]]], steps: int, clock: Clock, budgets: tuple[int, int | None]
) -> Callable[[], dict[str, float]]:
    """Prepare this package's run."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    from pgpo_lightning.core.types import Question, Verdict
    from pgpo_lightning.modules import SDPO
    from pgpo_lightning.objectives.configs import DivergenceConfig
    from pgpo_lightning.rollout.transformers_engine import TransformersEngine
    from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
    from pgpo_lightning.training import learner
    from pgpo_lightning.training.configs import MismatchConfig, UpdateConfig

    class Step(SDPO):
        def judge(self, rollouts: list[Any]) -> list[Verdict]:
            return [Verdict(score(rollout.response_ids)) for rollout in rollouts]

    class EndOfStep(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            clock.start = time.process_time()

        def on_train_batch_end(self, trainer: L.Trainer, module: SDPO, *_: Any) -> None:
            clock.end_of_step()
            self.with_teacher = module.scalars["self_distillation/reprompt_sample_fraction"]

    module = Step(
        model=str(folder),
        verifier=lambda question, response: 0.0,
        num_generations=SAMPLES,
        max_prompt_length=512,
        reprompt=RepromptConfig(max_reprompt_len=1024),
        mismatch=MismatchConfig(importance_weight_cap=None),  # TRL weighs nothing in the first pass over a batch
        update=UpdateConfig(micro_batch_tokens=budgets[0]),
        engine=TransformersEngine(budgets[1]),
        max_response_length=RESPONSE_TOKENS,
        divergence=DivergenceConfig(alpha=1.0),
        teacher=TeacherConfig(update_rate=TEACHER_RATE),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE),
    )
    clock.wrap(module, "sample", "generation")
    clock.wrap(learner.Learner, "teacher_sources", "forwards")
    clock.wrap(learner, "source", "forwards")
    clock.wrap(learner, "linear_distillation", "loss")
    clock.wrap(module, "manual_backward", "backward")
    clock.wrap(learner.Learner, "apply", "optimizer")
    questions = [Question(chat, None, index=i) for i, chat in enumerate(prompts)]
    ending = EndOfStep()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        callbacks=[ending],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )

    def run() -> dict[str, float]:
        trainer.fit(module, DataLoader(questions, batch_size=PROMPTS, collate_fn=list))
        return {"rows_with_teacher": ending.with_teacher}

    return run


def run_trl(
    folder: Path, prompts: list[list[dict[str, str]]], steps: int, clock: Clock
) -> Callable[[], dict[str, float]]:
    """Prepare TRL's run: all rollouts in one batch, micro-batches of 64, as its users would set it on a CPU."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    class EndOfStep(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_of_step()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [score(ids) for ids in completion_ids]

    config = SDPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=TRL_MICRO_BATCH,
        gradient_accumulation_steps=PROMPTS * SAMPLES // TRL_MICRO_BATCH,
        num_generations=SAMPLES,
        max_steps=steps,
        max_prompt_length=512,
        max_completion_length=RESPONSE_TOKENS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_weight=1.0,
        teacher_model_kind="ema",
        teacher_update_rate=TEACHER_RATE,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        diagnostics_warning_interval=0,
    )
    trainer = SDPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[EndOfStep()],
    )
    clock.wrap(trainer, "_generate", "generation")
    clock.wrap(trainer, "_compute_teacher_student_logits", "forwards")
    clock.wrap(trainer, "_compute_self_distillation_loss", "loss")
    clock.wrap(trainer.accelerator, "backward", "backward")
    trainer.create_optimizer()
    clock.wrap(trainer.optimizer, "step", "optimizer")

    def run() -> dict[str, float]:
        trainer.train()
        logged = [line for line in trainer.state.log_history if "self_distillation/reprompt_sample_fraction" in line]
        return {"rows_with_teacher": logged[-1]["self_distillation/reprompt_sample_fraction"]}

    return run


def measure(side: str, steps: int, vocabulary: int, budgets: tuple[int, int | None]) -> dict[str, Any]:
    """Run one side in this process; medians over steps, the first left out."""
    import torch

    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        prompts = make_model(Path(folder), vocabulary)
        if side == "ours":
            run = run_ours(Path(folder), prompts, steps, clock, budgets)
        else:
            run = run_trl(Path(folder), prompts, steps, clock)
        built, _ = memory()
        extra = run()
    _, peak = memory()
    medians = {
        name: round(statistics.median(step.get(name, 0.0) for step in clock.steps[1:]), 3) for name in ("step", *PHASES)
    }
    return {"side": side, **medians, "peak_mib": round(peak), "over_built_mib": round(peak - built), **extra}


def main() -> None:
    """Run both sides in turns and print a table, then a JSON line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of the environment with TRL; without it only this side runs")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps of a run, the first of which is not counted"
    )
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--micro-batch-tokens", type=int, default=4608, help="of this package; 4608 = TRL's 64 rows")
    parser.add_argument(
        "--max-sequences", type=int, help="of this package: responses decoded at a time; all by default"
    )
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(
            json.dumps(measure(args.side, args.steps, args.vocabulary, (args.micro_batch_tokens, args.max_sequences)))
        )
        return
    pythons = {"ours": sys.executable} | ({"trl": args.peer} if args.peer else {})
    results = []
    for _ in range(args.rounds):
        for side, python in pythons.items():
            command = [
                python,
                "-m",
                "benchmarks.step",
                "--side",
                side,
                "--steps",
                str(args.steps),
                "--vocabulary",
                str(args.vocabulary),
                "--micro-batch-tokens",
                str(args.micro_batch_tokens),
                *(["--max-sequences", str(args.max_sequences)] if args.max_sequences else []),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
    columns = ("step", *PHASES, "peak_mib", "over_built_mib", "rows_with_teacher")
    print("\nmedians over rounds, CPU seconds and MiB\n\n| | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    table = {
        side: {name: statistics.median(run[name] for run in results if run["side"] == side) for name in columns}
        for side in pythons
    }
    if args.peer:
        table["ours / trl"] = {name: table["ours"][name] / (table["trl"][name] or float("nan")) for name in columns}
    for side, row in table.items():
        print(f"| {side} | " + " | ".join(f"{row[name]:.3g}" for name in columns) + " |")


if __name__ == "__main__":
    main()
