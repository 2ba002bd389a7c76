"""Trains on fixed rows, each rank with its own share, with the named multiplier; run by distributed/test_adaptive.py.

Usage: python -m tests.support.adaptive_worker OUTPUT RANKS NAME
"""

import sys
from pathlib import Path

import torch

from pgpo_lightning.callbacks import (
    InformationMultiplier,
    KLAdaptiveMultiplier,
)
from tests.support import ranks_worker
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    build,
    half_right,
    loader,
    tiny_model,
    trainer,
)

WORKERS = {
    "gradient": lambda: InformationMultiplier(sensitivity=20.0, rho_min=None, rho_max=10.0, applies_to="gradient"),
    "kl-adaptive": lambda: KLAdaptiveMultiplier(target=0.01, factor=1.1),
}


class FixedRows(ranks_worker.FixedSDPO):
    """Uneven shares, kept for whoever looks at the batch afterwards."""

    split = "uneven"

    def training_step(self, batch, batch_idx):
        self.seen, self.norms = [], []
        super().training_step(batch, batch_idx)
        share = ranks_worker.ROWS // self.trainer.world_size
        rows = ranks_worker.rows_of(self.steps - 1, self.split)
        self.last_samples = rows[self.global_rank * share : (self.global_rank + 1) * share]


def worker(output, ranks, name):
    torch.set_num_threads(1)
    module = build(FixedRows,
        tiny_model(), half_right, tokenizer=TOKENIZER, micro_batch_tokens=120, max_grad_norm=0.5,
        loss_agg_mode="token-mean", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **LIMITS,
    )  # fmt: skip
    multiplier = WORKERS[name]()
    t = trainer(
        Path(output).parent, devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=3, callbacks=[multiplier]
    )
    t.fit(module, loader(range(3 * ranks), 1))
    weights = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    torch.save({"weights": weights, "rho": multiplier.history}, f"{output}.{t.global_rank}")


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), sys.argv[3])
