"""The distillation loss with its gradients: ours, plain autograd, Liger-Kernel, and the matrix products that none can avoid.

From hidden states and head to the loss of all tokens and the gradients of the student's hidden states and head, fp32, one CPU
thread, from the root of the repository::

    python -m benchmarks.loss                               # every case below, half an hour on busy cores
    python -m benchmarks.loss --case jsd:2048x256x32768     # tokens x hidden x vocabulary
    python -m benchmarks.loss --compile                     # with torch.compile too; compiling takes minutes

Liger's two rows need ``pip install --no-deps -r benchmarks/requirements-liger.txt`` and are left out without it. Ours alone
also gives log-probabilities, entropies and the KL of every token. CPU seconds are medians over rounds in which the methods take
turns; the ratio to the floor is the median of the rounds' ratios. Peaks are resident memory above the inputs, each in a process
of its own. Errors are those of the loss and, as norms, of the gradients, relative to autograd in float64.
"""

import argparse
import importlib.util
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from pgpo_lightning.losses.divergence import Divergence, divergence, student_top_k
from pgpo_lightning.losses.fused import Head, Source, linear_distillation

ALPHA = {"fkl": 0.0, "jsd": 0.5, "rkl": 1.0}
CASES = [
    "jsd:2048x256x32768",
    "rkl:2048x256x32768",
    "fkl:2048x256x32768",
    "rkl-top100:2048x256x32768",
    "jsd:4096x128x512",
    "jsd:1024x256x4096",
    "jsd:512x256x151936",
]
COLUMNS = {"method": "", "cpu_s": ".3f", "to_floor": ".2f", "to_floor_range": "", "peak_mib": ".0f"}
COLUMNS |= dict.fromkeys(("error_loss", "error_hidden", "error_head"), ".1e")
Result = tuple[Tensor, tuple[Tensor, Tensor]]  # loss, and its gradients in hidden states and head


@dataclass(frozen=True)
class Case:
    """A divergence and sizes."""

    kind: str
    tokens: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, text: str) -> "Case":
        """Read ``kind:tokens x hidden x vocabulary``; kinds are fkl, jsd and rkl, or with a tail ``rkl-top100``."""
        match = re.fullmatch(r"((?:fkl|jsd|rkl)(?:-top\d+)?):(\d+)x(\d+)x(\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"Expected a case like jsd:2048x256x32768, but got {text}.")
        kind, *sizes = match.groups()
        return cls(kind, *map(int, sizes))

    @property
    def which(self) -> Divergence:
        """The divergence as the package names it."""
        name, _, k = self.kind.partition("-top")
        return Divergence(ALPHA[name], int(k) if k else None)


class Inputs(NamedTuple):
    """The inputs of the loss."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    targets: Tensor


def draw(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    """Draw a student whose logits have a standard deviation of 3, and a teacher that is not far from it."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, case.hidden, generator=generator, dtype=dtype, device=device)

    hidden, head = normal(case.tokens), normal(case.vocabulary).mul_(3 / math.sqrt(case.hidden))
    teacher_hidden = normal(case.tokens).mul_(0.2).add_(hidden)
    teacher_head = normal(case.vocabulary).mul_(0.1 / math.sqrt(case.hidden)).add_(head)
    targets = torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=device)
    return Inputs(hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, targets)


def ours(x: Inputs, which: Divergence, rows: int | None = None, compiled: bool | None = False) -> Result:
    """The mean divergence by the package's own operation."""
    student, teacher = Source(x.hidden, Head(x.head)), Source(x.teacher_hidden, Head(x.teacher_head))
    scale = 1 / len(x.targets)
    loss, _ = linear_distillation(
        student, [teacher], x.targets, lambda t, _: t.divergence * scale, which, chunk_rows=rows, compiled=compiled
    )
    return loss.detach(), torch.autograd.grad(loss, (x.hidden, x.head))


def plain_loss(x: Inputs, which: Divergence) -> Tensor:
    """The mean divergence from all logits at once, with the functions that the package's tests take as their oracle."""

    def log_probabilities(hidden: Tensor, head: Tensor) -> Tensor:
        logits = hidden @ head.T
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    log_s = log_probabilities(x.hidden, x.head)
    with torch.no_grad():
        log_t = log_probabilities(x.teacher_hidden, x.teacher_head)
    if which.top_k is not None:
        log_s, log_t = student_top_k(log_s, log_t, which.top_k, which.add_tail)
    return divergence(log_s, log_t, which.alpha).mean()


def plain(x: Inputs, which: Divergence, function: Callable[[Inputs, Divergence], Tensor] = plain_loss) -> Result:
    """The same with autograd's gradients."""
    loss = function(x, which)
    return loss.detach(), torch.autograd.grad(loss, (x.hidden, x.head))


def plain_compiled(x: Inputs, which: Divergence) -> Result:
    """The same under torch.compile."""
    return plain(x, which, torch.compile(plain_loss))


def liger(x: Inputs, which: Divergence, rows: int = 1024, compiled: bool = False) -> Result:
    """Liger-Kernel's chunked loss, the one that runs anywhere; 1024 rows are its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    settings = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": which.alpha}
    function = LigerFusedLinearJSDLoss(**settings, compiled=compiled, chunk_size=rows)
    loss = function(x.hidden, x.head, x.teacher_hidden, x.teacher_head, x.targets)
    return loss.detach(), torch.autograd.grad(loss, (x.hidden, x.head))


def liger_triton(x: Inputs, which: Divergence) -> Result:
    """Liger-Kernel's fused JSD in Triton, with the head's gradient summed in fp32 as ours."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    function = LigerFusedLinearJSD(which.alpha, accum_dtype=torch.float32)
    loss = function(x.hidden, x.head, x.teacher_hidden, x.teacher_head, x.targets)
    return loss.detach(), torch.autograd.grad(loss, (x.hidden, x.head))


