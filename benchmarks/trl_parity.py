"""The same toy run in TRL's experimental SDPOTrainer and in this package.

Same weights, questions, order of questions and settings; the same evaluation code on the weights that both save every 10
steps. TRL runs in an environment of its own (``requirements-trl.txt``), everything else in that of this package, both from
the root of the repository. One seed of either takes a few minutes of one CPU core::

    export OMP_NUM_THREADS=1 PYTHONPATH=.
    python benchmarks/trl_parity.py questions                 # out/questions.jsonl
    for seed in 1 2 3; do
        trl-env/bin/python benchmarks/trl_parity.py trl --seed $seed      # out/trl-$seed
        python benchmarks/trl_parity.py ours --seed $seed                 # out/ours-$seed
        python benchmarks/trl_parity.py ours --seed $seed --first         # out/first-$seed: TRL's choice of demonstrations
    done
    python benchmarks/trl_parity.py replay --seed 1           # TRL's own rollouts of seed 1 through our training step
    python benchmarks/trl_parity.py evaluate                  # adds evaluation.jsonl to every run that has none
    python benchmarks/trl_parity.py table                     # Markdown, then one JSON line per row

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
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch

TOY = Path(__file__).parent.parent / "pgpo_lightning" / "assets" / "toy"
STEPS, SAVE_EVERY, QUESTIONS, ROLLOUTS, RESPONSE = 40, 10, 32, 8, 32
LEARNING_RATE, WEIGHT_DECAY, CLIP, ALPHA, TEACHER_RATE = 1e-4, 0.01, 1.0, 0.5, 0.05
SAVED = range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
EVALUATION_QUESTIONS, EVALUATION_SAMPLES = 100, 8


class Recorder:
    """Writes a run's folder: a line of numbers per step with the CPU seconds it took, and the weights now and then."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.step = folder, 0
        self.clock()

    def clock(self) -> None:
        """Start the clocks anew, so that writing is not part of a step."""
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def end_of_step(self, model: Any) -> None:
        """Stop the clocks, save the weights if it is time."""
        self.step += 1
        self.times = {"cpu_s": time.process_time() - self.cpu, "wall_s": time.perf_counter() - self.wall}
        if self.step in SAVED:
            model.save_pretrained(self.folder / f"step-{self.step:04d}")
        self.clock()

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Append a line."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.clock()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------- TRL


