"""Bias and spread of the information estimators, and what they make of the multiplier.

On a source whose mutual information is known, and on the toy model's own rollouts; ``docs/theory.md`` says what follows.
"""

import math
from typing import Annotated, Any, get_args

import numpy as np
import torch

from benchmarks.theory.command import run, write_note
from benchmarks.theory.estimator_batches import (
    arranged,
    design_effect,
    draw_batches,
    relative_spread,
    sequences_for,
)
from benchmarks.theory.estimator_figures import draw
from benchmarks.theory.estimator_report import markdown, summary
from benchmarks.theory.estimator_source import PAIRINGS, STUDENTS, Array, Pairing, Source, Student
from benchmarks.theory.estimator_toy import Bank, toy_bank
from benchmarks.theory.estimator_views import View, sequence_statistics, token_statistics, views
from benchmarks.theory.multiplier_law import multiplier_law
from pgpo_lightning.core.files import output_folder
from pgpo_lightning.core.settings import Count, Filled, LowerBound, Positive, Range, Seed, Text, UpperBound, checked
from pgpo_lightning.losses.information import Estimator
from pgpo_lightning.losses.step_statistics import StepStatistics

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
LOGIT = 10.0  # added to log-probabilities: the size of a language model's logits decides what rounding does to them
ERRORS = 1.96  # standard errors of a 95 % interval
_REFERENCE = 32  # questions of a step in the paper's experiments


Pair = Annotated[int, Range(least=2)]


