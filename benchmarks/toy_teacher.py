"""Make a teacher for OPD and TGPO on the toy task: the shipped base model, supervised on right solutions of training questions.

From the root of the repository, in about 20 CPU seconds::

    OMP_NUM_THREADS=1 python -m benchmarks.toy_teacher --output runs/toy-teacher
    OMP_NUM_THREADS=1 python -m benchmarks.toy_teacher --output runs/toy-teacher --students runs/student    # how near it is

The base model is wrong in half of its answers. The teacher has its tokenizer and architecture, and has seen no
held-out numbers.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.toy_base import BASE_MODEL, BATCH_SIZE, accuracy, collate, solution_probabilities
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.toy import questions
from pgpo_lightning.models.loading import load_model, load_tokenizer


def teach(output: str | Path, steps: int = 150, rate: float = 1e-3, seed: int = 0) -> None:
    """Supervise the base model on right solutions, and save it with its tokenizer, in fp32.

    Args:
        output: Folder for the files.
        steps: Optimizer steps of 64 examples.
        rate: Learning rate at the start; it falls to 0 in a line.
        seed: Seed of the choice of examples.
    """
    rng, tokenizer, model = random.Random(seed), load_tokenizer("toy"), load_model("toy").train()
    rows = questions("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        examples = [(str(q.prompt), q.columns["solution"]) for q in rng.sample(rows, BATCH_SIZE)]
        model(**collate(examples, tokenizer)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output, save_jinja_files=False)


@torch.no_grad()
def divergence(student: PreTrainedModel, teacher: PreTrainedModel, held_out: list[Question]) -> float:
    """Return the mean KL(teacher||student) in nats at the tokens of the worked solutions of some questions."""
    batch = collate([(str(q.prompt), q.columns["solution"]) for q in held_out], load_tokenizer("toy"))
    there = batch["labels"][:, 1:] >= 0
    s, t = (model(input_ids=batch["input_ids"]).logits[:, :-1][there].log_softmax(-1) for model in (student, teacher))
    return (t.exp() * (t - s)).sum(-1).mean().item()


def main() -> None:
    """Make the teacher and measure its avg@8, or measure how near students are to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/toy-teacher")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--students",
        nargs="+",
        default=[],
        help="exported models to compare with the teacher that is in `output` already",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.students:
        held_out, teacher = questions("test")[:64], load_model(arguments.output).eval()
        for folder in (BASE_MODEL, *arguments.students, arguments.output):
            kl = divergence(load_model(str(folder)).eval(), teacher, held_out)
            print(f"{folder}: KL {kl:.4f} nats, solution {solution_probabilities(folder, held_out).mean():.3f}")
        return
    teach(arguments.output, arguments.steps, seed=arguments.seed)
    for name, folder in (("base", BASE_MODEL), ("teacher", arguments.output)):
        print(f"{name}: avg@8 {accuracy(folder, questions('test')[:100]).float().mean():.3f}")


if __name__ == "__main__":
    main()
