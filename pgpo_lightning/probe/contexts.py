"""Contexts of the self-teacher that a run can be trained with, and controls that show which part of a context helps.

A context is a :class:`~pgpo_lightning.teachers.configs.RepromptConfig`, so a run can train with exactly the context that was
measured. A control changes the rollouts that demonstrations are taken from (:mod:`pgpo_lightning.teachers.context_kinds`); a run
trains with it through `reprompt.contexts`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pgpo_lightning.teachers.context_kinds import KINDS
from pgpo_lightning.teachers.reprompt import COLUMN, RepromptBuilder, check_template

CONTROLS = tuple(kind for kind in KINDS if kind != "other-feedback")
"""Controls change the demonstration of `sibling`, which has no feedback."""

DEFAULT_CONTROLS = ("answer", "wrong", "other")

PLAIN = "{prompt}{solution}{feedback}"
"""The template that adds nothing to the prompt."""

_NO_DEMONSTRATION = {"demonstration_source": "none", "demonstration_choice": "shared", "demonstration_column": None}
_OWN = {"demonstration_source": "own", "demonstration_choice": "shared", "dont_reprompt_on_self_success": False}
_OWN |= {"demonstration_column": None}
_SIBLING = {"demonstration_source": "siblings", "demonstration_column": None}
_FEEDBACK = {"include_environment_feedback": True, "reprompt_without_context": False}
_NO_FEEDBACK = {"include_environment_feedback": False, "reprompt_without_context": False}
_TEMPLATE_ALONE = _NO_DEMONSTRATION | {"include_environment_feedback": False, "reprompt_without_context": True}

CONTEXTS: dict[str, dict[str, Any]] = {
    "none": _TEMPLATE_ALONE | {"reprompt_template": PLAIN},
    "feedback": _NO_DEMONSTRATION | _FEEDBACK,
    "own": _OWN | _NO_FEEDBACK,
    "own+feedback": _OWN | _FEEDBACK | {"environment_feedback_only_without_solution": True},
    "sibling": _SIBLING | _NO_FEEDBACK,
    "sibling+feedback": _SIBLING | _FEEDBACK | {"environment_feedback_only_without_solution": False},
    "configured": {},
}
"""Name to the settings of a module that give a run this context. All other settings stay as configured.

`none` samples again from the plain prompt. `own` shows a correct response its own text, and `own+feedback` also shows an
incorrect response its feedback (arXiv 2605.30070). `sibling+feedback` shows both if both are available. `configured` is the
context of the configuration.
"""


@dataclass(frozen=True)
class Context:
    """A context of the teacher.

    Attributes:
        name: Name of the context.
        builder: Builder of the reprompts.
        control: Name of the control, if it is one; see :data:`CONTROLS`.
    """

    name: str
    builder: RepromptBuilder
    control: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the reprompts depend on, except the rollouts."""
        return {"control": self.control, **effective(asdict(self.builder))}


def contexts(
    names: list[str], templates: Mapping[str, str], controls: list[str], configured: RepromptBuilder
) -> list[Context]:
    """Return contexts and controls, `none` first.

    Args:
        names: Names of contexts, keys of :data:`CONTEXTS`.
        templates: Name to reprompt template of additional contexts: {prompt} with text around it. A sibling's success
            replaces {solution}, and the feedback replaces {feedback}.
        controls: Keys of :data:`CONTROLS`.
        configured: The builder of the configured run.

    Raises:
        ValueError: If a name is unknown or taken, a template lacks {prompt}, or a context contradicts the configuration.
    """
    for field, chosen, known in (("contexts", names, CONTEXTS), ("controls", controls, CONTROLS)):
        if unknown := [name for name in chosen if name not in known]:
            raise ValueError(f"Expected `{field}` to be among {', '.join(known)}, but got {', '.join(unknown)}.")
    if taken := [name for name in templates if name in (*CONTEXTS, *CONTROLS, "student")]:
        raise ValueError(f"Expected names in `templates` that are not yet in use, but got {', '.join(taken)}.")
    if odd := [name for name in templates if not name.replace("-", "").replace("_", "").isalnum()]:
        raise ValueError(f"Expected names in `templates` of letters, digits, - and _, but got {', '.join(odd)}.")
    if len(set(names)) < len(names) or len(set(controls)) < len(controls):
        raise ValueError(f"Expected each of `contexts` and `controls` once, but got {names} and {controls}.")
    for name, template in templates.items():
        check_template(f"templates.{name}", template, ("prompt",))
    settings = {name: CONTEXTS[name] for name in dict.fromkeys(["none", *names])}
    settings |= {name: _template_settings(template) for name, template in templates.items()}
    measured = [Context(name, _changed(configured, changes, name)) for name, changes in settings.items()]
    sibling = CONTEXTS["sibling"] | {"dont_reprompt_on_self_success": True}
    return measured + [Context(name, _changed(configured, sibling, name), control=name) for name in controls]


def _changed(configured: RepromptBuilder, changes: Mapping[str, Any], name: str) -> RepromptBuilder:
    try:
        return replace(configured, **changes)
    except ValueError as error:
        raise ValueError(
            f"{error} The configuration is therefore incompatible with {name}: leave that out of `--contexts` or "
            "`--controls`, or change the configuration."
        ) from None


def _template_settings(template: str) -> dict[str, Any]:
    solution, feedback = ("{solution}" in template), ("{feedback}" in template)
    return {
        **(_SIBLING if solution else _NO_DEMONSTRATION),
        "include_environment_feedback": feedback,
        "reprompt_without_context": not (solution or feedback),
        "reprompt_template": template,
    }


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a :class:`RepromptBuilder` that have an effect, given the others.

    Two runs with equal effective settings have the same teacher, even if their other settings differ.

    Args:
        settings: With a value for every field of the builder. Other keys are ignored.
    """
    kept = {field.name: settings[field.name] for field in fields(RepromptBuilder)}
    demonstration, feedback = kept["demonstration_source"] != "none", kept["include_environment_feedback"]
    idle: list[str] = []
    if kept["demonstration_source"] == "column":
        kept["demonstration_column"] = kept["demonstration_column"] or COLUMN
        idle += ["dont_reprompt_on_self_success", "demonstration_choice"]
    else:
        idle += ["demonstration_column"]
    if not demonstration:
        idle += ["solution_template", "dont_reprompt_on_self_success", "demonstration_choice"]
        idle += ["remove_thinking_from_demonstration"]
    if not feedback:
        idle += ["feedback_template"]
    if not (demonstration and feedback):
        idle += ["environment_feedback_only_without_solution"]
    return {name: value for name, value in kept.items() if name not in idle}
