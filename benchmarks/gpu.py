"""The loss at Qwen3-8B's shapes, random operands in bf16, on one accelerator. Whole steps: ``gpu_report.py``.

From the root of the repository, in at most ten minutes; nothing has to be installed but torch, transformers and lightning::

    python -m benchmarks.gpu --json gpu.jsonl
    python -m benchmarks.gpu --tiny                # every part on a CPU, in less than a minute

Liger-Kernel (``requirements-liger.txt``) is used where it is there. A part that fails is
reported, and the next one runs; one for which less than its share of the budget is left is skipped. JSON lines are written as
they are measured, tables at the end.

Parts: `environment` (versions, rates of a large matrix product and of a copy), `check` (errors against autograd in float64 of
the same operands), `loss` (time and memory beside the four matrix products and plain autograd), `sweep` (rows of logits at a
time), `peers` (Liger-Kernel's losses).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import loss as losses
from benchmarks import measure
from benchmarks.accelerators import QWEN3_8B, SMALL, free, print_tables, size, stopped_after, summary
from benchmarks.loss import Case
from benchmarks.measure import Row

GIB = 2**30
KINDS = ("jsd", "rkl", "fkl", "rkl-top100")


@dataclass(frozen=True)
class Setup:
    """Where and at which sizes everything is measured.

    Args:
        device: cuda or cpu.
        compiled: Whether to measure the compiled loss too.
        shape: Shape of the model.
        tokens: Tokens in the loss.
        check_tokens: Tokens in the comparison with float64.
        chunks: Rows of logits at a time, in the sweep; the floor is measured at `chunk` and without chunks.
        chunk: What the package takes by itself.
        repeats: Rounds of timing.
        side: Side of the square matrices whose product gives the rate of matrix products.
    """

    device: str
    compiled: bool
    shape: dict[str, int]
    tokens: int = 8192
    check_tokens: int = 256
    chunks: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    chunk: int = 1024
    repeats: int = 10
    side: int = 8192

    def case(self, kind: str = "jsd", tokens: int | None = None) -> Case:
        """The loss at the model's shape."""
        return Case(kind, tokens or self.tokens, self.shape["hidden_size"], self.shape["vocab_size"])

    def inputs(self, case: Case, dtype: torch.dtype = torch.bfloat16) -> losses.Inputs:
        """Inputs of the loss on the device."""
        return losses.draw(case, dtype, self.device)

    @property
    def ways(self) -> dict[str, Callable[..., losses.Result]]:
        """How the package may compute the loss, the usual way first."""
        eager = {"ours, eager": partial(losses.ours, compiled=False)}
        return {"ours, compiled": partial(losses.ours, compiled=True), **eager} if self.compiled else eager


TINY = {"tokens": 96, "check_tokens": 48, "chunks": (16, 64), "chunk": 32, "repeats": 2, "side": 128}


def environment(setup: Setup) -> Iterator[Row]:
    """Versions, and the two rates that bound everything else."""
    row = {"python": platform.python_version(), "torch": torch.__version__, "device": platform.machine()}
    if setup.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {"device": properties.name, "device_gib": properties.total_memory / GIB, "cuda": torch.version.cuda}
    for name in ("transformers", "lightning", "bitsandbytes", "liger-kernel", "triton"):
        row[name] = version(name)
    matrix = torch.randn(setup.side, setup.side, device=setup.device).to(torch.bfloat16)
    other = torch.empty_like(matrix)
    large = torch.empty(16 * setup.side**2, dtype=torch.bfloat16, device=setup.device)
    target = torch.empty_like(large)
    work = {"product": partial(torch.mm, matrix, matrix, out=other), "copy": partial(target.copy_, large)}
    seconds = measure.alternate(work, setup.repeats, setup.device)
    row["product_tflops"] = 2 * setup.side**3 / statistics.median(seconds["product"]) / 1e12
    row["copy_tb_per_s"] = 2 * large.nbytes / statistics.median(seconds["copy"]) / 1e12
    yield row


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def check(setup: Setup) -> Iterator[Row]:
    """Relative errors against autograd in float64 from the same operands."""
    if setup.device == "cuda":
        x = setup.inputs(setup.case(tokens=setup.check_tokens))
        with torch.no_grad():
            exact = x.hidden.double() @ x.head.double().t()
            wide = torch.mm(x.hidden, x.head.t(), out_dtype=torch.float32)
            narrow = x.hidden @ x.head.t()
        for name, logits in {"logits left in fp32": wide, "logits rounded to bf16": narrow}.items():
            error = float((logits.double() - exact).norm() / exact.norm())
            yield {"method": name, "dtype": "bfloat16", "error_logits": error}
        del x, exact, wide, narrow, logits
    for dtype, kinds in {torch.bfloat16: KINDS, torch.float32: KINDS[:1]}.items():
        for kind in kinds:
            case = setup.case(kind, setup.check_tokens)
            x = setup.inputs(case, dtype)
            exact = losses.reference(x, case.which)
            for name, way in setup.ways.items():
                if dtype == torch.bfloat16 or "eager" in name:
                    row = {"method": name, "kind": kind, "dtype": str(dtype).removeprefix("torch.")}
                    result, failure = attempt(partial(way, x, case.which))
                    yield row | (failure or losses.errors(result, exact))


def attempt(method: Callable[[], Any]) -> tuple[Any, Row]:
    """Return a method's result, and how it failed: out of memory, say, or without a compiler."""
    try:
        return method(), {}
    except TimeoutError:
        raise
    except Exception as error:
        return None, {"error": summary(error)}


