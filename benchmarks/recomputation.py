"""What the choices of `model_config.selective_ac_option` cost and save: CPU seconds and bytes of forward and backward pass.

The model is `mid` of sizing.py, with 12 layers, on rows without padding; gradients exist already. Choices alternate within a
round, and ratios are those of a round. Run::

    OMP_NUM_THREADS=1 python -m benchmarks.recomputation [--rounds 3] [--rows 4] [--tokens 128]
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config

from benchmarks import measure
from benchmarks.sizing import MID
from benchmarks.standalone import random_qwen3
from pgpo_lightning.memory_planner.counter import LiveBytes
from pgpo_lightning.memory_planner.dry_run import Compute, along_layers, update_peaks
from pgpo_lightning.memory_planner.parameters import with_layers
from pgpo_lightning.models.packing import Sequences
from pgpo_lightning.models.recomputation import recompute_activations

CHOICES: dict[str, Compute] = {
    "nothing": Compute(),
    "every 2nd layer": Compute(checkpointing=True, selective=2),
    "op": Compute(checkpointing=True, selective="op"),
    "every layer": Compute(checkpointing=True),
}


def step(model: Any, rows: torch.Tensor, counter: LiveBytes | None = None) -> int:
    """Run a forward and a backward pass, and return the bytes that are held between the two."""
    hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state
    held = 0 if counter is None else counter.live
    gradient = torch.ones_like(hidden)
    hidden.backward(gradient)
    return held


def planned(compute: Compute, rows: torch.Tensor, layers: int) -> int:
    """Return the bytes that the plan predicts to be held between the passes."""
    packed = Sequences.pack([(row[:1].tolist(), row[1:].tolist()) for row in rows], 0, torch.device("cpu"))
    config = with_layers(Qwen3Config(**MID), layers)
    peaks = along_layers(
        lambda few: update_peaks(few, compute, packed, [], 0, accumulating=True), config, compute.period
    )
    return peaks["activations"]


def main(arguments: list[str] | None = None) -> list[measure.Row]:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=MID["num_hidden_layers"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = MID | {"num_hidden_layers": options.layers}
    rows = torch.randint(
        0, MID["vocab_size"], (options.rows, options.tokens), generator=torch.Generator().manual_seed(0)
    )
    models: dict[str, Any] = {}
    found: dict[str, dict[str, int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in CHOICES}
    for name, compute in CHOICES.items():
        models[name] = model = random_qwen3("cpu", torch.float32, tied=True, **shape).train()
        if compute.checkpointing:
            recompute_activations(model, compute.selective)
        step(model, rows)
        with LiveBytes() as counter:
            held = step(model, rows, counter)
        found[name] = {"held": held, "peak": counter.peak, "plan": planned(compute, rows, options.layers)}
        for parameter, first in zip(model.parameters(), models["nothing"].parameters(), strict=True):
            assert (parameter.grad is None) == (first.grad is None)
            assert parameter.grad is None or torch.equal(parameter.grad, first.grad)
    for _ in range(options.rounds):
        for name, model in models.items():
            start = time.process_time()
            step(model, rows)
            seconds[name].append(time.process_time() - start)
    table: list[measure.Row] = []
    for name, sizes in found.items():
        ratios = [mine / kept for mine, kept in zip(seconds[name], seconds["nothing"], strict=True)]
        row: measure.Row = {"program": "recomputation", "recomputed": name, "cpu_s": min(seconds[name])}
        row |= {"to_nothing": statistics.median(ratios)}
        row |= {"held_mib": sizes["held"] / measure.MIB, "plan_to_held": sizes["plan"] / sizes["held"]}
        row |= {"peak_mib": sizes["peak"] / measure.MIB}
        table.append(row)
    columns = {"recomputed": "", "held_mib": ".1f", "plan_to_held": ".3f", "peak_mib": ".1f", "cpu_s": ".2f"}
    title = f"{options.layers} layers, {options.rows} x {options.tokens} tokens"
    measure.print_table(title, table, columns | {"to_nothing": ".2f"})
    measure.write_json(table, options.json)
    return table


if __name__ == "__main__":
    main()