def products(x: Inputs, rows: int, by_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The four matrix products that loss and gradients are made of, and nothing else, `rows` tokens at a time.

    On CUDA narrow matrices are multiplied into fp32, as our loss does. There the logits cannot be multiplied further as they
    are: `by_logits`, of at least `rows` rows and of the operands' type, takes the place of the gradient in the logits.
    """
    native = x.hidden.is_cuda and x.hidden.dtype in (torch.bfloat16, torch.float16)
    wide = {"out_dtype": torch.float32} if native else {}
    dtype = torch.float32 if native else x.hidden.dtype
    tokens = len(x.targets)
    with torch.no_grad():
        by_hidden = torch.empty(x.hidden.shape, dtype=dtype, device=x.hidden.device)
        by_head = torch.zeros(x.head.shape, dtype=dtype, device=x.hidden.device)
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            hidden, theirs = x.hidden[part], x.teacher_hidden[part]
            logits = torch.mm(hidden, x.head.t(), **wide)
            torch.mm(theirs, x.teacher_head.t(), **wide)
            by = logits if by_logits is None else by_logits[: len(hidden)]
            by_hidden[part] = torch.mm(by, x.head, **wide)
            torch.addmm(by_head, by.t(), hidden, **wide, out=by_head)
            del logits, by  # before the next ones are made
    return by_hidden, by_head


def floor(x: Inputs, _: Divergence, rows: int = 256) -> tuple[Tensor, Tensor]:
    """The products in chunks as large as ours on a CPU."""
    return products(x, rows)


def reference(x: Inputs, which: Divergence, rows: int = 128) -> Result:
    """Plain autograd in float64, some rows at a time, which changes nothing: every token has its own term."""
    tokens = len(x.targets)
    head, teacher_head = x.head.detach().double().requires_grad_(), x.teacher_head.double()
    loss, by_hidden, by_head = 0.0, [], torch.zeros_like(head)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        hidden = x.hidden.detach()[part].double().requires_grad_()
        here = Inputs(hidden, head, x.teacher_hidden[part].double(), teacher_head, x.targets[part])
        value, gradients = plain(here, which)
        share = len(hidden) / tokens
        loss = loss + value * share
        by_hidden.append(gradients[0] * share)
        by_head.add_(gradients[1], alpha=share)
    return loss, (torch.cat(by_hidden), by_head)


def errors(result: Result, exact: Result) -> measure.Row:
    """Return relative errors of loss and gradients."""
    (loss, gradients), (exact_loss, exact_gradients) = result, exact
    pairs = zip((loss, *gradients), (exact_loss, *exact_gradients), strict=True)
    each = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    return dict(zip(("error_loss", "error_hidden", "error_head"), each, strict=True))


METHODS: dict[str, Callable[..., object]] = {
    "four products": floor,
    "ours": ours,
    "ours, compiled": partial(ours, compiled=True),
    "plain": plain,
    "plain, compiled": plain_compiled,
    "Liger": liger,
    "Liger, 256 rows": partial(liger, rows=256),
}
FLOOR = "four products"


def methods_for(case: Case, compiled: bool) -> list[str]:
    """Return the methods that can compute a case here."""
    names = [name for name in METHODS if compiled or "compiled" not in name]
    if case.which.top_k is not None or importlib.util.find_spec("liger_kernel") is None:
        names = [name for name in names if not name.startswith("Liger")]
    return names


def prepared(case: Case, method: str) -> Callable[[], object]:
    """Return a method with its inputs."""
    return partial(METHODS[method], draw(case), case.which)


def run(case: Case, repeats: int = 5, compiled: bool = False, memory: bool = True) -> list[measure.Row]:
    """Measure all methods on one case; return a row for each."""
    names = methods_for(case, compiled)
    peaks = {name: measure.peak(prepared, case, name) if memory else None for name in names}
    x = draw(case)
    seconds = measure.alternate({name: partial(METHODS[name], x, case.which) for name in names}, repeats)
    exact = reference(x, case.which)
    rows = []
    for name in names:
        row = {"program": "loss", **asdict(case), "method": name, "cpu_s": statistics.median(seconds[name])}
        row |= {"cpu_s_of_rounds": seconds[name], **measure.ratios(seconds[name], seconds[FLOOR])}
        row |= {"peak_mib": peaks[name]} | ({} if name == FLOOR else errors(METHODS[name](x, case.which), exact))
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> list[measure.Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Case.of, nargs="+", default=[Case.of(text) for text in CASES])
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing")
    parser.add_argument("--compile", action="store_true", help="torch.compile of ours and of plain too")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks")
    parser.add_argument("--json", type=Path, help="where the JSON lines go; by default after the tables")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for case in options.case:
        here = run(case, options.repeats, options.compile, not options.no_memory)
        title = f"{case.kind}, {case.tokens} tokens, hidden {case.hidden}, vocabulary {case.vocabulary}"
        shown = [row | {"to_floor_range": "{:.2f} to {:.2f}".format(*row["to_floor_range"])} for row in here]
        measure.print_table(title, shown, COLUMNS)
        rows += here
    measure.write_json(rows, options.json)
    return rows


if __name__ == "__main__":
    main()