def loss(setup: Setup) -> Iterator[Row]:
    """Time and memory of ours on all divergences, and of plain autograd on one."""
    for kind in KINDS:
        case = setup.case(kind)
        x = setup.inputs(case)
        methods = {name: partial(way, x, case.which) for name, way in setup.ways.items()}
        if kind == "jsd":
            methods["plain"] = partial(losses.plain, x, case.which)
        yield from compare({"kind": kind}, floors(x, (setup.chunk, setup.tokens)), methods, setup)


def sweep(setup: Setup) -> Iterator[Row]:
    """Ours by the rows of logits held at a time."""
    case = setup.case()
    x = setup.inputs(case)
    name, way = next(iter(setup.ways.items()))
    methods = {f"{name}, {n} rows": partial(way, x, case.which, rows=n) for n in setup.chunks}
    yield from compare({"kind": case.kind}, floors(x, setup.chunks), methods, setup)


def peers(setup: Setup) -> Iterator[Row]:
    """Liger-Kernel's losses, as far as they run here; compiling the first takes a while."""
    if importlib.util.find_spec("liger_kernel") is None:
        yield {"skipped": "liger-kernel is missing"}
        return
    case = setup.case()
    x = setup.inputs(case)
    methods = {"Liger, chunked": partial(losses.liger, x, case.which, compiled=setup.compiled)}
    if setup.device == "cuda":
        methods = {"Liger, Triton": partial(losses.liger_triton, x, case.which)} | methods
    for name, method in methods.items():
        yield from compare({"kind": case.kind}, floors(x, (setup.chunk, setup.tokens)), {name: method}, setup)


def floors(x: losses.Inputs, chunks: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Return the four products, so many rows at a time."""
    by_logits = torch.randn(max(chunks), len(x.head), dtype=x.head.dtype, device=x.head.device)
    return {f"four products, {n} rows": partial(losses.products, x, n, by_logits) for n in chunks}


def compare(about: Row, floors: dict[str, Any], methods: dict[str, Any], setup: Setup) -> Iterator[Row]:
    """Measure methods side by side, and against the fastest floor; those that fail are reported and left out."""
    rows: dict[str, Row] = {}
    for name, method in (floors | methods).items():
        start = time.perf_counter()
        _, failure = attempt(method)  # compiles
        if failure:
            free(setup.device)
            yield about | {"method": name} | failure
            continue
        rows[name] = {"first_call_s": time.perf_counter() - start}
        rows[name]["peak_gb"] = measure.device_peak(method, setup.device)[0] * measure.MIB / 1e9
    seconds = measure.alternate({name: (floors | methods)[name] for name in rows}, setup.repeats, setup.device)
    floor = min((seconds[name] for name in floors if name in rows), key=statistics.median)
    for name, row in rows.items():
        ratios = measure.ratios(seconds[name], floor)
        yield about | {"method": name, "ms": 1e3 * statistics.median(seconds[name]), **ratios} | row


PARTS: dict[str, tuple[Callable[[Setup], Iterator[Row]], float]] = {  # with seconds below which it is not begun
    "environment": (environment, 5),
    "check": (check, 40),
    "loss": (loss, 40),
    "sweep": (sweep, 20),
    "peers": (peers, 60),
}


def run(setup: Setup, parts: list[str], budget: float, tiny: bool, record: Callable[[Row], None]) -> None:
    """Run the parts; whatever happens goes to `record`."""
    end = time.monotonic() + budget
    for name in parts:
        function, needed = PARTS[name]
        left = end - time.monotonic()
        if left <= (0 if tiny else needed):
            record({"part": name, "skipped": f"{max(0, left):.0f} s left"})
            continue
        start = time.monotonic()
        try:
            with stopped_after(left):
                for row in function(setup):
                    record({"part": name} | row)
        except Exception as error:
            traceback.print_exc()
            record({"part": name, "error": summary(error)})
        free(setup.device)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU unless `--device` says otherwise")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds after which nothing more is begun or goes on"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="the loss compiled too; default: on cuda"
    )
    for name in ("tokens", "repeats"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"by default {getattr(Setup, name)}")
    parser.add_argument(
        "--shape", type=size, nargs="+", default=[], metavar="NAME=SIZE", help="changes of the model's shape"
    )
    parser.add_argument("--json", type=Path, help="where the JSON lines go; by default before the tables")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    compiled = device == "cuda" if options.compile is None else options.compile
    setup = Setup(device, compiled, (SMALL if options.tiny else QWEN3_8B) | dict(options.shape))
    changes = {name: value for name, value in vars(options).items() if value is not None and name in asdict(setup)}
    changes.pop("shape")
    changes |= {"device": device}
    # Every divergence and number of rows may be compiled anew; from the limit on (8) torch.compile would silently give up.
    torch._dynamo.config.recompile_limit = 64
    setup = replace(setup, **((TINY if options.tiny else {}) | changes))
    rows: list[Row] = []
    with options.json.open("w", encoding="utf-8") if options.json else nullcontext(sys.stdout) as file:

        def record(row: Row) -> None:
            rows.append({"program": "gpu"} | row)
            print(json.dumps(rows[-1]), file=file, flush=True)

        run(setup, options.parts, options.budget, options.tiny, record)
    print_tables(rows)
    return rows


if __name__ == "__main__":
    main()
