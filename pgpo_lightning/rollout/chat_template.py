"""A check of a tokenizer's chat template, which is a program from the Hub: it may never end, raise, or omit the question."""

import json
import os
import select
import signal
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedTokenizerBase

try:
    import resource
except ImportError:  # not on Windows, which has no fork either
    resource = None  # type: ignore[assignment]

QUESTION = "What is 2 + 3?"
SECONDS = 10.0
"""Time limit of a template for a conversation of one short question."""
_ROOM = 1 << 30  # additional memory of the process (bytes)
_LONGEST = 1_000_000  # maximum characters of the result


def check_chat_template(
    tokenizer: PreTrainedTokenizerBase, enable_thinking: bool, more: dict[str, Any] | None = None
) -> None:
    """Render one short question within limits of time and memory, and check the result.

    Args:
        tokenizer: A tokenizer. Without a chat template there is nothing to check.
        enable_thinking: Passed to the template.
        more: Passed to the template too.

    Raises:
        MisconfigurationException: If the template does not end, raises, or omits the question; names the tokenizer.
    """
    if tokenizer.chat_template is None:
        return
    if problem := _problem(_Template(tokenizer, enable_thinking, more or {})):
        raise MisconfigurationException(
            f"Expected the chat template of `{tokenizer.name_or_path}` to render a question, but {problem}. Correct "
            "`chat_template` in its folder, or set `model.model_config.tokenizer` to one with another template."
        )


class _Template:
    """A template with its inputs. Equal templates compare equal, so each is checked once per process."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool, more: dict[str, Any]) -> None:
        self.tokenizer, self.enable_thinking, self.more = tokenizer, enable_thinking, more
        self.key = (str(tokenizer.chat_template), str(tokenizer.special_tokens_map), enable_thinking, repr(more))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def render(self) -> str:
        turns = [{"role": "user", "content": QUESTION}]
        text = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, enable_thinking=self.enable_thinking, **self.more
        )
        return cast("str", text)


@lru_cache(maxsize=64)
def _problem(template: _Template) -> str | None:
    kind, text = bounded(template.render) if resource is not None else ("text", template.render())
    if kind == "late":
        return f"it takes more than {SECONDS:g} seconds"
    if kind == "memory" or (kind == "text" and len(text) > _LONGEST):
        return f"it makes more than {_LONGEST} characters of {len(QUESTION)}"
    if kind == "error":
        return f"it raises {text}"
    if kind == "died":
        return f"the process that renders it died ({text})"
    if not text.strip():
        return "it renders nothing"
    if QUESTION not in text:
        return f"{QUESTION!r} is not in what it renders, {text[:200]!r}"
    return None


def bounded(render: Callable[[], str]) -> tuple[str, str]:
    """Run a function in a forked process with limits of time and memory.

    Unlike a process pool (``concurrent.futures``, ``pebble``) this starts no threads in the parent and limits memory too. A
    thread cannot be stopped, and an alarm does not interrupt a single operation such as ``10 ** 10 ** 10``. The forked process
    runs plain Python only: no tensor, no accelerator.

    Args:
        render: The function, which returns a text.

    Returns:
        ``text`` with the text, ``error`` with the exception, ``late``, ``memory``, or ``died`` with the exit status.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        child = os.fork()
    if child == 0:
        _answer(render, writing)
    os.close(writing)
    received = bytearray()
    deadline = time.monotonic() + SECONDS
    try:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([reading], [], [], left)[0]:
                if not (part := os.read(reading, 1 << 16)):
                    break
                received += part
        else:
            return "late", ""
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # not reaped yet, so its id is not reused
        _, status = os.waitpid(child, 0)
    if not received:
        return "died", f"status {status}"
    kind, text = json.loads(received)
    return kind, text


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, hard))


def _answer(render: Callable[[], str], writing: int) -> None:
    """Write the outcome into a pipe, and end this process in any case."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _limit(resource.RLIMIT_CPU, int(SECONDS) + 1)
        statm = Path("/proc/self/statm")  # outside of Linux only time is limited
        if statm.exists():
            _limit(resource.RLIMIT_AS, int(statm.read_text().split()[0]) * resource.getpagesize() + _ROOM)
        try:
            outcome = ("text", str(render())[: _LONGEST + 1])
        except MemoryError:
            outcome = ("memory", "")
        except BaseException as error:
            outcome = ("error", f"{type(error).__name__}: {error}"[:500])
        data = json.dumps(outcome).encode()
        while data:
            data = data[os.write(writing, data) :]
    finally:
        os._exit(0)
