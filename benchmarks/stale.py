"""How large is `rollout_corr/gap` when a sampler is one step behind? What `max_sampler_gap` can and cannot see.

Runs the quickstart's first steps with an engine that samples from the weights of one batch before, at several learning rates.

Run: ``python -m benchmarks.stale [--rates 1e-5 1e-4 1e-3] [--steps 4]``.
"""

import argparse
import copy
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from benchmarks import measure
from pgpo_lightning.commands.main import main as pgpo
from pgpo_lightning.core.types import Rollout
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.rollout.transformers_engine import TransformersEngine

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


class Stale(TransformersEngine):
    """Samples from the weights of some batches before; in the first ones from those of the start.

    Args:
        lag: How many batches.
        kwargs: Arguments of :class:`TransformersEngine`.
    """

    def __init__(self, lag: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.past: deque[PreTrainedModel] = deque(maxlen=lag + 1)

    def generate(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> list[Rollout]:
        """See :meth:`TransformersEngine.generate`."""
        self.past.append(copy.deepcopy(model))
        return super().generate(self.past[0], *args, **kwargs)


def gaps(rate: float, lag: int, steps: int) -> list[float]:
    """Return the gap of every step, in nats per token."""
    with TemporaryDirectory() as folder:
        changes = {
            "trainer.default_root_dir": f"{folder}/run",
            "trainer.max_steps": steps,
            "trainer.limit_val_batches": 0,
            "data.batch_size": 8,
            "model.engine": "stale.Stale",
            "model.engine.lag": lag,
            "model.max_sampler_gap": "null",
            "model.optimizer.lr": rate,
        }
        settings = [f"--{name}={value}" for name, value in changes.items()]
        pgpo(["fit", "--config", str(QUICKSTART), *settings])
        return list(read_scalars(Path(folder) / "run")["rollout_corr/gap"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3])
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where the JSON lines go; by default after the table")
    args = parser.parse_args()
    rows = []
    for rate in args.rates:
        for lag in args.lags:
            seen = gaps(rate, lag, args.steps)[lag:]  # before, there was nothing older
            rows.append({"rate": rate, "lag": lag, "smallest": min(seen), "largest": max(seen)})
    measure.print_table("gap, nats per token", rows, {"rate": "g", "lag": "", "smallest": ".2g", "largest": ".2g"})
    measure.write_json(rows, args.json)


if __name__ == "__main__":
    main()
