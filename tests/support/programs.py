"""Questions with tests, and responses with programs."""

import json

from pgpo_lightning.core.types import Question
from pgpo_lightning.rewards import CodeExecution


def asked(inputs, outputs, kind="stdin", function="", **more):
    """A question whose answer are its tests."""
    record = {"inputs": inputs, "outputs": outputs, "testtype": kind, "fn_name": function} | more
    return Question("Write a program.", json.dumps(record), index=3, source="train.json:4")


def functional(inputs, outputs, **more):
    return asked(inputs, outputs, "functional", "f", **more)


def tested(*programs, **more):
    return asked(list(programs), [""] * len(programs), "code", **more)


def fenced(code):
    return f"So:\n```python\n{code}\n```\n"


def run(question, code, **settings):
    return CodeExecution(**settings)(question, fenced(code))
