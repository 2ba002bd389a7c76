"""Length and direction of small updates of bf16 weights, compared with those of fp32 weights.

Every kind takes the same steps, with gradients of next-token prediction on the toy's training questions at its own weights.

Run: ``python -m benchmarks.bf16 [--steps 30] [--rates 1e-6 1e-5 1e-4]``. torchao's rows need ``pip install torchao``.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes.optim import AdamW8bit
from transformers import AutoTokenizer

from benchmarks import measure
from pgpo_lightning.data.toy import ToyArithmetic
from pgpo_lightning.models.loading import load_model, resolve_model
from pgpo_lightning.rollout.prompts import PromptEncoder

Kind = tuple[torch.dtype, Callable[..., torch.optim.Optimizer]]


def kinds() -> dict[str, Kind]:
    """Return the type of the weights and the optimizer of every row; the first is what the others are compared with."""
    narrow = torch.bfloat16
    found: dict[str, Kind] = {
        "fp32 weights, AdamW": (torch.float32, torch.optim.AdamW),
        "fp32 weights, bitsandbytes AdamW8bit": (torch.float32, AdamW8bit),
        "bf16 weights, AdamW": (narrow, torch.optim.AdamW),
        "bf16 weights, bitsandbytes AdamW8bit": (narrow, AdamW8bit),
    }
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW8bit as Rounding

        def stochastic(*args: object, **settings: float) -> torch.optim.Optimizer:
            return Rounding(*args, **settings, bf16_stochastic_round=True)

        found["bf16 weights, torchao AdamW8bit"] = (narrow, Rounding)
        found["bf16 weights, torchao AdamW8bit, stochastic rounding"] = (narrow, stochastic)
    return found


def batches(count: int) -> list[torch.Tensor]:
    """Return token ids of some questions with their answers, a few at a time."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("toy"))
    encoder = PromptEncoder(tokenizer, False)
    questions = ToyArithmetic().load("train")[: 8 * count]
    rows = [encoder.question(q) + encoder.tokens(f"\\boxed{{{q.answer}}}") for q in questions]
    width = min(map(len, rows))
    return list(torch.tensor([row[-width:] for row in rows]).split(8))


def moved(dtype: torch.dtype, make: Callable[..., torch.optim.Optimizer], rate: float, steps: int) -> torch.Tensor:
    """Return how far the weights are from their start after some steps, as one vector."""
    model = load_model("toy").to(dtype)
    start = [p.detach().float().clone() for p in model.parameters()]
    optimizer = make(model.parameters(), lr=rate, weight_decay=0.0)
    torch.manual_seed(0)
    for ids in batches(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ends = zip(model.parameters(), start, strict=True)
    return torch.cat([(p.detach().float() - q).flatten() for p, q in ends])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4])
    parser.add_argument("--json", type=Path, help="where the JSON lines go; by default after the table")
    args = parser.parse_args()
    rows = []
    for rate in args.rates:
        exact = None
        for name, (dtype, make) in kinds().items():
            vector = moved(dtype, make, rate, args.steps)
            exact = vector if exact is None else exact
            rows.append(
                {
                    "rate": rate,
                    "kind": name,
                    "moved": (vector != 0).float().mean().item(),
                    "length": (vector.norm() / exact.norm()).item(),
                    "cosine": torch.cosine_similarity(vector, exact, dim=0).item(),
                }
            )
    columns = {"rate": "g", "kind": "", "moved": ".3f", "length": ".2f", "cosine": ".3f"}
    measure.print_table(f"{args.steps} steps", rows, columns)
    measure.write_json(rows, args.json)


if __name__ == "__main__":
    main()
