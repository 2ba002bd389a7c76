"""Verifier of tool calls in the format of SDPO's tool-use task (ToolAlpaca): ``Action:`` and ``Action Input:``."""

import json
import re
from collections import Counter
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from pgpo_lightning.core.settings import checked
from pgpo_lightning.core.texts import shown
from pgpo_lightning.core.types import Question, Verdict
from pgpo_lightning.rewards.grade import where

Call: TypeAlias = tuple[str, Any]
"""Name of a tool and its arguments: an object, or None if they could not be read."""

_ACTION = re.compile(r"^[ \t]*Action:[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_INPUT = re.compile(r"^[ \t]*Action Input:[ \t]*", re.MULTILINE)
_NAME = re.compile(r"`?\"?([\w.-]+)\"?`?(?:\(\))?")


@checked
class ToolUse:
    r"""Compare the tool calls of a response with those of ``question.answer``: 1.0 if they are the same, else 0.0.

    The answer is a list of ``{"Action": name, "Action_Input": arguments}``, or its JSON text; the arguments are an object, or its
    JSON text.

    Args:
        variant: ``strict`` reads each call as a name and one JSON object, and compares whole calls: names, and arguments by value
            and type. ``reference`` is the grader of the SDPO repository with its faults: an input ends at the first closing
            brace, so nested arguments are never right; the arguments of all calls are merged; what is no JSON is left out.
        ordered: Whether ``strict`` compares calls in their order. If false, in any order.
        feedback: What the teacher reads about a failed attempt: ``parts`` says what is wrong without gold values; ``none``;
            ``gold``, as in the SDPO repository, contains the gold answer.

    Raises:
        ValueError: If settings contradict each other, or, when called, if the gold answer is not a list of calls.

    Example:
        >>> question = Question("Weather?", '[{"Action": "weather", "Action_Input": {"city": "Bern"}}]')
        >>> ToolUse()(question, 'Action: weather\nAction Input: {"city": "Basel"}').feedback
        'Call 1: the value of the argument `city` of `weather` is wrong.'
    """

    def __init__(
        self,
        variant: Literal["strict", "reference"] = "strict",
        ordered: bool = False,
        feedback: Literal["none", "parts", "gold"] = "parts",
    ) -> None:
        if ordered and variant == "reference":
            raise ValueError(
                "Expected `ordered` false with `variant` reference, which compares calls in any order, but got true."
            )
        self.variant, self.ordered, self.feedback = variant, ordered, feedback

    def check_question(self, question: Question) -> None:
        """Raise if the gold answer is not a list of tool calls.

        Raises:
            ValueError: Names the row.
        """
        _gold(question)

    def __call__(self, question: Question, response: str) -> Verdict:
        """Grade one response."""
        gold = _gold(question)
        if self.variant == "reference":
            return self._reference(gold, response)
        calls = _calls(response)
        problems = _in_order(gold, calls) if self.ordered else _in_any_order(gold, calls)
        answer = json.dumps(calls if self.ordered else sorted(calls, key=repr), sort_keys=True) if calls else None
        if not problems:
            return Verdict(1.0, answer=answer)
        said = _reference_text(gold, calls) if self.feedback == "gold" else "\n".join(problems)
        return Verdict(0.0, None if self.feedback == "none" else _encodable(said), _encodable(answer))

    def _reference(self, gold: list[Call], response: str) -> Verdict:
        names = re.findall(r"Action:\s*(\w+)", response)
        merged = _merged(_whole_object(text) for text in re.findall(r"Action Input:\s*({.*?})", response, re.DOTALL))
        names_right = Counter(names) == Counter(name for name, _ in gold)
        inputs_right = merged == _merged(arguments for _, arguments in gold)
        answer = _encodable(repr((sorted(names), merged))) if names or merged else None
        if names_right and inputs_right:
            return Verdict(1.0, answer=answer)
        said = [
            *["The called tools are wrong."] * (not names_right),
            *["The arguments are wrong."] * (not inputs_right),
        ]
        text = _gold_text(names, merged, gold) if self.feedback == "gold" else " ".join(said)
        return Verdict(0.0, None if self.feedback == "none" else _encodable(text), answer)


def _gold(question: Question) -> list[Call]:
    try:
        return _parsed(question.answer) if isinstance(question.answer, str) else _read(question.answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected the answer of {where(question)} to be a list of objects with `Action` and `Action_Input`, but got "
            f"{shown(question.answer, longest=100)} ({error}). Correct the row."
        ) from error


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Call]:
    return _read(json.loads(text))