def boxed_integer(text: str, gold: str) -> float:
    r"""Return 1.0 if the last ``\boxed{...}`` holds the gold integer; BoxedAnswer on this task, without our package."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return float(bool(boxes) and re.fullmatch(r"\d+", boxes[-1]) is not None and int(boxes[-1]) == int(gold))


def run_trl(out: Path, seed: int) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    recorder = Recorder(out / f"trl-{seed}")
    step: dict[str, Any] = {}

    def reward(completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        step["responses"] = completion_ids
        step["rewards"] = [
            boxed_integer(turns[0]["content"], gold) for turns, gold in zip(completions, answer, strict=True)
        ]
        return step["rewards"]

    class Record(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            recorder.clock()

        def on_teacher_context_built(self, *_: Any, **batch: Any) -> None:
            rows = zip(batch["teacher_input_ids"], batch["teacher_attention_mask"].bool(), strict=True)
            teacher = [ids[mask].tolist() for ids, mask in rows]
            prompts = [ids[: -len(response)] for ids, response in zip(teacher, step["responses"], strict=True)]
            active = batch["self_distillation_mask"].bool().tolist()
            step["reprompts"] = [ids if on else None for ids, on in zip(prompts, active, strict=True)]

        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            recorder.end_of_step(model)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "grad_norm" in logs:
                numbers = {
                    "loss": logs["loss"],
                    "grad_norm": logs["grad_norm"],
                    "reward": statistics.mean(step["rewards"]),
                    "length": logs["completions/mean_length"],
                    "in_loss": logs["self_distillation/reprompt_sample_fraction"],
                }
                recorder.write("log.jsonl", {"step": recorder.step, **numbers, **recorder.times})
                recorder.write("rollouts.jsonl", step)

    questions = lines(out / "questions.jsonl")
    data = {
        "prompt": [[{"role": "user", "content": row["prompt"]}] for row in questions],
        "answer": [row["answer"] for row in questions],
    }
    model = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    # Ours to build: the Trainer's own would exempt the norms from weight decay.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    config = SDPOConfig(
        output_dir=str(recorder.folder / "trainer"),
        seed=seed,
        max_steps=STEPS,
        per_device_train_batch_size=QUESTIONS * ROLLOUTS // 2,
        gradient_accumulation_steps=2,
        num_generations=ROLLOUTS,
        shuffle_dataset=False,
        max_completion_length=RESPONSE,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        distillation_mode="full_logits",
        distillation_alpha=ALPHA,
        teacher_model_kind="ema",
        teacher_update_rate=TEACHER_RATE,
        success_reward_threshold=0.5,
        max_reprompt_len=160,
        # Ours; TRL's end in more line breaks.
        reprompt_template="{prompt}{solution}{feedback}\n\nCorrectly solve the original question.",
        solution_template="\nCorrect solution:\n\n{successful_previous_attempt}",
        chat_template_kwargs={"enable_thinking": False},
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    SDPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(TOY),
        callbacks=[Record()],
        optimizers=(optimizer, None),
    ).train()


# ------------------------------------------------------------------------------------------------------ ours


def write_questions(out: Path) -> None:
    """Write the training questions in the order in which our data module serves them."""
    out.mkdir(parents=True, exist_ok=True)
    data = toy_data()
    data.setup("fit")
    batches = zip(range(STEPS), data.train_dataloader(), strict=False)
    rows = [{"prompt": question.prompt, "answer": question.answer} for _, batch in batches for question in batch]
    (out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def toy_data() -> Any:
    from pgpo_lightning.data import ToyArithmetic

    return ToyArithmetic(
        batch_size=QUESTIONS, eval_batch_size=EVALUATION_QUESTIONS, seed=0, limit_val=EVALUATION_QUESTIONS
    )


def module(kind: type, **settings: Any) -> Any:
    from pgpo_lightning.verifiers import BoxedAnswer

    return kind(
        tokenizer="toy",
        verifier=BoxedAnswer(),
        num_generations=ROLLOUTS,
        max_prompt_length=64,
        max_reprompt_len=160,
        max_response_length=RESPONSE,
        divergence_alpha=ALPHA,
        teacher_update_rate=TEACHER_RATE,
        eval_samples=EVALUATION_SAMPLES,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        max_grad_norm=CLIP,
        is_clip=None,  # TRL has no weight between sampler and trainer
        **settings,
    )


def trainer(folder: Path, **settings: Any) -> Any:
    import lightning as L

    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(accelerator="cpu", max_steps=STEPS, default_root_dir=folder, **quiet, **settings)


def run_ours(out: Path, seed: int, first: bool = False, replay: bool = False) -> None:
    import lightning as L

    from pgpo_lightning.modules import SDPO
    from pgpo_lightning.records import Rollout
    from pgpo_lightning.rollout import Engine

    recorder = Recorder(out / f"{'replay' if replay else 'first' if first else 'ours'}-{seed}")
    theirs = lines(out / f"trl-{seed}" / "rollouts.jsonl") if replay else []
    same = {"rewards": 0, "reprompts": 0, "rollouts": 0}

    class First:
        @staticmethod
        def choice(candidates: list[Any]) -> Any:
            return candidates[0]

    class FirstSDPO(SDPO):
        def prepare_rows(self, rows: list[Any], rng: Any) -> dict[str, float]:
            scalars = super().prepare_rows(rows, First())
            if replay:
                record = theirs[self.steps]
                same["rollouts"] += len(rows)
                same["rewards"] += sum(r.verdict.reward == x for r, x in zip(rows, record["rewards"], strict=True))
                same["reprompts"] += sum(r.reprompt_ids == x for r, x in zip(rows, record["reprompts"], strict=True))
            return scalars

    class Replay(Engine):
        step = 0

        def generate(self, model: Any, tokenizer: Any, questions: Any, prompts: Any, n: int, *_: Any) -> list[Rollout]:
            self.step += 1
            return [
                Rollout(
                    questions[i // n],
                    prompts[i // n],
                    ids,
                    torch.zeros(len(ids)),
                    tokenizer.decode(ids, skip_special_tokens=True),
                    ids[-1] == tokenizer.eos_token_id,
                )
                for i, ids in enumerate(theirs[self.step - 1]["responses"])
            ]

    class Record(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            recorder.clock()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            recorder.end_of_step(pl_module.model)
            rows, scalars = pl_module.last_rows, pl_module.scalars
            numbers = {
                "loss": scalars["actor/pg_loss"],
                "grad_norm": scalars["actor/grad_norm"],
                "reward": statistics.mean(row.verdict.reward for row in rows),
                "length": statistics.mean(row.length for row in rows),
                "in_loss": scalars["self_distillation/reprompt_sample_fraction"],
            }
            recorder.write("log.jsonl", {"step": recorder.step, **numbers, **recorder.times})

    kind, engine = (FirstSDPO if first or replay else SDPO), (Replay() if replay else None)
    run = trainer(recorder.folder, callbacks=[Record()], limit_val_batches=0, num_sanity_val_steps=0)
    run.fit(module(kind, model=str(TOY), seed=seed, engine=engine), datamodule=toy_data())
    if replay:
        compare(recorder.folder, out / f"trl-{seed}", same)


def compare(ours: Path, theirs: Path, same: dict[str, int]) -> None:
    """Print how far a replayed run is from the original: loss and gradient norm of every step, and the weights."""
    from safetensors.torch import load_file

    def weights(folder: Path) -> torch.Tensor:
        tensors = load_file(folder / "model.safetensors")
        return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])

    result: dict[str, Any] = dict(same)
    pairs = list(zip(lines(ours / "log.jsonl"), lines(theirs / "log.jsonl"), strict=True))
    for name in ("loss", "grad_norm"):
        result[f"{name}_relative_difference"] = [abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs]
        result[f"{name}_first_step"] = [pairs[0][0][name], pairs[0][1][name]]
    start = weights(TOY)
    for step in SAVED:
        a, b = (weights(folder / f"step-{step:04d}") for folder in (ours, theirs))
        result[f"weights_step_{step}"] = float((a - b).norm() / (b - start).norm())
    (ours / "replay.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))


def evaluate(out: Path) -> None:
    """Evaluate every run's weights, and the base model, with our validation loop."""
    from pgpo_lightning.modules import SDPO

    for folder in sorted(path.parent for path in out.glob("*-*/log.jsonl")):
        target, results = folder / "evaluation.jsonl", []
        if target.exists() or folder.name.startswith("replay"):
            continue
        for step in (0, *SAVED):
            seed = int(folder.name.split("-")[1])
            policy = module(SDPO, model=str(folder / f"step-{step:04d}" if step else TOY), seed=seed)
            scores = trainer(folder / "evaluations").validate(policy, datamodule=toy_data(), verbose=False)[0]
            results.append({"step": step, **{name.removeprefix("val/"): value for name, value in scores.items()}})
        target.write_text("".join(json.dumps(row | {"step": row["step"]}) + "\n" for row in results), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- table


def curves(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield every number of a run that the table compares."""
    for row in lines(folder / "evaluation.jsonl"):
        yield f"avg@8, step {row['step']}", row["avg@8"]
    log = lines(folder / "log.jsonl")
    for last in SAVED:
        for name in ("reward", "length", "in_loss", "loss", "grad_norm"):
            part = [row[name] for row in log[last - SAVE_EVERY : last]]
            yield f"{name}, steps {last - SAVE_EVERY + 1}-{last}", statistics.mean(part)
    for name in ("cpu_s", "wall_s"):
        yield f"{name} per step (median)", statistics.median(row[name] for row in log[1:])


def table(out: Path) -> None:
    """Print means and standard deviations over seeds, and differences to TRL with their standard errors."""
    runs: dict[str, list[dict[str, float]]] = {}
    for path in sorted(out.glob("*-*/evaluation.jsonl")):
        runs.setdefault(path.parent.name.split("-")[0], []).append(dict(curves(path.parent)))
    arms = [arm for arm in ("trl", "ours", "first") if arm in runs]
    header = [f"{arm} ({len(runs[arm])} seeds)" for arm in arms] + [f"{arm} - trl" for arm in arms[1:]]
    print(f"| | {' | '.join(header)} |\n|---|{'---|' * len(header)}")
    records = []
    for name in runs[arms[0]][0]:
        values = {arm: [run[name] for run in runs[arm]] for arm in arms}
        mean = {arm: statistics.mean(values[arm]) for arm in arms}
        deviation = {arm: statistics.stdev(values[arm]) for arm in arms}
        record = {"what": name, "values": values, "mean": mean, "sd": deviation, "difference": {}, "standard_error": {}}
        cells = [f"{mean[arm]:.4f} ± {deviation[arm]:.4f}" for arm in arms]
        for arm in arms[1:]:
            record["difference"][arm] = mean[arm] - mean["trl"]
            error = sum(deviation[side] ** 2 / len(values[side]) for side in (arm, "trl")) ** 0.5
            record["standard_error"][arm] = error
            cells.append(f"{mean[arm] - mean['trl']:+.4f} (s.e. {error:.4f})")
        print(f"| {name} | {' | '.join(cells)} |")
        records.append(record)
    print("\n" + "\n".join(json.dumps(record) for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["questions", "trl", "ours", "replay", "evaluate", "table"])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", action="store_true", help="ours: demonstrate the first success, as TRL does")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "trl":
        run_trl(args.out, args.seed)
    elif args.command in ("ours", "replay"):
        run_ours(args.out, args.seed, first=args.first, replay=args.command == "replay")
    else:
        {"questions": write_questions, "evaluate": evaluate, "table": table}[args.command](args.out)


if __name__ == "__main__":
    main()
