"""How far the average of an adapter's factors is from the average of their product, in a real run.

The EMA teacher of a run with `lora` averages A and B each by itself. Beside it stands the exact average of ``scale * B A``, a
dense matrix per layer in fp64 that starts where the teacher starts and follows the same student. After some steps both are run
over the step's own reprompts and responses::

    python -m benchmarks.lora_ema fit --config configs/quickstart.yaml --config configs/lora.yaml --model.optimizer.lr 1e-3

Columns: the relative Frobenius distance, over all layers, of the teacher's product; of a product whose factors are averaged from
zero; of exact averages cut back to rank R after every step. Then KL(exact teacher || teacher), and mean and largest size of
the difference of log-probabilities of response tokens, in nats; and KL(exact teacher || student), both seeing the reprompt, for
the size of what the average is there for.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from benchmarks.measure import print_table, write_json
from pgpo_lightning.commands.fit import PGPOCommand
from pgpo_lightning.core.types import Sample
from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.models.lm_head import decoder, head, source
from pgpo_lightning.modules import SDPO

STEPS = (1, 2, 3, 5, 10, 20, 30, 40)  # and every 20 from there on
RANKS = (1, 2)  # in multiples of the adapter's
COLUMNS = {
    "step": "d",
    "factors": ".2e",
    "from_zero": ".2e",
    **{f"rank_{multiple}r": ".2e" for multiple in RANKS},
    "kl": ".2e",
    "log_p_mean": ".2e",
    "log_p_max": ".2e",
    "kl_to_student": ".2e",
}


class Deviation(L.Callback):
    """Follows a run with averages of its own; changes nothing in it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: SDPO) -> None:
        """Start all averages where the teacher starts."""
        if trainer.global_step:
            raise ValueError("Expected a run from its start, but it was resumed.")
        self.scale = {name: layer.scaling["default"] for name, layer in _layers(pl_module.model).items()}
        self.exact = _products(dict(adapter(pl_module.model)), self.scale)
        self.zero = {name: torch.zeros_like(value) for name, value in adapter(pl_module.model).items()}
        self.cut = {multiple: dict(self.exact) for multiple in RANKS}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: SDPO, *_: Any) -> None:
        """Move all averages, and look at some steps."""
        rate, student = pl_module.objective.teaching.config.rate, adapter(pl_module.model)
        now = _products(student, self.scale)
        for name, product in now.items():
            self.exact[name] = torch.lerp(self.exact[name], product, rate)
            for multiple, cut in self.cut.items():
                cut[name] = _truncated(torch.lerp(cut[name], product, rate), multiple * pl_module.lora.r)
        for name, value in student.items():
            self.zero[name].lerp_(value.detach(), rate)
        step = pl_module.steps
        if step in STEPS or step % 20 == 0:
            teacher = dict(pl_module.teacher.model.named_parameters())
            row = {"step": step, "factors": self._distance(_products(teacher, self.scale))}
            row["from_zero"] = self._distance(_products(self.zero, self.scale))
            row |= {f"rank_{multiple}r": self._distance(cut) for multiple, cut in self.cut.items()}
            rows = [row for row in pl_module.last_samples if row.reprompt_ids is not None]
            self.rows.append(row | self._nats(pl_module, rows))

    def _distance(self, products: dict[str, Tensor]) -> float:
        apart = sum((products[name] - exact).square().sum() for name, exact in self.exact.items())
        return float((apart / sum(exact.square().sum() for exact in self.exact.values())).sqrt())

    @torch.no_grad()
    def _nats(self, module: SDPO, rows: list[Sample]) -> dict[str, float]:
        model, layers = module.model, _layers(module.model)
        stand_in = {
            f"{name}.lora_B.default.weight": torch.zeros_like(layers[name].lora_B["default"].weight) for name in layers
        }
        for name, layer in layers.items():
            weight = layer.base_layer.weight
            stand_in[f"{name}.base_layer.weight"] = (weight.double() + self.exact[name]).to(weight.dtype)
        sequences = module.learner.pack([(row.reprompt_ids, row.rollout.response_ids) for row in rows])
        exact = sequences.hidden_states(_decoder_with(model, stand_in), model.config)
        hidden = (exact, module.teacher.sources(model, sequences)[0].hidden, source(model, sequences).hidden)
        log_p, teacher, student = (
            (head(model)(each).double() / module.learner.temperature).log_softmax(-1) for each in hidden
        )
        apart = (teacher - log_p).gather(1, sequences.targets.unsqueeze(1)).abs()
        return {
            "kl": float((log_p.exp() * (log_p - teacher)).sum(-1).mean()),
            "log_p_mean": float(apart.mean()),
            "log_p_max": float(apart.max()),
            "kl_to_student": float((log_p.exp() * (log_p - student)).sum(-1).mean()),
        }


def _decoder_with(model: PreTrainedModel, weights: dict[str, Tensor]) -> Callable[..., Any]:
    """Return the decoder of a model with other weights during a call."""
    part = decoder(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is part)
    replaced = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    return lambda **inputs: functional_call(part, replaced, (), inputs)


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _products(matrices: dict[str, Tensor], scale: dict[str, float]) -> dict[str, Tensor]:
    factor = {name: matrix.detach().double() for name, matrix in matrices.items()}
    return {
        name: by * factor[f"{name}.lora_B.default.weight"] @ factor[f"{name}.lora_A.default.weight"]
        for name, by in scale.items()
    }


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


class _Command(PGPOCommand):
    def before_fit(self) -> None:
        super().before_fit()
        self.deviation = Deviation()
        self.trainer.callbacks.append(self.deviation)


def main(args: list[str]) -> list[dict[str, float]]:
    """Run the training that the arguments of ``pgpo`` describe; print the table and leave ``lora_ema.jsonl`` in its folder."""
    command = _Command(args)
    rows = command.deviation.rows
    print_table("Distance from the exact average of the product", rows, COLUMNS)
    write_json(rows, Path(command.trainer.log_dir) / "lora_ema.jsonl")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
