"""Every class that a configuration can name, with odd values for every argument: refused by name, or built and sound."""

import functools
import importlib
import inspect
import math
import pkgutil
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

import pgpo_lightning
from pgpo_lightning.data import QuestionData, ToyArithmetic
from pgpo_lightning.modules import OPD, SDPO, TGPO, OnPolicyModule
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.objectives.demonstrations import Demonstrations
from pgpo_lightning.objectives.gates import Gate, Threshold
from pgpo_lightning.rewards import BoxedAnswer, CodeExecution, MultipleChoice, ToolUse, TRLReward
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.studies.comparisons import Design
from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
from pgpo_lightning.training.configs import ModelConfig
from tests.support.helpers import LIMITS, TOKENIZER, grouped, half_right, tiny_model

FAMILIES = (OnPolicyModule, QuestionData, L.Callback, Engine, Gate, Threshold, Demonstrations)
NOT_TRIED = {"tokenizer"}  # a text would be looked up on the Hub
LIMITS_IN_GROUPS = grouped(LIMITS)


def _modules():
    yield pgpo_lightning
    for found in pkgutil.walk_packages(pgpo_lightning.__path__, "pgpo_lightning."):
        if not any(name in found.name for name in ("assets", "vllm_local", "__main__")):
            yield importlib.import_module(found.name)


def _own(cls):
    return vars(cls).get("__init__")


def _hints(cls):
    return typing.get_type_hints(inspect.unwrap(_own(cls)), include_extras=True)


def _inside(hint):
    yield hint
    if typing.get_origin(hint) is Callable:
        return  # what it returns is no setting
    for inner in typing.get_args(hint):
        yield from _inside(inner)


@functools.cache
def classes():
    """Return all classes of the package that a configuration can name, by name."""
    named = {cls for module in _modules() for cls in vars(module).values() if isinstance(cls, type)}
    named = {cls for cls in named if issubclass(cls, FAMILIES) and cls.__module__.startswith("pgpo_lightning")}
    found = {cls for cls in named if not cls.__name__.startswith("_")} | {
        BoxedAnswer,
        CodeExecution,
        ToolUse,
        Design,
        MultipleChoice,
        TRLReward,
    }
    for cls in list(found):  # and the dataclasses that their arguments are made of
        for hint in _hints(cls).values() if _own(cls) else ():
            found |= {
                each
                for each in _inside(hint)
                if isinstance(each, type) and each.__module__.startswith("pgpo_lightning")
            }
    return {cls.__name__: cls for cls in sorted(found, key=lambda cls: cls.__name__) if _own(cls)}


def arguments(cls):
    """Return the names of all arguments, inherited ones too, as far as they are passed on."""
    names = {}
    for each in cls.__mro__:
        if each.__module__.startswith("pgpo_lightning") and _own(each):
            parameters = inspect.signature(_own(each)).parameters.values()
            names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return [name for name in names if name != "self" and name not in NOT_TRIED]


@functools.cache
def record():
    """Return the record of a run with multipliers and gates."""
    folder = Path(tempfile.mkdtemp())
    curves = {"hapo/gate_open": [[1, 2], [0.5, 0.5]], "hapo/injected_groups": [[1, 2], [0.5, 0.5]]}
    known = {"study": "s", "arm": "a", "seed": 9, "steps": 2, "samples": 2, "seconds": 1.0, "cpu_seconds": 1.0}
    content = known | {"curves": curves, "questions": {"0": [0.5]}, "rho": [1.0, 1.5]}
    RunRecord(**content).save(folder / "run.json")
    return str(folder)


