"""Reward functions of TRL as a verifier, as they are.

The calling convention is that of TRL 1.x (`GRPOTrainer`, `SDPOTrainer`): ``func(prompts=..., completions=..., completion_ids=...,
**columns)`` returns one number or None for each completion.
"""

import asyncio
import importlib
import inspect
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pgpo_lightning.core.settings import checked
from pgpo_lightning.core.texts import shown
from pgpo_lightning.core.types import Question, Rollout, Verdict
from pgpo_lightning.rewards.event_loop import run_coroutine
from pgpo_lightning.rewards.grade import where

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a function gets beside the columns of the data."""


@checked
class TRLReward:
    """The weighted sum of TRL's reward functions, called once per step with all responses of this rank.

    A function gets as keyword arguments ``prompts`` (texts, or chat messages where the row has messages), ``completions`` (texts,
    or ``[{"role": "assistant", "content": text}]``), ``completion_ids`` (token ids, the end token included), and every column of
    the data as a list. Without ``**kwargs`` it gets those that it names. ``trainer_state`` has ``global_step`` (batches trained
    on) alone, ``log_metric(name, value)`` makes the curve ``rewards/<name>``, ``log_extra`` has no effect. An ``async def``
    runs at the same time as the others. Reward models (``torch.nn.Module``) are not supported: call them in a function.

    A function returns one reward per completion; None (or NaN) leaves it out of the sum. Beyond TRL, it may return
    ``(reward, feedback)`` in place of a reward: text for the self-teacher of this response. Functions written for TRL give no
    feedback, so SDPO then learns from successful siblings and ``privileged_context``. Each function has a curve
    ``rewards/<name>/mean``. What counts as a success is decided by the sum: see `reward.success_threshold`.

    Args:
        funcs: A reward function, or several, by their import paths. An object with ``__call__`` has one too.
        weights: Weight of each function; null for 1 each.

    Raises:
        ValueError: If there is no function, another number of weights, a reward model, or nothing at an import path.
    """

    def __init__(self, funcs: Any, weights: list[float] | None = None) -> None:
        given = list(funcs) if isinstance(funcs, (list, tuple)) else [funcs]
        if not given:
            raise ValueError("Expected at least one function in `funcs`, but got none.")
        for func in given:
            if not (isinstance(func, str) or callable(func)):
                raise ValueError(
                    f"Expected `funcs` to be functions or their import paths, but got {shown(func, longest=100)}."
                )
        if weights is not None and len(weights) != len(given):
            raise ValueError(
                f"Expected one of `weights` for each of {len(given)} functions in `funcs`, but got {len(weights)}."
            )
        self.funcs = [_imported(func) if isinstance(func, str) else func for func in given]
        for func in self.funcs:
            if isinstance(func, torch.nn.Module):
                raise ValueError(
                    f"Expected functions in `funcs`, but got the model {type(func).__name__}. Call it in a function that returns "
                    "its rewards."
                )
        self.weights = [1.0] * len(self.funcs) if weights is None else [float(weight) for weight in weights]
        self.names = _names(self.funcs)

    def check_question(self, question: Question) -> None:
        """Raise if the row lacks a column that a function needs.

        Raises:
            ValueError: Names the row, the function and the column.
        """
        columns = _columns(question)
        for func, name in zip(self.funcs, self.names, strict=True):
            for parameter in _parameters(func):
                required = parameter.default is parameter.empty and parameter.kind in (
                    parameter.POSITIONAL_OR_KEYWORD,
                    parameter.KEYWORD_ONLY,
                )
                if required and parameter.name not in (*GIVEN, *columns):
                    raise ValueError(
                        f"Expected {where(question)} to have the column `{parameter.name}`, which the reward function {name} "
                        f"needs, but it has {', '.join(columns) or 'none beside the prompt'}. Add it to the data, or rename the "
                        "argument."
                    )

    def grade_batch(self, rollouts: list[Rollout], step: int) -> list[Verdict | Exception]:
        """Return one verdict per rollout, or why there is none; see the class.

        Args:
            rollouts: Of this rank.
            step: Batches trained on so far.

        Raises:
            RuntimeError: If a function raises, or returns another number of rewards than completions; names it.
        """
        questions = [rollout.question for rollout in rollouts]
        given = _inputs(questions, [rollout.text for rollout in rollouts])
        given["completion_ids"] = [list(rollout.response_ids) for rollout in rollouts]
        return self._verdicts(questions, given, step)

    def __call__(self, question: Question, response: str) -> Verdict:
        """Grade a text without token ids, such as a worked solution.

        Raises:
            RuntimeError: See :meth:`grade_batch`.
            ValueError: If a function needs `completion_ids`, which it names, or if all return None.
        """
        for func, name in zip(self.funcs, self.names, strict=True):
            if any(parameter.name == "completion_ids" for parameter in _parameters(func)):
                raise ValueError(
                    f"Expected a response with token ids for the reward function {name}, but got a text alone"
                )
        (verdict,) = self._verdicts([question], _inputs([question], [response]), 0)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def _verdicts(self, questions: list[Question], given: dict[str, Any], step: int) -> list[Verdict | Exception]:
        from transformers import TrainerState  # here, because it loads peft and more

        metrics: dict[str, float] = {}

        def log_metric(name: str, value: float) -> None:
            metrics[name] = float(value)

        given |= {
            "trainer_state": TrainerState(global_step=step),
            "log_extra": lambda column, values: None,
            "log_metric": log_metric,
        }
        table = self._table(given, len(questions))
        return [
            self._verdict(question, [column[row] for column in table], metrics)
            for row, question in enumerate(questions)
        ]

    def _verdict(self, question: Question, returned: list[Any], metrics: dict[str, float]) -> Verdict | Exception:
        try:
            rewards = [_reward(value) for value in returned]
        except (TypeError, ValueError) as error:
            return error
        known = [i for i, (reward, _) in enumerate(rewards) if not math.isnan(reward)]
        if not known:
            return ValueError("all reward functions returned None. Remove the row, or set `reward.on_error` to zero")
        total = sum(self.weights[i] * rewards[i][0] for i in known)
        feedback = "\n\n".join(text for _, text in rewards if text)
        curves = {f"{self.names[i]}/mean": rewards[i][0] for i in known if math.isfinite(rewards[i][0])}
        return Verdict(total, feedback or None, curves=curves | metrics)

    def _table(self, given: dict[str, Any], count: int) -> list[list[Any]]:
        """Return what the functions return, one list each: plain ones are called first, then asynchronous ones together."""
        table: list[Any] = [None] * len(self.funcs)
        later = []
        for place, (func, name) in enumerate(zip(self.funcs, self.names, strict=True)):
            try:
                table[place] = returned = func(**_accepted(func, given))
            except Exception as error:
                raise _failure(name, error) from error
            if inspect.isawaitable(returned):
                later.append((place, name, returned))

        async def awaited(place: int, name: str, returned: Any) -> None:
            try:
                table[place] = await returned
            except Exception as error:
                raise _failure(name, error) from error

        async def everyone() -> None:
            await asyncio.gather(*(awaited(*each) for each in later))

        if later:
            run_coroutine(everyone())
        for place, name in enumerate(self.names):
            try:
                table[place] = list(table[place])
            except TypeError as error:
                raise _failure(name, error) from error
            if len(table[place]) != count:
                raise RuntimeError(
                    f"Expected the reward function {name} to return {count} rewards, one per completion, but got "
                    f"{len(table[place])}"
                )
        return table


def _imported(path: str) -> Callable[..., Any]:
    """Return what an import path names. Not left to the command line, which would write no path to ``config.yaml``."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected the import path of a function in `funcs`, such as my_rewards.accuracy, but got {path}: {error}."
        ) from error
    if not callable(found):
        raise ValueError(f"Expected a function at {path} in `funcs`, but it is of the class {type(found).__name__}.")
    return found


