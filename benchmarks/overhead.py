"""The cost of PGPO on top of SDPO: the same step with and without InformationMultiplier, in turns in one process.

Every step of the run answers the same questions with the same random numbers from the same weights (the learning rate is
zero), so that two neighbouring steps differ by the callback alone. The order within a pair alternates. Two figures come out: the
paired difference in CPU seconds, which has the noise of whole steps in it, and the CPU time spent inside the callback's hooks::

    python -m benchmarks.overhead --pairs 100
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lightning as L
import torch
from torch.utils.data import DataLoader

from pgpo_lightning.callbacks import InformationMultiplier
from pgpo_lightning.data import ToyArithmetic
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rewards import BoxedAnswer
from pgpo_lightning.teachers.configs import RepromptConfig


class SameStep(SDPO):
    """Takes the same step again and again."""

    def training_step(self, questions: list[Any], batch_idx: int) -> None:
        """Sample with the random numbers of the first step."""
        self.steps = 0
        super().training_step(questions, batch_idx)


class Switched(InformationMultiplier):
    """Works in every other step, and keeps the time that it takes."""

    def __init__(self) -> None:
        super().__init__(sensitivity=1.0)
        self.steps: list[tuple[bool, float, float]] = []  # on or off; CPU seconds of the step; of the hooks
        self.inside = 0.0
        self.start = 0.0

    @property
    def on(self) -> bool:
        """Off, on, on, off, ..."""
        return len(self.steps) % 4 in (1, 2)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.inside = 0.0
        self.start = time.process_time()

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Scale the rate if it is the turn."""
        start = time.process_time()
        if self.on:
            super().on_before_optimizer_step(*args)
        self.inside += time.process_time() - start

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the clock."""
        self.steps.append((self.on, time.process_time() - self.start, self.inside))


def measure(pairs: int, questions: int) -> dict[str, Any]:
    """Run `pairs` pairs of steps of `questions` questions with 8 responses each, and compare."""
    torch.set_num_threads(1)
    module = SameStep(
        model="toy",
        verifier=BoxedAnswer(),
        max_prompt_length=64,
        reprompt=RepromptConfig(max_reprompt_len=160),
        max_response_length=32,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.0),
    )
    switched = Switched()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=2 * pairs + 4,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            callbacks=[switched],
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        batch = ToyArithmetic().load("train")[:questions]
        trainer.fit(module, DataLoader([batch] * (2 * pairs + 4), batch_size=None))
    counted = switched.steps[4:]  # the first four warm up
    differences, off = [], []
    for first, second in zip(counted[::2], counted[1::2], strict=True):
        without, with_it = (first, second) if second[0] else (second, first)
        off.append(without[1])
        differences.append((with_it[1] - without[1]) / without[1])
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(differences, k=len(differences))) for _ in range(2000))
    step = statistics.median(off)
    hooks = [inside for on, _, inside in counted if on]
    return {
        "pairs": len(differences),
        "cpu_s_per_step": round(step, 4),
        "paired_median_percent": round(100 * statistics.median(differences), 3),
        "interval_95_percent": [round(100 * medians[50], 3), round(100 * medians[-51], 3)],
        "quartiles_percent": [round(100 * q, 3) for q in statistics.quantiles(differences, n=4)],
        "hooks_cpu_ms": round(1000 * statistics.median(hooks), 3),
        "hooks_percent": round(100 * statistics.median(hooks) / step, 3),
    }


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--questions", type=int, default=16)
    args = parser.parse_args()
    result = measure(args.pairs, args.questions)
    print("\n".join(f"{name:24}{value}" for name, value in result.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
