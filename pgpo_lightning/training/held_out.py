"""Scores of held-out answers: from one JSON line per question to scores with standard errors, and one file of answers."""

import heapq
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from pgpo_lightning.core.files import replacing
from pgpo_lightning.core.identity import joint_sha256, question_sha256
from pgpo_lightning.core.texts import json_line
from pgpo_lightning.core.types import Question, Rollout, Verdict
from pgpo_lightning.training.at_k import AvgAtK, CutOffFraction, MajorityAtK, MeanLength, PassAtK, PerQuestionMean


@dataclass
class HeldOut:
    """The scores of one evaluation.

    Attributes:
        scores: Scores by name: `avg`, `pass`, `maj` (only if there were answers to vote on), `length` (tokens), `cut_off`,
            `solution_probability` (only with `evaluation.solution_column`).
        errors: Standard errors of the scores, clustered by question; NaN for a single question.
        questions: Number of questions.
        sha256: Hash of the questions in their order, see :func:`~pgpo_lightning.core.identity.joint_sha256`.
        path: File of the answers, if they were written.
    """

    scores: dict[str, float]
    errors: dict[str, float]
    questions: int
    sha256: str
    path: Path | None = None


SCORES = ("avg", "pass", "maj")
"""Scores that are named ``name@k``."""

SOLUTION = "solution_probability"
"""The score and the field of a question's result for `evaluation.solution_column`."""

WITH_ERRORS = (*SCORES, SOLUTION)
"""Scores that are reported with their standard error."""


def score_name(name: str, k: int) -> str:
    """Return the name of a score of k samples per question.

    Example:
        >>> score_name("avg", 8), score_name("length", 8)
        ('avg@8', 'length')
    """
    return f"{name}@{k}" if name in SCORES else name


def summary_line(held_out: HeldOut, k: int) -> str:
    """Return the scores as a line of text.

    Example:
        >>> summary_line(HeldOut({"avg": 0.5, "pass": 1.0, "length": 21.0}, {"avg": 0.04, "pass": 0.0, "length": 1.0}, 9, ""), 8)
        'avg@8 0.500 ± 0.040, pass@8 1.000 ± 0.000 (9 questions)'
    """
    scores = [
        f"{score_name(n, k).replace('_', ' ')} {held_out.scores[n]:.3f} ± {held_out.errors[n]:.3f}"
        for n in WITH_ERRORS
        if n in held_out.scores
    ]
    return f"{', '.join(scores)} ({held_out.questions} questions)"


def result_line(
    question: Question, rollouts: list[Rollout], verdicts: list[Verdict], solution_probability: float | None = None
) -> bytes:
    """Return one question's results as a line of JSON, in UTF-8."""
    rewards = [verdict.reward for verdict in verdicts]
    result = {
        "index": question.index,
        "source": question.source,
        "sha256": question_sha256(question),
        "prompt": question.prompt,
        "gold": question.answer,
        "avg": sum(rewards) / len(rewards),
        **({} if solution_probability is None else {SOLUTION: float(f"{solution_probability:.6g}")}),
        "rewards": rewards,
        "answers": [verdict.answer for verdict in verdicts],
        "lengths": [len(rollout.response_ids) for rollout in rollouts],
        "finished": [rollout.finished for rollout in rollouts],
        "responses": [rollout.text for rollout in rollouts],
    }
    return json_line(result).encode()


def score(
    parts: list[Iterator[bytes]],
    k: int,
    threshold: float,
    file: Path | None = None,
    name: Callable[[HeldOut], Path] | None = None,
) -> HeldOut:
    """Score the results of all ranks, and write them in the order of the questions.

    A question that several ranks received, as padding, counts once.

    Args:
        parts: Lines of :func:`result_line` of each rank, in the order of their `index`.
        k: Number of attempts of pass@k.
        threshold: Rewards of at least this value pass.
        file: Destination of the lines, written atomically; ``None`` writes none.
        name: Returns another name of the file, given the scores.

    Raises:
        ValueError: If two different questions have the same `index`.
    """
    # One process has all samples, so the metrics need no synchronisation.
    metrics: dict[str, PerQuestionMean] = {
        "avg": AvgAtK(sync_on_compute=False),
        "pass": PassAtK(k, threshold, sync_on_compute=False),
        "maj": MajorityAtK(sync_on_compute=False),
        "length": MeanLength(sync_on_compute=False),
        "cut_off": CutOffFraction(sync_on_compute=False),
    }
    hashes, voted, exact = [], False, PerQuestionMean(sync_on_compute=False)
    with nullcontext() if file is None else replacing(file) as out:
        for result in _each_once(parts, None if out is None else out.stream):
            _update(metrics, result)
            if SOLUTION in result:
                metrics[SOLUTION] = exact
                exact.update(torch.tensor([result["index"]]), torch.tensor([result[SOLUTION]], dtype=torch.float32))
            hashes.append(result["sha256"])
            voted |= any(answer is not None for answer in result["answers"])
        if not voted:  # without votes the majority is undefined, not zero
            del metrics["maj"]
        found = HeldOut(
            {name: float(metric.compute()) for name, metric in metrics.items()},
            {name: float(metric.standard_error()) for name, metric in metrics.items()},
            len(hashes),
            joint_sha256(hashes),
            file,
        )
        if out is not None and name is not None:
            found.path = out.path = name(found)
    return found


def _each_once(parts: list[Iterator[bytes]], out: IO[bytes] | None) -> Iterator[dict[str, Any]]:
    def read(part: Iterator[bytes]) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        for line in part:
            result = json.loads(line)
            yield result["index"], line, result

    last: dict[str, Any] | None = None
    for index, line, result in heapq.merge(*map(read, parts), key=lambda item: item[0]):
        if last is not None and last["index"] == index:
            if last["sha256"] != result["sha256"]:
                raise ValueError(
                    f"Expected held-out questions with different `index`, but {last['source'] or last['prompt']!r} and "
                    f"{result['source'] or result['prompt']!r} both have {index}. Number them."
                )
            continue
        last = result
        if out is not None:
            out.write(line + b"\n")
        yield result


def _update(metrics: dict[str, PerQuestionMean], result: dict[str, Any]) -> None:
    index = torch.full((len(result["rewards"]),), result["index"])
    # The default dtype is bf16 under Lightning's bf16-true, in which a length of 301 would be 300.
    reward, length, cut_off = (
        torch.tensor(values, dtype=torch.float32)
        for values in (result["rewards"], result["lengths"], [not finished for finished in result["finished"]])
    )
    metrics["avg"].update(index, reward)
    metrics["pass"].update(index, reward)
    metrics["maj"].update(index, reward, result["answers"])  # type: ignore[call-arg]
    metrics["length"].update(index, length)
    metrics["cut_off"].update(index, cut_off)