def _read(value: Any) -> list[Call]:
    if not isinstance(value, list) or not value:
        raise ValueError("it is no list of calls")
    calls = []
    for each in value:
        if not isinstance(each, dict) or not isinstance(each.get("Action"), str):
            raise ValueError("a call has no `Action`")
        arguments = each.get("Action_Input")
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            raise ValueError("an `Action_Input` is no object")
        calls.append((each["Action"], arguments))
    return calls


def _calls(response: str) -> list[Call]:
    """Return the calls of a response: each ``Action:`` with the object after the ``Action Input:`` that follows it."""
    actions = list(_ACTION.finditer(response))
    calls: list[Call] = []
    for i, action in enumerate(actions):
        end = actions[i + 1].start() if i + 1 < len(actions) else len(response)
        name = _NAME.fullmatch(action[1])
        given = _INPUT.search(response, action.end(), end)
        calls.append((name[1] if name else action[1], _object(response[given.end() : end]) if given else None))
    return calls


def _object(text: str) -> dict[str, Any] | None:
    """Return the JSON object with which a text starts."""
    text = re.sub(r"^\s*(?:```(?:json)?\s*)?", "", text)
    try:
        value = json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _whole_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _same(gold: Any, value: Any) -> bool:
    """Return whether two JSON values are equal, types included; ``1`` and ``1.0`` are."""
    if isinstance(gold, dict) and isinstance(value, dict):
        return gold.keys() == value.keys() and all(_same(each, value[name]) for name, each in gold.items())
    if isinstance(gold, list) and isinstance(value, list):
        return len(gold) == len(value) and all(_same(a, b) for a, b in zip(gold, value, strict=True))
    return isinstance(gold, bool) == isinstance(value, bool) and gold == value


def _in_order(gold: list[Call], calls: list[Call]) -> list[str]:
    if len(gold) != len(calls):
        return [_number(gold, calls)]
    pairs = zip(gold, calls, strict=True)
    return [text for i, (wanted, call) in enumerate(pairs, 1) if (text := _difference(wanted, call, i))]


def _in_any_order(gold: list[Call], calls: list[Call]) -> list[str]:
    left = list(gold)
    wrong: list[tuple[int, Call]] = []
    for i, call in enumerate(calls, 1):
        match = next((each for each in left if each[0] == call[0] and _same(each[1], call[1])), None)
        if match is not None:
            left.remove(match)
        else:
            wrong.append((i, call))
    if len(gold) != len(calls):
        return [_number(gold, calls)]
    problems = []
    for i, call in wrong:  # beside a call of the same tool, if one is left
        wanted = next((each for each in left if each[0] == call[0]), left[0])
        left.remove(wanted)
        problems.append(_difference(wanted, call, i))
    return problems


def _number(gold: list[Call], calls: list[Call]) -> str:
    if not calls:
        return "No tool was called. Write `Action:` with the name of a tool, and `Action Input:` with a JSON object."
    return f"The number of calls is wrong: {len(calls)}, which is too {'few' if len(calls) < len(gold) else 'many'}."


def _difference(wanted: Call, call: Call, number: int) -> str:
    """Return what is wrong with a call, without a gold value."""
    name, arguments = call
    if name != wanted[0]:
        return f"Call {number}: `{name}` is not the tool to call."
    if arguments is None:
        return f"Call {number}: the `Action Input` of `{name}` is no JSON object."
    if unknown := sorted(arguments.keys() - wanted[1].keys()):
        return f"Call {number}: the argument `{unknown[0]}` of `{name}` is not needed."
    if wanted[1].keys() - arguments.keys():
        return f"Call {number}: an argument of `{name}` is missing."
    wrong = sorted(key for key, value in wanted[1].items() if not _same(value, arguments[key]))
    return f"Call {number}: the value of the argument `{wrong[0]}` of `{name}` is wrong." if wrong else ""


def _merged(inputs: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for each in inputs:
        merged.update(each or {})
    return merged


def _gold_text(names: list[str], merged: dict[str, Any], gold: list[Call]) -> str:
    wanted_names, wanted = [name for name, _ in gold], _merged(arguments for _, arguments in gold)
    parts = []
    if Counter(names) != Counter(wanted_names):
        parts.append(f"Actions mismatch: predicted {names}, expected {wanted_names}")
    if merged != wanted:
        parts.append(f"Action inputs mismatch: predicted {merged}, expected {wanted}")
    return "; ".join(parts)


def _reference_text(gold: list[Call], calls: list[Call]) -> str:
    text = _gold_text([name for name, _ in calls], _merged(arguments for _, arguments in calls), gold)
    return text or f"Calls mismatch: predicted {calls}, expected {gold}"


def _encodable(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
