"""What a first call on a GPU must tell, in at most ten minutes on one card: does it run, how fast, in how much memory.

From the root of the repository; nothing has to be installed but the package's own requirements, and no model hub is needed::

    PYTHONPATH=. python -m benchmarks.gpu_report --out report            # on the local GPU
    PYTHONPATH=. python -m benchmarks.gpu_report --device cpu --tiny     # every part on a CPU

Every line goes to ``report.jsonl`` in the folder `--out` (by default the environment's ``OUT``) as soon as it is known, smallest
parts first. A call that is cut off leaves its lines; the last one says whether the report is complete. A part that fails is
reported with its error, and the next one runs.

Parts:

- `environment`: card, versions, rates of a large product and of a copy;
- `fit`: `pgpo fit` for two steps from YAML with each engine, on a model of two layers: exit status, and its error unless it is 0;
- `decode`: ms per token by number of responses, and the share of the memory's bandwidth; on a GPU also with CUDA graphs;
- `sync`: seconds of a weight sync of vLLM, where it is installed;
- `padded`, `shared`: steps of the shipped recipe with checkpointing, and with prompts computed once: seconds, memory and
  utilisation by phase beside the plan's, and an evaluation.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.accelerators import SMALL, free, print_tables, stopped_after, summary
from benchmarks.measure import Row
from benchmarks.recipe import TINY, Sizes, arguments, fitting, write_data
from benchmarks.recipe import measure as measure_recipe
from pgpo_lightning.memory_planner.cards import CARDS, Assumptions, Rates, default_card, rates

GIB = 2**30
OVERLAYS = {130: "141gb-qwen3-8b", 60: "80gb-qwen3-8b", 0: "24gb-qwen3-0.6b"}
"""The recipe by the least GiB of the card."""
NEEDS = {"141gb-qwen3-8b": "bitsandbytes", "80gb-qwen3-8b": "peft", "24gb-qwen3-0.6b": "peft"}


@dataclass
class Report:
    """A report under way.

    Attributes:
        sizes: What is changed of the recipe.
        folder: For files of its parts.
        memory: GiB of the card; None on a CPU.
        rates: What predictions are made from: the card's data sheet, else what `environment` measured.
        peak_flops: FLOP/s that utilisation is relative to.
        end: Monotonic time after which no part starts.
    """

    sizes: Sizes
    folder: Path
    memory: float | None
    rates: Rates
    peak_flops: float
    end: float

    @property
    def overlay(self) -> str | None:
        """The recipe for this card, or none if a package that it needs is missing: then all weights, and fewer layers."""
        name = next(name for least, name in OVERLAYS.items() if (self.memory or 0) >= least)
        return name if importlib.util.find_spec(NEEDS[name]) is not None else None


def environment(report: Report) -> Iterator[Row]:
    """Versions, and the two rates that bound everything else."""
    side = 256 if report.sizes.tiny else 8192
    device = report.sizes.device
    row: Row = {"device": "cpu", "python": sys.version.split()[0], "torch": torch.__version__}
    if device == "cuda":
        row |= {"device": torch.cuda.get_device_name(0), "gib": report.memory, "cuda": torch.version.cuda}
    for name in ("transformers", "lightning", "accelerate", "peft", "bitsandbytes", "vllm"):
        row[name] = _version(name)
    matrix = torch.randn(side, side, device=device).to(torch.bfloat16)
    large = torch.empty(16 * side**2, dtype=torch.bfloat16, device=device)
    work = {
        "product": partial(torch.mm, matrix, matrix, out=torch.empty_like(matrix)),
        "copy": partial(torch.empty_like(large).copy_, large),
    }
    seconds = measure.alternate(work, 5, device)
    multiplied = 2 * side**3 / statistics.median(seconds["product"])
    copy = 2 * large.nbytes / statistics.median(seconds["copy"])
    if device == "cpu":
        report.rates = rates("cpu", Assumptions(tflops=multiplied / 1e12, bandwidth=copy / 1e9), torch.float32)
        report.peak_flops = multiplied
    yield row | {"product_tflops": multiplied / 1e12, "copy_gb_per_s": copy / 1e9, "predictions_for": report.rates.name}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def fit(report: Report) -> Iterator[Row]:
    """`pgpo fit` for two steps from YAML with each engine."""
    from benchmarks.standalone import random_qwen3

    sizes = Sizes(report.sizes.device, True, **TINY)
    model = report.folder / "tiny"
    random_qwen3("cpu", torch.float32, tied=True, **SMALL).save_pretrained(model)
    options = {"max_model_len": 512, "gpu_memory_utilization": 0.3, "enforce_eager": True}
    vllm = [f"--model.engine.init_args.{name}={json.dumps(value)}" for name, value in options.items()]
    captured = {"TransformersEngine, cuda_graphs": ["--model.engine.init_args.cuda_graphs=true"]}
    engines = {
        "TransformersEngine": [],
        **({} if report.sizes.device == "cpu" else captured),
        "VLLMEngine": ["--model.engine=pgpo_lightning.rollout.VLLMEngine", *vllm],
    }
    for engine, more in engines.items():
        about: Row = {"engine": engine}
        if engine == "VLLMEngine" and importlib.util.find_spec("vllm") is None:
            yield about | {"skipped": "vllm is not installed"}
            continue
        if engine == "VLLMEngine":
            sizes = replace(sizes, at_once=None)
        args = arguments(None, sizes, report.folder, "--model.model", str(model), *more)
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pgpo_lightning.commands.main", "fit", *args],
            capture_output=True,
            text=True,
            timeout=max(1.0, report.end - start),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        row = about | {"rc": done.returncode, "seconds": time.monotonic() - start}
        yield row if done.returncode == 0 else row | {"error": (done.stderr or done.stdout)[-1500:]}


def decode(report: Report) -> Iterator[Row]:
    """Milliseconds per token of our own sampler, with the recipe's weights in bf16."""
    from benchmarks.standalone import random_qwen3, token_ids
    from pgpo_lightning.core.types import Question
    from pgpo_lightning.memory_planner.dry_run import Compute
    from pgpo_lightning.memory_planner.flops import Width
    from pgpo_lightning.memory_planner.generation import Generation, Group
    from pgpo_lightning.memory_planner.generation import Sampling as Planned
    from pgpo_lightning.memory_planner.parameters import configuration, count, with_layers
    from pgpo_lightning.models.loading import load_tokenizer
    from pgpo_lightning.rollout.engine import Sampling
    from pgpo_lightning.rollout.transformers_engine import TransformersEngine

    tiny = report.sizes.tiny
    new, prompt = (4, 8) if tiny else (64, 256)
    config = configuration("Qwen/Qwen3-8B" if (report.memory or 0) > 30 else "Qwen/Qwen3-0.6B")
    if tiny:
        config = with_layers(configuration("toy"), 2)
    shape = {name: getattr(config, name) for name in SMALL}
    model = random_qwen3(report.sizes.device, torch.bfloat16, config.tie_word_embeddings, tiled=True, **shape)
    counted, rng = count(config), random.Random(0)
    planned = Generation(config, Compute(torch.bfloat16), Width.of(config, counted), report.rates, report.sizes.device)
    numbers, captured = (
        (1, 2) if tiny else (1, 8, 32, 128, 256),
        (False,) if report.sizes.device == "cpu" else (False, True),
    )
    for graphs, responses in product(captured, numbers):
        engine = TransformersEngine(cuda_graphs=graphs)
        asked = [Question("?", "1", index=i) for i in range(responses)]
        prompts = [token_ids(rng, prompt, config.vocab_size) for _ in asked]
        sample = partial(engine.generate, model, load_tokenizer("toy"), asked, prompts, 1)
        sample(Sampling(2))
        seconds = []
        for tokens in (new // 2, new):
            start = time.perf_counter()  # the responses are on the host when it returns
            sample(Sampling(tokens))
            seconds.append(time.perf_counter() - start)
        each = (seconds[1] - seconds[0]) / (new - new // 2)
        token = planned._token(False).of(responses, responses * (prompt + new * 3 / 4))
        groups = [Group(prompt, (new,))] * responses
        predicted = planned.seconds(groups, Planned(new))["decode"] / (new - 1)
        row: Row = {
            "cuda_graphs": graphs,
            "responses": responses,
            "ms_per_token": 1e3 * each,
            "tokens_per_s": responses / each,
        }
        row |= {"bandwidth_share": token.product_bytes / each / _bandwidth(report)}
        yield row | {"predicted_ms": 1e3 * predicted, "predicted_to_measured": predicted / each}


def _bandwidth(report: Report) -> float:
    return next((c.bandwidth for c in CARDS.values() if c.name == report.rates.name), report.rates.bandwidth)


def sync(report: Report) -> Iterator[Row]:
    """Seconds that vLLM in this process takes longer when the student's weights have changed."""
    if importlib.util.find_spec("vllm") is None:
        yield {"skipped": "vllm is not installed"}
        return
    from transformers import AutoModelForCausalLM

    from benchmarks.standalone import random_qwen3
    from pgpo_lightning.core.types import Question
    from pgpo_lightning.memory_planner.parameters import configuration
    from pgpo_lightning.models.loading import load_tokenizer
    from pgpo_lightning.rollout import VLLMEngine
    from pgpo_lightning.rollout.engine import Sampling

    config = configuration("Qwen/Qwen3-0.6B")
    shape = SMALL if report.sizes.tiny else {name: getattr(config, name) for name in SMALL}
    folder = report.folder / "synced"
    random_qwen3("cpu", torch.bfloat16, tied=True, tiled=True, **shape).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(report.sizes.device)
    engine = VLLMEngine(max_model_len=256, gpu_memory_utilization=0.3, enforce_eager=True)
    sample = partial(engine.generate, model, load_tokenizer("toy"), [Question("?", "1")], [[20, 21]], 1, Sampling(2))
    sample()
    seconds = {}
    for name in ("same weights", "new weights"):
        if name == "new weights":
            with torch.no_grad():
                next(iter(model.parameters())).mul_(1.01)
        start = time.perf_counter()
        sample()
        seconds[name] = time.perf_counter() - start
    size = sum(p.nbytes for p in model.parameters())
    yield {"gib": size / GIB, "sync_s": seconds["new weights"] - seconds["same weights"]}


def recipe(report: Report, checkpointing: bool) -> Iterator[Row]:
    """Steps of the shipped recipe and an evaluation, measured beside predicted."""
    from pgpo_lightning.commands.plan import PlanCommand
    from pgpo_lightning.models.loading import resolve_model

    flag = ["--model.model_config.gradient_checkpointing", str(checkpointing).lower()]
    args = arguments(report.overlay, report.sizes, report.folder, *flag)
    if report.sizes.tiny:
        args += ["--shapes", resolve_model("toy"), "--trainer.precision", "32-true"]
    command = PlanCommand(args)
    run = command.run()
    module: Any = command.model
    if getattr(module.engine, "max_sequences", None) is not None:
        module.engine.max_sequences = report.sizes.at_once
    run = fitting(replace(run, at_once=report.sizes.at_once), report.memory)
    rows: list[Row] = []
    measure_recipe(command, run, report.sizes, report.rates, report.peak_flops, rows.append)
    about: Row = {"recipe": report.overlay or "sciknoweval"}
    yield from (about | row for row in rows)


PARTS = {
    "environment": environment,
    "fit": fit,
    "decode": decode,
    "sync": sync,
    "padded": partial(recipe, checkpointing=True),
    "shared": partial(recipe, checkpointing=False),
}


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy in place of the recipe's model")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--budget", type=float, default=570, help="seconds after which nothing goes on")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder of report.jsonl")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.budget
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if options.device == "cuda" else None
    card, assumed = default_card(memory), Assumptions()
    found = rates(card, assumed, torch.bfloat16)
    sizes = Sizes(options.device, options.tiny, **(TINY if options.tiny else {}))
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "report.jsonl").open("a", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        report = Report(sizes, Path(folder), memory, found, CARDS[card].bf16, end)

        shown = sys.stdout  # Lightning's own output goes elsewhere

        def record(row: Row) -> None:
            rows.append(row)
            line = json.dumps(row)
            for stream in (file, shown):
                print(line, file=stream, flush=True)
            os.fsync(file.fileno())

        for name in options.parts:
            if (left := end - time.monotonic()) <= 0:
                record({"part": name, "skipped": "the budget is spent"})
                continue
            try:
                with stopped_after(left), contextlib.redirect_stdout(sys.stderr):
                    for row in PARTS[name](report):
                        record({"part": name} | row)
            except Exception as error:
                traceback.print_exc()
                record({"part": name, "error": summary(error)})
            free(options.device)
        record({"part": "end", "complete": not any("error" in row or "skipped" in row for row in rows)})
    print_tables(rows)
    return rows


if __name__ == "__main__":
    main()