@functools.cache
def needed(cls):
    """Return what a class cannot be built without."""
    if issubclass(cls, OnPolicyModule):
        given = {"model": tiny_model(), "verifier": half_right, "model_config": ModelConfig(tokenizer=TOKENIZER)}
        given |= {
            name: RepromptConfig(**value) if name == "reprompt" else value for name, value in LIMITS_IN_GROUPS.items()
        }
        given |= {"teacher": TeacherConfig(model="toy")} if cls in (OPD, TGPO) else {}
        return {name: value for name, value in given.items() if name in arguments(cls)}
    given = {
        "run": record(), "at": 3, "width": 2.0, "rate": 0.5, "target_mean": 1.1, "server": "http://localhost:1",
        "train": "questions.jsonl", "max_tokens": 8, "multipliers": {"sibling": 1.0}, "kinds": ("sibling",),
        "funcs": half_right, "folder": "attempts", "size": 8, "data": ToyArithmetic(), "index": 0,
    }  # fmt: skip
    return {name: value for name, value in given.items() if name in arguments(cls)}


ODD = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0, -1, 1e30, 1e-30, 10**30, 10**5000]),
    st.sampled_from([True, None, "", "1e-3", "\ud800", "\0"]),
    st.floats(),
    st.integers(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=2)), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.binary(max_size=2),
    st.builds(object),
)  # fmt: skip


@st.composite
def cases(draw):
    cls = classes()[draw(st.sampled_from(list(classes())))]
    names = arguments(cls)
    return cls, draw(st.sampled_from(names)) if names else None, draw(ODD)


def test_every_class_that_a_configuration_can_name_checks_its_arguments():
    assert {
        "SDPO",
        "HAPO",
        "LoRA",
        "CollapseRules",
        "RunSummary",
        "VLLMEngine",
        "FileQuestions",
        "PolyakMultiplier",
    } <= {*classes()}
    assert len(classes()) > 45
    exempt = {"SaveConfigCallback"}
    unchecked = [
        name
        for name, cls in classes().items()
        if any(p for p in inspect.signature(_own(cls)).parameters if p != "self")
        and not hasattr(_own(cls), "__wrapped__")
    ]
    assert set(unchecked) <= exempt


def built(cls, name, value):
    """Return what comes of a value, or what is said against it."""
    try:
        return cls(**needed(cls) | {name: value}), None
    except (ValueError, TypeError, MisconfigurationException) as error:
        return None, str(error)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(cases())
def test_odd_values_are_refused_by_name_or_make_something_sound(case):
    cls, name, value = case
    if name is None:
        return
    made, said = built(cls, name, value)
    if made is None:
        assert name in said, (cls.__name__, name, value, said)
        return
    for attribute, number in vars(made).items():
        if isinstance(number, (int, float)):
            size = abs(number)
            assert size == 0 or 1e-12 <= size <= 2**33 or size <= 1e12, (cls.__name__, name, value, attribute, number)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_no_number_of_any_class_takes_what_is_no_number(value):
    numbers = 0
    for cls in classes().values():
        if hasattr(_own(cls), "__wrapped__"):
            for name, hint in _hints(cls).items():
                if any(each in (int, float) for each in _inside(hint)) and not any(
                    isinstance(each, type) and each.__name__ == "Any" for each in _inside(hint)
                ):
                    with pytest.raises(ValueError, match=rf"`[\w.]*{name}"):
                        cls(**needed(cls) | {name: value})
                    numbers += 1
    assert numbers > 120


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e-12),
        ("temperature", 1e9),
        ("evaluation.temperature", math.inf),
        ("evaluation.top_p", 1e-30),
        ("question_weight_exponent", math.inf),
        ("reward.success_threshold", math.nan),
        ("update.max_grad_norm", 1e-30),
        ("update.max_grad_norm", math.inf),
        ("teacher.update_rate", math.nan),
        ("seed", -1),
        ("num_generations", 2.0),
        ("model_config.gradient_checkpointing", 1),
    ],
)
def test_nonsense_that_a_module_once_took(name, value):
    group, _, field = name.rpartition(".")
    owner = type(inspect.signature(SDPO).parameters[group].default) if group else SDPO
    made, said = built(owner, field, value)
    assert made is None
    assert said.startswith(f"Expected `{name}` to ")