@checked
def estimator(
    output: Text = "estimator",
    source: Source = Source(),  # noqa: B008
    lengths: Annotated[list[Count], Filled()] = [4, 8, 16, 32, 64],  # noqa: B006  (shown by --help, never changed)
    source_length: Count = 32,
    sequences: Pair = 4096,
    questions: Count = 512,
    siblings: Pair = 8,
    toy_lengths: Annotated[list[Count], Filled()] = [1, 2, 4, 8, 16, 32],  # noqa: B006
    batches: Annotated[list[Pair], Filled()] = [4, 8, 16, 32, 64, 128],  # noqa: B006
    top_k: list[Count] = [100, 20, 5],  # noqa: B006
    sensitivities: Annotated[list[Positive], Filled()] = [0.5, 1.0, 1.5, 8.0],  # noqa: B006
    rho_min: LowerBound = 1.0,
    rho_max: UpperBound = 2.0,
    spread: Positive = 0.01,
    draws: Pair = 4000,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Measure bias and spread of the information estimators and of the multiplier made from them.

    Args:
        output: The folder to write ``estimator.md``, ``estimator.json`` and ``estimator.png`` into; what is there is written
            over.
        source: The source with known mutual information.
        lengths: Response lengths on the source (tokens).
        source_length: Response length there where another thing is varied.
        sequences: Simulated responses there.
        questions: Questions of the toy task whose rollouts make the bank; all that it has, if it has fewer.
        siblings: Rollouts per question, at least 2: a rollout is taught by a sibling.
        toy_lengths: Tokens from the start of a response that the estimate is made of, on the toy.
        batches: Questions per batch.
        top_k: Numbers of kept tokens, each with a tail and renormalised; left out where the vocabulary has no more.
        sensitivities: PGPO's alpha.
        rho_min: Lower bound of rho.
        rho_max: Upper bound of rho.
        spread: Wanted relative standard deviation of rho over batches.
        draws: Batches drawn per size.
        seed: Seed of all random draws.

    Returns:
        What ``estimator.json`` holds.

    Raises:
        ValueError: If a setting is out of range; names the field.
        FileExistsError: If `output` is a file.
    """
    folder = output_folder(output)
    _check(source)
    if rho_min > rho_max:
        raise ValueError(f"Expected `rho_min` to be at most `rho_max` ({rho_max:g}), but got {rho_min:g}.")
    bounds = rho_min, rho_max
    bank = toy_bank(questions, siblings, seed, views(top_k))
    tables = _tables(sequence_statistics(bank.tokens[View()], bank.lengths), bank)
    content = {
        "length": source_length,
        "siblings": siblings,
        "spread": spread,
        "bounds": list(bounds),
        "students": _students(source, source_length),
        "source_lengths": [_source_length(source, length, sequences, seed) for length in lengths],
        "source_batches": _source_batches(
            source, source_length, sequences, [n * siblings for n in batches], draws, seed
        ),
        "source_views": _source_views(source, source_length, sequences, top_k, seed),
        "toy": {"questions": bank.questions, "sequences": len(bank.lengths), "estimators": _population(tables)},
        "toy_lengths": [_toy_length(bank, first) for first in toy_lengths],
        "toy_batches": [row for name in ESTIMATORS for row in _toy_batches(name, tables[name], batches, draws, seed)],
        "toy_siblings": _toy_siblings(tables["entropy-difference"], siblings, draws, seed),
        "toy_views": _toy_views(bank),
        "multiplier": [
            _multiplier(name, tables[name], alpha, bounds, spread, draws, seed)
            for name in ESTIMATORS
            for alpha in sensitivities
        ],
    }
    plain = write_note(folder, "estimator", markdown(content), content, lambda file: draw(content, file))
    print(f"{summary(content)}\n\nreport: {folder / 'estimator.md'}")
    return plain


def _check(source: Source) -> None:
    if len(source.chances) < 2 or not all(0 < p < 1 for p in source.chances):
        raise ValueError(
            f"Expected `source.chances` to be at least two numbers between 0 and 1, but got {source.chances}."
        )
    if source.vocabulary < 2 or source.vocabulary % 2:
        raise ValueError(f"Expected `source.vocabulary` to be an even number, at least 2, but got {source.vocabulary}.")


def per_sequence(statistics: StepStatistics) -> dict[Estimator, torch.Tensor]:
    """Return what each estimator averages over sequences (nats per token), ``(sequences,)`` each."""
    return {
        "entropy-difference": statistics.entropy_student - statistics.entropy_teacher,
        "kl": statistics.kl,
        "log-ratio": statistics.log_ratio,
    }


# ------------------------------------------------------------------------------------------------- the known source


def _students(source: Source, length: int) -> list[dict[str, Any]]:
    truth = source.mutual_information(length) / length
    return [
        {"student": name, "pairing": pairing, "truth": truth, **source.expectations(who, pairing, length)._asdict()}
        for pairing in PAIRINGS
        for name, who in STUDENTS.items()
    ]


def _simulated(
    source: Source, who: Student, pairing: Pairing, length: int, sequences: int, seed: int, view: View
) -> dict[Estimator, Array]:
    """Return estimates of single sequences, ``(sequences,)`` each, through the library's own code."""
    sample = source.sample(who, pairing, length, sequences, seed)
    # What a softmax takes away, and rounding does not: without it the few different values would all be rounded alike.
    offsets = LOGIT + 2 * torch.rand(2, len(sample.tokens), 1, generator=torch.Generator().manual_seed(seed)) - 1
    tokens = token_statistics(sample.student + offsets[0], sample.teacher + offsets[1], sample.tokens, view)
    rows = per_sequence(sequence_statistics(tokens, torch.full((sequences,), length)))
    return {name: values.double().numpy() for name, values in rows.items()}


def _mean(values: Array) -> dict[str, float]:
    error = values.std(ddof=1) / math.sqrt(len(values))
    return {"value": values.mean(), "low": values.mean() - ERRORS * error, "high": values.mean() + ERRORS * error}


def _source_length(source: Source, length: int, sequences: int, seed: int) -> dict[str, Any]:
    found = _simulated(source, STUDENTS["calibrated"], "own", length, sequences, seed, View())
    row: dict[str, Any] = {"length": length, "truth": source.mutual_information(length) / length}
    for name, values in found.items():
        row[name] = _mean(values) | {"deviation": values.std(ddof=1)}
    return row


def _source_batches(
    source: Source, length: int, sequences: int, sizes: list[int], draws: int, seed: int
) -> list[dict[str, Any]]:
    found = _simulated(source, STUDENTS["calibrated"], "own", length, sequences, seed, View())
    rows = []
    for name, values in found.items():
        table = values[:, None]  # every sequence a question of its own
        for size in sizes:
            drawn = draw_batches(table, size, draws, seed)
            row = {"estimator": name, "sequences": size, "spread": drawn.spread}
            rows.append(row | {"calibration": drawn.calibration(drawn.naive)})
    return rows


def _source_views(source: Source, length: int, sequences: int, top_k: list[int], seed: int) -> list[dict[str, Any]]:
    looks = [view for view in views(top_k) if view.top_k is None or view.top_k < source.vocabulary]
    whole = None
    rows = []
    for view in looks:
        found = _simulated(source, STUDENTS["calibrated"], "own", length, sequences, seed, view)
        whole = whole or found
        rows.append(_seen(view, found, whole, lambda values: _mean(values)))
    return rows


def _seen(view: View, found: dict[Estimator, Any], whole: dict[Estimator, Any], mean: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"view": view.name}
    for name in ESTIMATORS:
        row[name] = {"value": mean(found[name])["value"], "change": mean(found[name] - whole[name])}
    return row


# ----------------------------------------------------------------------------------------------------------- the toy


def _tables(statistics: StepStatistics, bank: Bank) -> dict[Estimator, Array]:
    """Return estimates of single rollouts, ``(questions, siblings)`` each."""
    rows = per_sequence(statistics).items()
    question = bank.question.numpy()
    return {name: arranged(values.double().numpy(), question, bank.questions) for name, values in rows}


def _clustered_mean(table: Array) -> dict[str, float]:
    """Return the mean over rollouts with a 95 % interval over questions."""
    by_question = np.nansum(table, axis=1)
    count = (~np.isnan(table)).sum(axis=1)
    value = by_question.sum() / count.sum()
    residual = (by_question - value * count)[count > 0]
    n = max(2, len(residual))
    error = math.sqrt((residual**2).sum() * n / (n - 1)) / count.sum()
    return {"value": value, "low": value - ERRORS * error, "high": value + ERRORS * error}


def _population(tables: dict[Estimator, Array]) -> list[dict[str, Any]]:
    rows = []
    for name, table in tables.items():
        effect, low, high = design_effect(table)
        told = {"value": effect, "low": low, "high": high}
        rows.append(
            {
                "estimator": name,
                **_clustered_mean(table),
                "deviation": float(np.nanstd(table, ddof=1)),
                "design_effect": told,
            }
        )
    return rows


def _toy_length(bank: Bank, first: int) -> dict[str, Any]:
    tables = _tables(sequence_statistics(bank.tokens[View()], bank.lengths, first), bank)
    row: dict[str, Any] = {"length": first, "mean_length": bank.lengths.clamp(max=first).float().mean().item()}
    return row | {
        name: _clustered_mean(table) | {"deviation": float(np.nanstd(table, ddof=1))} for name, table in tables.items()
    }


def _toy_batches(name: Estimator, table: Array, sizes: list[int], draws: int, seed: int) -> list[dict[str, Any]]:
    truth = np.nanmean(table)
    rows = []
    for size in sizes:
        drawn = draw_batches(table, size, draws, seed)
        row = {"estimator": name, "questions": size, "sequences": drawn.sequences, "spread": drawn.spread}
        row |= {"bias": float(drawn.values.mean() - truth)}
        row |= {"calibration": drawn.calibration(drawn.naive), "coverage": drawn.coverage(drawn.naive, truth)}
        row |= {
            "clustered": drawn.calibration(drawn.clustered),
            "clustered_coverage": drawn.coverage(drawn.clustered, truth),
        }
        rows.append(row)
    return rows


def _toy_siblings(table: Array, siblings: int, draws: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    each = siblings
    while each >= 1:
        drawn = draw_batches(table, _REFERENCE * siblings // each, draws, seed, each)
        row = {"questions": drawn.questions, "siblings": each, "sequences": drawn.sequences, "spread": drawn.spread}
        rows.append(row | {"calibration": drawn.calibration(drawn.naive)})
        each //= 2
    return rows


def _toy_views(bank: Bank) -> list[dict[str, Any]]:
    whole = _tables(sequence_statistics(bank.tokens[View()], bank.lengths), bank)
    return [
        _seen(view, _tables(sequence_statistics(tokens, bank.lengths), bank), whole, _clustered_mean)
        for view, tokens in bank.tokens.items()
    ]


def _multiplier(
    name: Estimator,
    table: Array,
    alpha: float,
    bounds: tuple[float, float],
    spread: float,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Return bias and spread of rho at the paper's batch, and the sequences that a wanted spread takes."""
    make = lambda values: np.clip(np.exp(alpha * values), *bounds)  # noqa: E731
    per_question = float((~np.isnan(table)).sum() / len(table))
    truth = float(np.nanmean(table))
    drawn = draw_batches(table, _REFERENCE, draws, seed)
    rho = make(drawn.values)
    at = float(make(np.array(truth)))
    free = bounds[0] < at < bounds[1]
    # The mean of I is known, so what it was off by in these draws can be taken away to first order.
    curved = rho - at - free * alpha * at * (drawn.values - truth)
    needed = sequences_for(table, alpha, spread)
    asked = max(2, math.ceil(needed / per_question))
    there = draw_batches(table, asked, max(200, draws // 10), seed + 1)
    return {
        "estimator": name,
        "sensitivity": alpha,
        "rho": at,
        "bias": float(curved.mean()),
        "bias_error": float(curved.std(ddof=1) / math.sqrt(len(curved))),
        "bias_normal": multiplier_law(truth, drawn.spread, alpha, *bounds).mean - at,
        "relative": relative_spread(rho),
        "needed": needed if free else None,  # at a bound rho does not move
        "needed_questions": asked,
        "there": relative_spread(make(there.values)),
    }


if __name__ == "__main__":
    run(estimator)
