"""Contexts of the self-teacher and their controls: what each one lets it read."""

from dataclasses import asdict, fields, replace

import pytest
import torch
import yaml

from pgpo_lightning.core.types import Rollout, Sample, Verdict
from pgpo_lightning.modules import SDPO
from pgpo_lightning.probe.contexts import CONTEXTS, contexts, effective
from pgpo_lightning.rewards import BoxedAnswer
from pgpo_lightning.studies.spec import read_study
from pgpo_lightning.teachers.reprompt import RepromptBuilder
from tests.support import CONFIGS
from tests.support.helpers import build, tiny_sdpo
from tests.support.parrot import QUICKSTART, question

BUILDER = RepromptBuilder(
    success_reward_threshold=0.5,
    demonstration_choice="shared",
    dont_reprompt_on_self_success=True,
    remove_thinking_from_demonstration=True,
    include_environment_feedback=True,
    environment_feedback_only_without_solution=True,
    max_reprompt_len=160,
    reprompt_template="{prompt}|{solution}|{feedback}",
    solution_template="S:{successful_previous_attempt}",
    feedback_template="F:{feedback_raw}",
)


def row(asked, text, reward, feedback=None):
    return Sample(Rollout(asked, [1], [2], torch.zeros(1), text, True), Verdict(reward, feedback))


def reprompts(context):
    ids = lambda messages: [ord(c) for c in messages[-1]["content"]]  # noqa: E731
    asked = question(0)
    rows = [row(asked, "right", 1.0), row(asked, "wrong", 0.0, "no"), row(asked, "also", 1.0)]
    import random

    context.builder.attach(rows, ids, lambda t: [ord(c) for c in t], lambda i: "".join(map(chr, i)), random.Random(0))
    return [made.reprompt for made in rows]


def test_what_each_context_tells_the_teacher():
    asked = contexts(list(CONTEXTS), {"careful": "{prompt}!!", "tale": "{prompt}<{feedback}>"}, [], BUILDER)
    told = {context.name: reprompts(context) for context in asked}
    assert told["none"] == ["3*4+5?"] * 3
    assert told["feedback"] == [None, "3*4+5?||F:no", None]
    assert told["own"] == ["3*4+5?|S:right|", None, "3*4+5?|S:also|"]
    assert told["own+feedback"] == ["3*4+5?|S:right|", "3*4+5?||F:no", "3*4+5?|S:also|"]
    assert told["careful"] == ["3*4+5?!!"] * 3
    assert told["tale"] == [None, "3*4+5?<F:no>", None]
    first, failed, last = told["sibling"]
    assert (first, last) == ("3*4+5?|S:also|", "3*4+5?|S:right|")
    assert failed in (first, last)
    assert told["sibling+feedback"] == [first, failed + "F:no", last]
    assert told["configured"] == told["sibling"]


def test_none_is_always_measured_and_names_are_checked():
    assert [context.name for context in contexts(["own"], {}, ["wrong"], BUILDER)] == ["none", "own", "wrong"]
    for given, message in [
        ((["peer"], {}, []), "`contexts` to be among"),
        ((["own", "own"], {}, []), "once"),
        (([], {}, ["leak"]), "`controls` to be among"),
        (([], {"own": "{prompt}"}, []), "that are not yet in use"),
        (([], {"a/b": "{prompt}"}, []), "letters, digits"),
        (([], {"mine": "no placeholder"}, []), "`templates.mine` to contain the placeholder {prompt}"),
    ]:
        with pytest.raises(ValueError, match=message):
            contexts(*given, BUILDER)


def test_a_configuration_that_shows_no_demonstration_is_probed_as_it_is():
    bare = replace(BUILDER, demonstration_source="none", reprompt_template="{prompt} Careful: {feedback}")
    told = {context.name: reprompts(context) for context in contexts(["feedback", "configured"], {}, [], bare)}
    assert told["configured"] == told["feedback"] == [None, "3*4+5? Careful: F:no", None]
    for names, controls, culprit in ((["sibling"], [], "sibling"), ([], ["wrong"], "wrong")):
        with pytest.raises(ValueError, match=f"placeholder {{solution}}.* incompatible with {culprit}: leave that out"):
            contexts(names, {}, controls, bare)


def test_settings_without_effect_do_not_tell_contexts_apart():
    plain = asdict(contexts(["sibling"], {}, [], BUILDER)[1].builder)
    assert effective(plain) == effective(plain | {"feedback_template": "?{feedback_raw}"})
    assert effective(plain) != effective(plain | {"solution_template": "?{successful_previous_attempt}"})
    assert "environment_feedback_only_without_solution" not in effective(plain)


def test_arms_of_the_study_are_the_contexts_of_the_probe():
    """What is measured under a name is what is trained under it."""
    study = read_study(CONFIGS / "studies" / "probe.yaml")
    base = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]
    defaults = {"dont_reprompt_on_self_success": True, "remove_thinking_from_demonstration": True}
    defaults |= {
        "demonstration_choice": "shared",
        "include_environment_feedback": True,
        "success_reward_threshold": 0.5,
    }
    defaults |= {"environment_feedback_only_without_solution": True}
    module = tiny_sdpo()
    names = {field.name for field in fields(RepromptBuilder)}
    configured = asdict(module.objective.teaching.builder) | {
        name: value for name, value in base.get("reprompt", {}).items() if name in names
    }
    assert defaults.items() <= configured.items()
    templates = {"instruction": "{prompt}\n\nCorrectly solve the original question."}
    known = {c.name: c.settings for c in contexts(list(CONTEXTS), templates, [], RepromptBuilder(**configured))}
    assert set(study.arms) == set(known) - {"configured"}
    for name, settings in study.arms.items():
        trained = configured | settings["model"]["init_args"].get("reprompt", {})
        assert {"control": None, **effective(trained)} == known[name], name


def test_a_run_is_configured_to_a_context():
    for name, settings in CONTEXTS.items():
        module = build(
            SDPO, "toy", BoxedAnswer(), max_prompt_length=64, max_reprompt_len=160, max_response_length=32, **settings
        )
        assert (
            module.objective.teaching.builder == contexts([name], {}, [], module.objective.teaching.builder)[-1].builder
        )