def _failure(name: str, error: Exception) -> RuntimeError:
    return RuntimeError(f"the reward function {name} raised {type(error).__name__}: {error}")


def _names(funcs: list[Callable[..., Any]]) -> list[str]:
    """Return a name for each function, as TRL's curves have; a number follows where one occurs again."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for func in funcs:
        inner = func
        while isinstance(inner, partial):
            inner = inner.func
        name = getattr(inner, "__name__", type(inner).__name__)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def _parameters(func: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):  # of some functions written in C
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _accepted(func: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    parameters = _parameters(func)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(given)
    return {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}


def _columns(question: Question) -> dict[str, Any]:
    """Return the columns of a row beside its prompt; where the data kept none, what a question has of them."""
    own = {"answer": question.answer, "system": question.system, "privileged_context": question.privileged_context}
    return {name: value for name, value in own.items() if value is not None} | question.columns


def _inputs(questions: list[Question], texts: list[str]) -> dict[str, Any]:
    rows = [_columns(question) for question in questions]
    names = dict.fromkeys(name for row in rows for name in row)
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names if name not in GIVEN}
    return columns | {
        "prompts": [question.prompt for question in questions],
        "completions": [
            text if isinstance(question.prompt, str) else [{"role": "assistant", "content": text}]
            for question, text in zip(questions, texts, strict=True)
        ],
    }


def _reward(value: Any) -> tuple[float, str | None]:
    """Return a reward, not a number for none, and feedback."""
    feedback = None
    if isinstance(value, tuple):
        value, feedback = value
        if feedback is not None and not isinstance(feedback, str):
            raise TypeError(f"Expected feedback to be a text or None, but got {type(feedback).__name__}")
    return math.nan if value is None else float(value), feedback
