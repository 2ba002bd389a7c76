"""Predictions of a study, written down before its first run, and what became of them."""

from dataclasses import dataclass
from typing import Any, Literal

from pgpo_lightning.core.settings import Measured, NonNegative, Text, checked
from pgpo_lightning.studies.comparisons import Condition
from pgpo_lightning.studies.decisions import differences, estimate
from pgpo_lightning.studies.measures import Measure


@checked
@dataclass(frozen=True)
class Prediction:
    """One arm minus another, as it was predicted.

    Attributes:
        arm: Name.
        against: Name of the other arm.
        condition: Name of the condition.
        sign: Of the difference; `0` for none.
        size: Absolute value of the difference, in the unit of the score.
        reason: Why.
        measure: Of the score.
        interval: Lower and upper end of the range in which the difference is expected.

    Raises:
        ValueError: If sign, size and interval contradict one another.
    """

    arm: Text
    against: Text
    condition: Text
    sign: Literal["+", "-", "0"]
    size: NonNegative
    reason: Text
    measure: Measure = "final"
    interval: tuple[Measured, Measured] | None = None

    def __post_init__(self) -> None:
        if (self.sign == "0") != (self.size == 0):
            raise ValueError(
                f"Expected `size` to be 0 where `sign` is 0, and only there, but got {self.sign} {self.size:g}."
            )
        if self.interval and not self.interval[0] <= self.value <= self.interval[1]:
            raise ValueError(
                f"Expected `interval` to contain the predicted {self.value:+g}, but got {list(self.interval)}."
            )

    @property
    def value(self) -> float:
        """Return the predicted difference."""
        return -self.size if self.sign == "-" else self.size


def seen(prediction: Prediction, groups: list[Condition]) -> dict[str, Any] | None:
    """Return what was seen of a prediction, or None if its runs are not here.

    Returns:
        `seeds`, `value`, `low` and `high` of the difference; `sign`, whether its sign is the predicted one (for a predicted 0:
        whether the interval contains 0); `in_predicted`, whether the difference is inside the predicted interval (None without
        one); `in_seen`, whether the predicted difference is inside the interval of the one that was seen.
    """
    found = [group for group in groups if group.name == prediction.condition]
    arms = found[0].arms if found else {}
    if prediction.arm not in arms or prediction.against not in arms:
        return None
    table = differences(arms[prediction.arm], arms[prediction.against], (prediction.measure,))[prediction.measure]
    mean = estimate(table)
    low, high = mean.interval()
    same = {"+": mean.value > 0, "-": mean.value < 0, "0": low <= 0 <= high}
    interval = prediction.interval
    return {
        "seeds": mean.seeds,
        "value": mean.value,
        "low": low,
        "high": high,
        "sign": same[prediction.sign],
        "in_predicted": None if interval is None else interval[0] <= mean.value <= interval[1],
        "in_seen": low <= prediction.value <= high,
    }
