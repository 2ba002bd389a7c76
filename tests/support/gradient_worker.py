"""A rank of a run whose gradients are known, under a multiplier of the gradient: ``python -m tests.support.gradient_worker``."""

import sys
from pathlib import Path

import torch

from tests.support.fixed_gradients import LR, RHO, STEPS, FixedGradients, Scripted
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, tiny_model, trainer

CLIP = 0.5
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
}


def worker(output, name):
    torch.set_num_threads(1)
    module = build(
        FixedGradients,
        tiny_model(),
        half_right,
        tokenizer=TOKENIZER,
        optimizer=OPTIMIZERS[name],
        max_grad_norm=CLIP,
        **LIMITS,
    )
    t = trainer(
        Path(output).parent,
        devices=2,
        strategy="ddp",
        max_steps=STEPS,
        callbacks=[Scripted(RHO, "gradient")],
    )
    t.fit(module, loader(range(2 * STEPS), 1))
    torch.save(module.path[-1], f"{output}.{t.global_rank}")


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2])
