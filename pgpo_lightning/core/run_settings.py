"""The settings of a run, as plain data in its checkpoints, and which of them a resumed run may change.

A setting that is not named here must not change. This includes settings that are added to a class later.
"""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from transformers import PreTrainedTokenizerBase

from pgpo_lightning.core.texts import shown

Plain = Any
"""None, a number, a text, or lists and dictionaries of these, which `torch.load` reads without running code."""

MAY_CHANGE = {
    "model": {
        # how a step is computed, without an effect on its result
        "update.micro_batch_tokens", "update.padding_free", "update.reduce_every_pass", "model_config.gradient_checkpointing",
        "model_config.selective_ac_option", "model_config.attn_implementation", "engine", "teacher.offload", "reward.workers",
        "reward.while_sampling",
        # when a run is stopped, and the length of a step
        "update.max_grad_norm", "mismatch.max_sampler_gap", "update.max_skipped_steps", "reward.on_error",
        "evaluation.samples", "evaluation.temperature", "evaluation.top_p", "evaluation.solution_column",
        "evaluation.base_answers", "evaluation.max_sequences",
        "model_config.trust_remote_code",
    },
    "data": {"eval_batch_size", "limit_val"},
    "multiplier": set(),
    "trainer": set(),
}  # fmt: skip
"""Settings that a resumed run may change; for optimizer and schedule see :mod:`pgpo_lightning.training.resumed_optimizer`."""

SEEN_BY_EFFECT = {
    # The weights are those of the checkpoint. Adapters, and a base or teacher's model that is not in it, are compared by
    # fingerprints. A seed of null is that of the checkpoint.
    "model": {
        "teacher.model", "teacher.revision", "update.lr_scheduler_type", "update.warmup_steps",
        "model", "model_config.revision", "model_config.tokenizer", "optimizer", "scheduler", "lora", "quantization", "seed"},
    # `data.questions` is the hash of the training questions; the size of a batch is compared over all devices.
    "data": {
        "batch_size", "limit_train", "train", "validation", "test", "dataset", "dataset_config", "train_split",
        "validation_split", "test_split", "prompt_column", "answer_column", "system_column", "privileged_context_column",
        "tools_column", "prompt_suffix", "path", "domain", "domains", "hard", "seed",
    },
    "multiplier": {"run"},  # its record is in the multiplier's own state
    "trainer": set(),
}  # fmt: skip
"""Settings that are not compared by name and value, because their effect is compared."""

_ALIASES = {"alpha": ("sensitivity",)}


@dataclasses.dataclass(frozen=True)
class ConfigGroup:
    """Base of dataclasses that group settings. Their fields are compared one by one, under ``group.field``."""

    def settled(self) -> dict[str, Any]:
        """Return the fields by name; where one was left open, what then stands for it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Remembers:
    """Keeps the arguments that an object is constructed with."""

    may_change_on_resume: ClassVar[frozenset[str]] = frozenset()
    """Arguments of a user's class that a resumed run may change."""

    _given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments as they were given."""
        cls.check_names(kwargs)
        self = super().__new__(cls)
        object.__setattr__(self, "_given", (args, kwargs))
        return self

    # Not in a `__new__` of the subclass: jsonargparse would read the arguments of that in place of `__init__`'s.
    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Look at the names of the arguments before the object is built."""


def arguments(thing: Any) -> dict[str, Any]:
    """Return the arguments that an object was constructed with, defaults included, by their names.

    Args:
        thing: Of a class that :class:`Remembers`.
    """
    args, kwargs = thing._given
    parameters = parameters_of(type(thing))
    # Parameters of the first class that takes any by position.
    places = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return {name: p.default for name, p in parameters.items()} | dict(zip(places, args, strict=False)) | kwargs


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class's ``__init__``, and of those of its bases that ``**kwargs`` reaches."""
    found: dict[str, inspect.Parameter] = {}
    for each in cls.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def settings(thing: Any) -> dict[str, Plain]:
    """Return what an object was constructed with, defaults included, as plain data.

    Args:
        thing: Of a class that :class:`Remembers`. What was left open is described as the object settled it, under the same name.
    """
    given = arguments(thing)
    found: dict[str, Plain] = {"class": _name(type(thing))}
    for name, value in given.items():
        if any(other in given for other in _ALIASES.get(name, ())):
            continue
        value = getattr(thing, name, None) if value is None else value
        if isinstance(value, ConfigGroup):
            found |= {f"{name}.{field}": describe(each) for field, each in value.settled().items()}
        else:
            found[name] = describe(value)
    return found


def describe(value: Any) -> Plain:
    """Return any value as plain data. For an object these are the class, and the arguments that are attributes of that name."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): describe(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, partial):
        return {"class": describe(value.func), "arguments": describe(value.args), **describe(value.keywords)}
    if isinstance(value, type) or inspect.isroutine(value):
        return _name(value)
    if dataclasses.is_dataclass(value):
        kept = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return {"class": _name(type(value)), **kept}
    if isinstance(value, Remembers):
        return settings(value)
    if isinstance(value, (nn.Module, PreTrainedTokenizerBase)):
        return {"class": _name(type(value))}
    try:
        names = [name for name in inspect.signature(type(value).__init__).parameters if name in vars(value)]
    except (TypeError, ValueError):
        names = []
    return {"class": _name(type(value)), **{name: describe(getattr(value, name)) for name in names}}


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer: its vocabulary, its chat template and its end-of-sequence token."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return sha256(repr((vocabulary, tokenizer.chat_template, tokenizer.eos_token_id)).encode()).hexdigest()


def changes(before: dict[str, Plain], now: dict[str, Plain]) -> Iterator[tuple[str, str, Plain, Plain]]:
    """Yield the differences between two runs' settings: part, name, old and new value.

    Settings that only one run has were added or removed by another version, and are ignored. If the class of a part differs, the
    difference is that of the class.
    """
    for part in before.keys() & now.keys():
        old, new = before[part], now[part]
        if old is None or new is None or old["class"] != new["class"]:
            if old != new:
                yield part, "", _class(old), _class(new)
            continue
        for name in old.keys() & new.keys():
            if (
                name not in SEEN_BY_EFFECT.get(part, ())
                and repr(old[name]) != repr(new[name])
                and old[name] != new[name]
            ):
                yield part, name, old[name], new[name]


def _class(part: Plain) -> Plain:
    return None if part is None else part["class"]


def check_settings(
    before: dict[str, Plain], now: dict[str, Plain], free: dict[str, frozenset[str]], where: str
) -> list[str]:
    """Compare the settings of a resumed run with those of its checkpoint.

    Args:
        before: The checkpoint's.
        now: This run's.
        free: For each part, what its class allows beyond :data:`MAY_CHANGE`.
        where: The checkpoint.

    Returns:
        What may change and did, each as text.

    Raises:
        MisconfigurationException: If anything else did; names all of it with both values.
    """
    allowed: list[str] = []
    refused: list[str] = []
    for part, name, old, new in sorted(changes(before, now), key=lambda change: change[:2]):
        field, text = (f"{part}.{name}", repr) if name else (part, str)
        change = f"`{field}` is {shown(new, text, longest=150)} and was {shown(old, text, longest=150)}"
        may = name in MAY_CHANGE.get(part, ()) or name in free.get(part, ())
        (allowed if may else refused).append(change)
    if refused:
        raise MisconfigurationException(
            f"Expected the settings of the run that {where} belongs to, but {', '.join(refused)}. Go on with the former ones, or "
            f"start a new run from the weights: `pgpo export {where} FOLDER`, then `--model.model FOLDER`."
        )
    return allowed
