"""What a report compares, and the criterion of its answers."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pgpo_lightning.core.settings import Filled, Natural, Positive, Range, checked
from pgpo_lightning.studies.measures import Measure, Score

CONTROLS = ("constant", "random", "shuffled", "replayed", "inverse")
"""Names, without the suffix, of the arms with the dose of an information arm."""

INVERSE = "inverse"
"""The control that uses the information with the opposite sign. The others are exchangeable: they have the dose and no more."""


@checked
@dataclass(frozen=True)
class Design:
    """Which arms are compared, and the criterion of an answer.

    Attributes:
        baseline: The arm that every arm is compared with.
        information: Names of information arms; `*` at the end matches any suffix.
        controls: Names of their controls without the suffix.
        decisive: Controls that an information arm has to exceed for a `yes`: all of them, and all have to be present. Null: all
            of `controls`.
        measures: Measures on which it has to exceed them: all of them. The first one chooses the condition of a tuned arm.
        score: Held-out score: `avg`, the mean reward of samples, or `solution-probability`, the exact probability of the worked
            solution, which has no sampling noise.
        pool: Conditions that are pooled: `learning`, those in which the baseline learns (its final score minus its score at
            step 0 has a 95 % interval above 0), or `all`.
        margin: The smallest difference of interest, in the unit of the score.
        collapse: A run has collapsed if its avg@k is below this fraction of the base model's.
        draws: Number of bootstrap resamples; 0 for no bootstrap.

    Raises:
        ValueError: If a setting is out of range.
    """

    baseline: str = "sdpo"
    information: tuple[str, ...] = ("pgpo*",)
    controls: tuple[str, ...] = CONTROLS
    decisive: tuple[str, ...] | None = None
    measures: Annotated[tuple[Measure, ...], Filled()] = ("final", "best")
    score: Score = "avg"
    pool: Literal["learning", "all"] = "learning"
    margin: Positive = 0.02
    collapse: Annotated[float, Range(above=0, below=1)] = 0.5
    draws: Natural = 2000

    def __post_init__(self) -> None:
        if not self.required or not set(self.required) <= set(self.controls):
            raise ValueError(
                f"Expected `decisive` to be among `controls` ({', '.join(self.controls)}), but got {list(self.required)}."
            )

    @property
    def required(self) -> tuple[str, ...]:
        """Return the decisive controls."""
        return self.controls if self.decisive is None else self.decisive

    @property
    def exchangeable(self) -> tuple[str, ...]:
        """Return the decisive controls whose mean is compared as well: all but the inverse rule, if there are others."""
        return tuple(control for control in self.required if control != INVERSE) or self.required

    def suffix(self, arm: str) -> str | None:
        """Return the suffix that an information arm shares with its controls; None for other arms.

        The suffix is what `*` matches. Without a `*` it is the part after the last hyphen.

        Example:
            >>> Design().suffix("pgpo-1.0"), Design().suffix("pgpo"), Design().suffix("sdpo")
            ('1.0', '', None)
        """
        for pattern in self.information:
            stem, star, _ = pattern.partition("*")
            if star and arm.startswith(stem):
                return arm[len(stem) :].lstrip("-")
            if arm == pattern:
                return arm.rpartition("-")[2] if "-" in arm else ""
        return None

    def control(self, name: str, arm: str) -> str:
        """Return the name of the control `name` of an information arm."""
        suffix = self.suffix(arm)
        return f"{name}-{suffix}" if suffix else name

    def order(self, arm: str) -> tuple[int, str]:
        """Return the sort key of an arm in tables."""
        if arm == self.baseline:
            return 0, arm
        if self.suffix(arm) is not None:
            return 1, arm
        positions = [i for i, control in enumerate(self.controls) if arm == control or arm.startswith(f"{control}-")]
        return 2 + (positions[0] if positions else len(self.controls)), arm
