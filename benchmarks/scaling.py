"""How time and memory grow: the loss with tokens and with the vocabulary, SDPO's update with samples per prompt.

fp32, one CPU thread, from the root of the repository, a few minutes::

    python -m benchmarks.scaling
    python -m benchmarks.scaling --parts tokens vocabulary

The loss is the Jensen-Shannon divergence with its gradients, 256 rows at a time, as in loss.py. `rest` is its peak memory above
the inputs less what has to be there: the two gradients, and a chunk's logits of student and teacher. Exponents are slopes of
least-squares fits in log-log scale: 1 is linear, 0 constant.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.loss import Case, draw, ours, plain

ROWS = 256
SIZES = {
    "tokens": [512, 1024, 2048, 4096, 8192],
    "vocabulary": [4096, 8192, 16384, 32768, 65536],
    "samples": [2, 4, 8, 16, 32],
}
HIDDEN, TOKENS, VOCABULARY = 128, 1024, 8192  # where they do not vary
QUESTIONS, PROMPT, REPROMPT, RESPONSE, MICRO_BATCH_TOKENS = 4, 40, 80, 32, 2048
SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048, "max_position_embeddings": 512}
LOSS_COLUMNS = {"cpu_s": ".3f", "peak_mib": ".1f", "gradients_mib": ".1f", "chunk_mib": ".1f", "rest_mib": ".1f"}
LOSS_COLUMNS |= {"plain_peak_mib": ".0f"}
STEP_COLUMNS = {"samples": "", "rows": "", "sampling_cpu_s": ".3f", "update_cpu_s": ".3f"}
STEP_COLUMNS |= {"sampling_peak_mib": ".1f", "update_peak_mib": ".1f"}


def loss_of(case: Case, method: Callable[..., object]) -> Callable[[], object]:
    """Return a loss with its inputs."""
    return partial(method, draw(case), case.which)


def loss_by(what: str, sizes: list[int], repeats: int) -> list[measure.Row]:
    """Measure the loss at growing numbers of tokens, or vocabularies."""
    cases = [Case("jsd", n, HIDDEN, VOCABULARY) if what == "tokens" else Case("jsd", TOKENS, HIDDEN, n) for n in sizes]
    mine = partial(ours, rows=ROWS)
    seconds = measure.alternate({str(case): loss_of(case, mine) for case in cases}, repeats)
    rows = []
    for size, case in zip(sizes, cases, strict=True):
        peak, plain_peak = (measure.peak(loss_of, case, method) for method in (mine, plain))
        gradients = 4 * case.hidden * (case.tokens + case.vocabulary) / measure.MIB
        chunk = 2 * 4 * min(ROWS, case.tokens) * case.vocabulary / measure.MIB
        row = {"program": "scaling", "part": what, what: size, "cpu_s": statistics.median(seconds[str(case)])}
        row |= {"peak_mib": peak, "gradients_mib": gradients, "chunk_mib": chunk, "rest_mib": peak - gradients - chunk}
        rows.append(row | {"plain_peak_mib": plain_peak})
    fixed = f"vocabulary {VOCABULARY}" if what == "tokens" else f"{TOKENS} tokens"
    measure.print_table(f"The loss by {what}: hidden {HIDDEN}, {fixed}", rows, {what: ""} | LOSS_COLUMNS)
    return [*rows, exponents(what, rows, ("cpu_s", "peak_mib", "plain_peak_mib"))]


def exponents(what: str, rows: list[measure.Row], names: tuple[str, ...]) -> measure.Row:
    """Print and return exponents, and what every further unit of size costs."""
    sizes = [row[what] for row in rows]
    summary = {"program": "scaling", "part": f"{what}, exponents"}
    for name in names:
        values = [max(row[name], 1e-9) for row in rows]
        summary[name] = measure.exponent(sizes, values)
        summary[f"{name}_per_1024"] = measure.per_unit(sizes, values) * 1024
        more = f"{summary[f'{name}_per_1024']:.3g} for every 1024 more"
        print(f"- {name} grows with {what} to the power of {summary[name]:.2f}: {more}")
    return summary


def step_of(samples: int) -> dict[str, Callable[[], object]]:
    """Return the two halves of a step: sampling, and the update on rows of the same size."""
    # Imported here, because the loss alone needs no transformers.
    from benchmarks.standalone import Standalone, random_qwen3, synthetic_rows
    from pgpo_lightning.rollout.engine import Sampling
    from pgpo_lightning.rollout.transformers_engine import TransformersEngine
    from pgpo_lightning.training.configs import UpdateConfig

    model = random_qwen3("cpu", torch.float32, **SHAPE)
    policy = Standalone(model, partial(torch.optim.AdamW, lr=1e-5), UpdateConfig(micro_batch_tokens=MICRO_BATCH_TOKENS))
    rows = synthetic_rows(QUESTIONS * samples, PROMPT, REPROMPT, RESPONSE, SHAPE["vocab_size"])
    asked = [row.rollout for row in rows[::samples]]
    questions, prompts = [rollout.question for rollout in asked], [rollout.prompt_ids for rollout in asked]
    sample = partial(
        TransformersEngine().generate, model, policy.tokenizer, questions, prompts, samples, Sampling(RESPONSE)
    )
    return {"sampling": sample, "update": partial(policy.step, rows)}


def half_of(samples: int, half: str) -> Callable[[], object]:
    """Return one of the two."""
    return step_of(samples)[half]


def step_by_samples(samples: list[int], repeats: int) -> list[measure.Row]:
    """Measure sampling and update of a step at growing numbers of samples per prompt."""
    steps = {(each, half): run for each in samples for half, run in step_of(each).items()}
    seconds = measure.alternate(steps, repeats)
    rows = []
    for each in samples:
        row = {"program": "scaling", "part": "samples", "samples": each, "rows": QUESTIONS * each}
        for half in ("sampling", "update"):
            row[f"{half}_cpu_s"] = statistics.median(seconds[each, half])
            row[f"{half}_peak_mib"] = measure.peak(half_of, each, half)
        rows.append(row)
    title = f"SDPO's step by samples per prompt: {QUESTIONS} prompts of {PROMPT} tokens, teacher's {REPROMPT}, {RESPONSE} new"
    measure.print_table(f"{title}, at most {MICRO_BATCH_TOKENS} padded tokens at a time", rows, STEP_COLUMNS)
    return [*rows, exponents("samples", rows, tuple(STEP_COLUMNS)[2:])]


def main(arguments: list[str] | None = None) -> list[measure.Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="+", help="of every part, instead of its own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the JSON lines go; by default after the tables")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if "samples" in options.parts:
        measure.PRELOAD.extend(("transformers", "lightning"))
    rows = []
    for part in options.parts:
        sizes = options.sizes or SIZES[part]
        by_samples = part == "samples"
        rows += step_by_samples(sizes, options.repeats) if by_samples else loss_by(part, sizes, options.repeats)
    measure.write_json(rows, options.json)
    return rows


if __name__ == "__main__":
    main()
