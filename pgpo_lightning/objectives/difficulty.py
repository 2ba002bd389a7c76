"""How hard a question is for the student now: a moving average of its success rate (DRIFT, arXiv 2606.30345)."""

from typing import Any, Literal

from pgpo_lightning.objectives.configs import DifficultyConfig
from pgpo_lightning.objectives.gates import Group

Difficulty = Literal["easy", "medium", "hard"]


class PassRates:
    """The average success rate of every question that was seen. The same on every rank, and in checkpoints.

    Args:
        config: Decay of the average and the limits between the classes.
    """

    def __init__(self, config: DifficultyConfig) -> None:
        self.config = config
        self.seen: dict[int, tuple[float, int]] = {}

    def rate(self, group: Group) -> float:
        """Return ``r = a r_past + (1 - a) r_now``; on the first visit the success rate of the group."""
        now = group.successes / group.size
        past, visits = self.seen.get(group.question, (now, 0))
        return self.config.decay * past + (1 - self.config.decay) * now if visits else now

    def visits(self, question: int) -> int:
        """Return how often a question was seen before."""
        return self.seen.get(question, (0.0, 0))[1]

    def difficulty(self, rate: float) -> Difficulty:
        """Return the class of an average success rate."""
        return "easy" if rate > self.config.easy else "hard" if rate < self.config.hard else "medium"

    def weight(self, difficulty: Difficulty) -> float:
        """Return the weight of a success on a question, gamma."""
        return {"easy": self.config.easy_weight, "medium": 1.0, "hard": self.config.hard_weight}[difficulty]

    def observe(self, groups: list[Group]) -> None:
        """Take note of the groups of all ranks."""
        for group in groups:
            self.seen[group.question] = (self.rate(group), self.visits(group.question) + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"seen": dict(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self.seen = dict(state_dict["seen"])
