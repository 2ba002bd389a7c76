"""Make a teacher for OPD and TGPO on the toy task: the shipped base model, supervised on right solutions of training questions.

From the root of the repository, in about 20 CPU seconds::

    OMP_NUM_THREADS=1 python -m benchmarks.toy_teacher --output runs/toy-teacher

The base model is wrong in half of its answers. The teacher has its tokenizer and architecture, and has seen no
held-out numbers.
"""

import argparse
import random
from pathlib import Path

import torch

from benchmarks.toy_base import BASE_MODEL, BATCH_SIZE, accuracy, collate
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


def main() -> None:
    """Make the teacher, then measure the files that were written and the base model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/toy-teacher")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teach(arguments.output, arguments.steps, seed=arguments.seed)
    for name, folder in (("base", BASE_MODEL), ("teacher", arguments.output)):
        print(f"{name}: avg@8 {accuracy(folder, questions('test')[:100]).float().mean():.3f}")


if __name__ == "__main__":
    main()
