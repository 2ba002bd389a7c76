"""The same toy run in TRL's experimental SDPOTrainer and in this package.

Same weights, questions, order of questions and settings; the same evaluation code on the weights that both save every 10
steps. TRL runs in an environment of its own (``requirements-trl.txt``), everything else in that of this package, both from
the root of the repository. One run takes a few minutes of one CPU core; ``--out`` is ``runs/trl-parity`` by default::

    export OMP_NUM_THREADS=1
    python -m benchmarks.trl_parity questions                             # writes questions.jsonl
    for seed in 1 2 3; do
        trl-env/bin/python -m benchmarks.trl_parity trl --seed $seed      # the run trl-$seed
        python -m benchmarks.trl_parity ours --seed $seed                 # the run ours-$seed
    done
    python -m benchmarks.trl_parity replay --seed 1       # TRL's rollouts through our step; see replay-1/replay.jsonl
    python -m benchmarks.trl_parity evaluate              # adds evaluation.jsonl to every run that has none
    python -m benchmarks.trl_parity table                 # Markdown, then one JSON line per row

A run is a folder with ``log.jsonl`` (one line per optimizer step), ``step-0010`` ... (weights for transformers) and, from
TRL, ``rollouts.jsonl`` (token ids, rewards and teacher prompts of every rollout).
"""

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch

TOY = Path(__file__).parent.parent / "pgpo_lightning" / "assets" / "toy"
STEPS, SAVE_EVERY, QUESTIONS, ROLLOUTS, RESPONSE = 40, 10, 32, 8, 32
LEARNING_RATE, WEIGHT_DECAY, CLIP, ALPHA, TEACHER_RATE = 1e-4, 0.01, 1.0, 0.5, 0.05
SAVED = range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
ARMS = ("trl", "ours", "replay")


class Recorder:
    """Writes a run's folder: a line of numbers per step, its CPU seconds among them, and the weights now and then."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.step = folder, 0
        self.clock()

    def clock(self) -> None:
        """Start the clock anew, so that writing is not part of a step."""
        self.cpu = time.process_time()

    def end_of_step(self, model: Any) -> None:
        """Stop the clock, save the weights if it is time."""
        self.step += 1
        self.cpu_s = time.process_time() - self.cpu
        if self.step in SAVED:
            model.save_pretrained(self.folder / f"step-{self.step:04d}")

    def write(self, **numbers: float) -> None:
        """Log what the last step gave."""
        append(self.folder / "log.jsonl", {"step": self.step, **numbers, "cpu_s": self.cpu_s})
        self.clock()


def append(path: Path, *records: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def boxed_integer(text: str, gold: str) -> float:
    r"""Return 1.0 if the last ``\boxed{...}`` holds the gold integer; BoxedAnswer on this task, without our package."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return float(bool(boxes) and re.fullmatch(r"\d+", boxes[-1]) is not None and int(boxes[-1]) == int(gold))


