"""The methods that make attempts: those that train are settings of `pgpo fit`, the others sample from the base model."""

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["training", "best-of-k", "feedback", "turns"]
"""How attempts are made. ``training``: an ordinary run. ``best-of-k``: independent samples of the base model. ``feedback``: one
attempt per turn of the base model, which reads all feedback so far. ``turns``: likewise, and reads its attempts too."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: Its name in the study.
        kind: How attempts are made.
        settings: Changes to the configuration; only of methods that train.
        needs_feedback: Whether it does nothing without the verifier's feedback.
        reset: Whether every update is taken from the initial weights.
        multiplied: Whether it needs a multiplier of the step size, that of the configuration or of `settings`.
    """

    name: str
    kind: Kind = "training"
    settings: dict[str, Any] = field(default_factory=dict)
    needs_feedback: bool = True
    reset: bool = False
    multiplied: bool = False

    @property
    def trains(self) -> bool:
        """Whether the weights change."""
        return self.kind == "training"


def _reprompt(**settings: Any) -> dict[str, Any]:
    return {"model": {"init_args": {"reprompt": settings}}}


PLAIN: dict[str, Any] = {"multiplier": None}

METHODS = {
    method.name: method
    for method in (
        Method("sdpo", settings=PLAIN),
        Method("pgpo", multiplied=True),
        Method("frozen-teacher", settings=PLAIN | {"model": {"init_args": {"teacher": {"regularization": "frozen"}}}}),
        Method("placebo-feedback", settings=PLAIN | _reprompt(contexts={"kinds": ["other-feedback"]})),
        Method("no-feedback", settings=PLAIN | _reprompt(contexts={"kinds": ["template"]})),
        Method("reset-weights", settings=PLAIN, reset=True),
        Method("best-of-k", "best-of-k", needs_feedback=False),
        Method("multi-turn", "feedback"),
        Method("multi-turn-attempts", "turns"),
    )
}
"""The methods that a study can name. Each can be a start for methods of one's own, by `like`."""