def run_trl(out: Path, seed: int, arm: str) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    recorder = Recorder(out / f"{arm}-{seed}")
    step: dict[str, Any] = {}

    def reward(completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        texts = [turns[0]["content"] for turns in completions]
        step["rewards"] = [boxed_integer(text, gold) for text, gold in zip(texts, answer, strict=True)]
        step["responses"] = completion_ids
        return step["rewards"]

    class Record(TrainerCallback):
        def on_teacher_context_built(self, *_: Any, **batch: Any) -> None:
            rows = zip(batch["teacher_input_ids"], batch["teacher_attention_mask"].bool(), strict=True)
            prompts = [ids[m][: -len(y)].tolist() for (ids, m), y in zip(rows, step["responses"], strict=True)]
            active = batch["self_distillation_mask"].bool().tolist()
            step["reprompts"] = [ids if on else None for ids, on in zip(prompts, active, strict=True)]

        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            recorder.end_of_step(model)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "grad_norm" in logs:
                length, in_loss = logs["completions/mean_length"], logs["self_distillation/reprompt_sample_fraction"]
                numbers = {"reward": statistics.mean(step["rewards"]), "length": length, "in_loss": in_loss}
                append(recorder.folder / "rollouts.jsonl", step)
                recorder.write(loss=logs["loss"], grad_norm=logs["grad_norm"], **numbers)

    questions = lines(out / "questions.jsonl")
    prompts = [[{"role": "user", "content": question["prompt"]}] for question in questions]
    data = Dataset.from_dict({"prompt": prompts, "answer": [question["answer"] for question in questions]})
    model = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    batch = {"per_device_train_batch_size": QUESTIONS * ROLLOUTS // 2, "gradient_accumulation_steps": 2}
    sampling = {"num_generations": ROLLOUTS, "max_completion_length": RESPONSE, "temperature": 1.0}
    objective = {"distillation_mode": "full_logits", "distillation_alpha": ALPHA, "max_grad_norm": CLIP}
    teacher = {"teacher_model_kind": "ema", "teacher_update_rate": TEACHER_RATE, "success_reward_threshold": 0.5}
    templates = {  # ours; TRL's end in more line breaks
        "reprompt_template": "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.",
        "solution_template": "\nCorrect solution:\n\n{successful_previous_attempt}",
    }
    schedule = {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "max_steps": STEPS}
    precision = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True}
    logging = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    settings = {**batch, **sampling, **objective, **teacher, **templates, **schedule, **precision, **logging}
    config = SDPOConfig(str(recorder.folder / "trainer"), seed=seed, shuffle_dataset=False, **settings)
    # An optimizer of our making, because the Trainer's own would exempt the norms from weight decay.
    more = {"processing_class": AutoTokenizer.from_pretrained(TOY), "optimizers": (adamw(model.parameters()), None)}
    SDPOTrainer(model, reward, config, data, callbacks=[Record()], **more).train()


def toy_data() -> Any:
    from pgpo_lightning.data import ToyArithmetic

    return ToyArithmetic(batch_size=QUESTIONS, eval_batch_size=100, seed=0, limit_val=100)


def write_questions(out: Path) -> None:
    """Write the training questions in the order in which our data module serves them."""
    out.mkdir(parents=True, exist_ok=True)
    data = toy_data()
    data.setup("fit")
    batches = zip(range(STEPS), data.train_dataloader(), strict=False)
    append(out / "questions.jsonl", *({"prompt": q.prompt, "answer": q.answer} for _, batch in batches for q in batch))


def module(kind: type, model: Path, seed: int, **settings: Any) -> Any:
    from pgpo_lightning.objectives.configs import DivergenceConfig
    from pgpo_lightning.rewards import BoxedAnswer
    from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
    from pgpo_lightning.training.configs import EvaluationConfig, MismatchConfig, ModelConfig, UpdateConfig

    sampling = {"num_generations": ROLLOUTS, "max_prompt_length": 64, "max_response_length": RESPONSE}
    policy = {"model": str(model), "verifier": BoxedAnswer(), "optimizer": adamw, "seed": seed}
    groups = {
        "model_config": ModelConfig(tokenizer="toy"),
        "evaluation": EvaluationConfig(samples=8),
        "reprompt": RepromptConfig(max_reprompt_len=160),
        "divergence": DivergenceConfig(alpha=ALPHA),
        "update": UpdateConfig(max_grad_norm=CLIP),
        # TRL has no weight between sampler and trainer, and its rollouts come without the sampler's log-probabilities.
        "mismatch": MismatchConfig(importance_weight_cap=None, max_sampler_gap=None),
        "teacher": TeacherConfig(update_rate=TEACHER_RATE),
    }
    return kind(**policy, **sampling, **groups | settings)


def trainer(folder: Path, **settings: Any) -> Any:
    import lightning as L

    settings |= dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    return L.Trainer(accelerator="cpu", max_steps=STEPS, default_root_dir=folder, **settings)


def run_ours(out: Path, seed: int, arm: str) -> None:
    import lightning as L

    from pgpo_lightning.core.types import Rollout
    from pgpo_lightning.modules import SDPO
    from pgpo_lightning.rollout.engine import Engine

    recorder = Recorder(out / f"{arm}-{seed}")
    theirs = lines(out / f"trl-{seed}" / "rollouts.jsonl") if arm == "replay" else []
    same = {"rollouts": 0, "same_reward": 0, "same_reprompt": 0}
    first: Any = SimpleNamespace(shuffle=lambda successes: None)  # the first success in order is shown

    class Replayed(SDPO):
        """Demonstrates the first other success, as TRL does, and compares what the loss is about to see."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.prepare_as_we_do, self.objective.prepare = self.objective.prepare, self.prepare

        def prepare(self, samples: list[Any], given: Any) -> dict[str, float]:
            scalars = self.prepare_as_we_do(samples, replace(given, rng=first))
            rewards, reprompts = theirs[self.steps]["rewards"], theirs[self.steps]["reprompts"]
            same["rollouts"] += len(samples)
            same["same_reward"] += sum(s.verdict.reward == x for s, x in zip(samples, rewards, strict=True))
            same["same_reprompt"] += sum(s.reprompt_ids == x for s, x in zip(samples, reprompts, strict=True))
            return scalars

    class Recorded(Engine):
        def generate(self, model: Any, tokenizer: Any, questions: Any, prompts: Any, n: int, _: Any) -> list[Rollout]:
            rollouts = []
            for i, ids in enumerate(theirs[recorder.step]["responses"]):
                text, finished = tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == tokenizer.eos_token_id
                rollouts += [Rollout(questions[i // n], prompts[i // n], ids, torch.zeros(len(ids)), text, finished)]
            return rollouts

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            recorder.end_of_step(pl_module.model)
            samples, scalars = pl_module.last_samples, pl_module.scalars
            numbers = {"loss": scalars["actor/pg_loss"], "grad_norm": scalars["actor/grad_norm"]}
            numbers["reward"] = statistics.mean(sample.verdict.reward for sample in samples)
            numbers["length"] = statistics.mean(sample.length for sample in samples)
            recorder.write(**numbers, in_loss=scalars["self_distillation/reprompt_sample_fraction"])

    policy = module(Replayed if theirs else SDPO, TOY, seed, **({"engine": Recorded()} if theirs else {}))
    trainer(recorder.folder, callbacks=[Record()], limit_val_batches=0).fit(policy, datamodule=toy_data())
    if theirs:
        append(recorder.folder / "replay.jsonl", same | distance(recorder.folder, out / f"trl-{seed}"))


def distance(ours: Path, theirs: Path) -> dict[str, Any]:
    """Return how far two runs are apart: loss and gradient norm of every step, and the weights over their path."""
    from safetensors.torch import load_file

    def weights(folder: Path) -> torch.Tensor:
        tensors = load_file(folder / "model.safetensors")
        return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])

    pairs = list(zip(lines(ours / "log.jsonl"), lines(theirs / "log.jsonl"), strict=True))
    result = {name: [abs(a[name] / b[name] - 1) for a, b in pairs] for name in ("loss", "grad_norm")}
    for step in SAVED:
        a, b = (weights(folder / f"step-{step:04d}") for folder in (ours, theirs))
        result[f"weights_step_{step}"] = float((a - b).norm() / (b - weights(TOY)).norm())
    return result


def evaluate(out: Path) -> None:
    """Evaluate the weights of every run, and the base model, with our validation loop."""
    from pgpo_lightning.modules import SDPO

    for folder in sorted(path.parent for path in out.glob("*-*/log.jsonl")):
        seed, results = int(folder.name.split("-")[1]), []
        if (folder / "evaluation.jsonl").exists() or folder.name.startswith("replay"):
            continue
        for step in (0, *SAVED):
            policy = module(SDPO, folder / f"step-{step:04d}" if step else TOY, seed)
            scores = trainer(folder / "evaluations").validate(policy, datamodule=toy_data(), verbose=False)[0]
            results.append({name.removeprefix("validate/"): value for name, value in scores.items()} | {"step": step})
        append(folder / "evaluation.jsonl", *results)


def numbers_of(run: Path) -> Iterator[tuple[str, float]]:
    for row in lines(run / "evaluation.jsonl"):
        yield f"avg@8, step {row['step']}", row["avg@8"]
    log = lines(run / "log.jsonl")
    for first, last in (*((last - SAVE_EVERY, last) for last in SAVED), (0, STEPS)):
        for name in ("reward", "length", "in_loss", "loss", "grad_norm"):
            yield f"{name}, steps {first + 1}-{last}", statistics.mean(row[name] for row in log[first:last])
    yield "cpu_s per step", statistics.median(row["cpu_s"] for row in log[1:])  # the first has the start in it


def table(out: Path) -> None:
    """Print means and standard deviations over seeds, and differences to TRL with their standard errors."""
    runs: dict[str, list[dict[str, float]]] = {}
    for path in sorted(out.glob("*-*/evaluation.jsonl")):
        runs.setdefault(path.parent.name.split("-")[0], []).append(dict(numbers_of(path.parent)))
    arms = [arm for arm in ARMS if arm in runs]
    header = [f"{arm} ({len(runs[arm])} seeds)" for arm in arms] + [f"{arm} - trl" for arm in arms[1:]]
    print(f"| | {' | '.join(header)} |\n|---|{'---|' * len(header)}")
    records = []
    for name in runs["trl"][0]:
        values = {arm: [run[name] for run in runs[arm]] for arm in arms}
        mean = {arm: statistics.mean(values[arm]) for arm in arms}
        variance = {arm: statistics.variance(values[arm]) for arm in arms}
        error = {a: sum(variance[b] / len(values[b]) for b in (a, "trl")) ** 0.5 for a in arms[1:]}
        cells = [f"{mean[arm]:.4f} ± {variance[arm] ** 0.5:.4f}" for arm in arms]
        cells += [f"{mean[arm] - mean['trl']:+.4f} (s.e. {error[arm]:.4f})" for arm in arms[1:]]
        print(f"| {name} | {' | '.join(cells)} |")
        records.append({"what": name, "mean": mean, "variance": variance, "standard_error": error, "values": values})
    print("\n" + "\n".join(json.dumps(record) for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*ARMS, "questions", "evaluate", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/trl-parity"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command in ARMS:
        (run_trl if args.command == "trl" else run_ours)(args.out, args.seed, args.command)
    else:
        {"questions": write_questions, "evaluate": evaluate, "table": table}[args.command](args.out)


if __name__ == "__main__":
    main()
