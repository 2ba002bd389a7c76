"""The definition of a collapse, and rules that detect early signs of it in the curves of a run.

A rule uses past steps only, and the median of the last few points of its curve, so that a single outlier does not trigger it. It
compares with the run's own start or best value, because lengths and entropies have no scale that holds for every task. A rule
whose curve is not logged (no teacher in GRPO, no evaluation) never fires.

Two signs are *not* rules: short responses, because self-distillation is meant to shorten them (SDPO, arXiv 2601.20802), and the
loss, which does not change visibly in any collapse of the toy task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pgpo_lightning.core.settings import AtLeastOne, Count, Fraction, NonNegative, checked
from pgpo_lightning.monitoring.curves import Scalars, matching, series

REWARD = "critic/score/mean"
TEACHER = "self_distillation/reprompt_sample_fraction"
ENTROPY = "rollout/neg_log_prob"
LENGTH_MEAN = "response_length/mean"
LENGTH_MAX = "response_length/max"
CUT_OFF = "response_length/clip_ratio"
GRADIENT = "actor/grad_norm"
AT_BOUND = "lr/at_bound"
DIVERGENCE = "self_distillation/divergence"
BOUND = "self_distillation/divergence_bound"
SCORE = "val/avg@*"

TAGS = (REWARD, TEACHER, ENTROPY, LENGTH_MEAN, LENGTH_MAX, CUT_OFF, GRADIENT, AT_BOUND, DIVERGENCE, BOUND)
"""The curves that rules read at every step, in addition to the held-out score."""


@checked
@dataclass(frozen=True)
class CollapseRules:
    """Thresholds of the rules. A threshold of null disables its rule.

    Args:
        window: Points in the running median; fewer at the beginning. With 7, four of seven points must exceed a threshold.
        warm_up: Points of a curve before its rules may fire. Their median is the start value of the run. Less than `window`, so
            that a collapse within the first steps is detected.
        reward_fall: ``reward``: the reward of rollouts is below this fraction of its best. In a batch of 8 questions x 8 it
            varies by a third by chance; the false alarms of each setting are measured in ``docs/collapse.md``.
        teacher_fall: ``teacher-lost``: the fraction of rollouts with a teacher is below this fraction of its best. The
            objective loses its signal, which later steps cannot restore.
        score_fall: ``score``: the held-out score of the last evaluation is below this fraction of its best.
        floor: A best value below this is too small for the rules of a fall.
        entropy_rise: ``entropy-rises``: -log p of the sampled tokens is above this multiple of its start.
        entropy_rise_at_bound: ``rho-at-bound``: in most of the last `window` steps rho was at its upper bound, and the entropy is
            above this multiple of its start. I is then large because the student becomes random, not because the feedback
            is informative. Over 300 runs of the toy task: 37 of 104 collapses, no false alarm in 95 healthy runs.
        entropy_vanish: ``entropy-vanishes``: the entropy is below this fraction of its start, and the reward is not above its
            start.
        length_tail: ``length-tail``: longest over mean response is above this. CGTR (arXiv 2606.03532) observed 3 to 4 about 35
            steps before the score fell, and does not refresh the teacher above 3.2.
        length_growth: ... and above this multiple of its start, for tasks whose lengths naturally vary that much.
        cut_off_rise: ``cut-off``: the fraction of responses that reach the length limit has risen by more than this. Replaces
            `length_tail` if the limit is less than `length_tail` mean lengths.
        gradient_vanish: ``no-gradient``: the gradient norm is below this fraction of its start, and the reward has had no new
            best within the last two windows.
        solved: ... and the reward is below this. If all questions are solved, a small gradient is expected.
        gap_growth: ``teacher-gap``: the divergence between student and teacher is above this multiple of its start. It
            should decrease as the student learns.
        broken_teacher: ``broken-teacher``: the divergence of the first step is above this fraction of its maximum, which is that
            of disjoint distributions: ln 2 for the Jensen-Shannon divergence with alpha 0.5, the entropy of alpha for others.
            At that step student and teacher have the same weights. Fires at once, without median and warm-up, because later
            steps do not show it. A KL divergence has no maximum, so the rule never fires there; `gap_growth` does.

    Raises:
        ValueError: If a setting is out of range.
    """

    window: Count = 7
    warm_up: Count = 3
    reward_fall: Fraction | None = 0.3
    teacher_fall: Fraction | None = 0.5
    score_fall: Fraction | None = 0.5
    floor: NonNegative = 0.05
    entropy_rise: AtLeastOne | None = 2.0
    entropy_rise_at_bound: AtLeastOne | None = 1.25
    entropy_vanish: Fraction | None = 0.1
    length_tail: NonNegative | None = 3.2
    length_growth: AtLeastOne = 1.5
    cut_off_rise: Fraction | None = 0.1
    gradient_vanish: Fraction | None = 0.05
    solved: NonNegative = 0.9
    gap_growth: AtLeastOne | None = 3.0
    broken_teacher: Fraction | None = 0.5


When = Literal["any", "end"]
"""Whether one low evaluation makes a collapse (``any``), or only low evaluations up to the end of the run (``end``)."""


def collapse_step(steps: Sequence[int], scores: Sequence[float], below: float = 0.5, when: When = "any") -> int | None:
    """Return when a run collapsed: the first evaluation whose score is below a fraction of the first score, or None.

    This is the definition of a collapse everywhere in this package; the rules are early signs of it.

    Args:
        steps: Of the evaluations. The first one is that of the base model, at step 0, where there is one.
        scores: Held-out score of each evaluation.
        below: The fraction.
        when: ``any``: one low evaluation is enough. ``end``: all later evaluations must be low as well.

    Example:
        >>> collapse_step([0, 10, 20, 30, 40], [0.5, 0.2, 0.3, 0.1, 0.0])
        10
        >>> collapse_step([0, 10, 20, 30, 40], [0.5, 0.2, 0.3, 0.1, 0.0], when="end")
        30
    """
    low = [score < below * scores[0] for score in scores]
    if when == "end":
        low = [all(low[i:]) for i in range(len(low))]
    return next((step for step, is_low in zip(steps, low, strict=True) if is_low), None)


def medians(values: list[float], window: int) -> list[float]:
    """Return the running median of the last `window` values; of fewer at the beginning.

    Example:
        >>> medians([1.0, 9.0, 2.0, 3.0], 3)
        [1.0, 5.0, 2.0, 3.0]
    """
    return [median(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


class History:
    """The curves of a run up to a step, as the rules read them.

    Args:
        scalars: Tag to step to value; steps after `now` and values that are not finite are ignored.
        now: The last step.
        rules: The thresholds.
    """

    def __init__(self, scalars: Scalars, now: int, rules: CollapseRules) -> None:
        self._scalars, self._now, self.rules = scalars, now, rules

    def points(self, tag: str) -> tuple[list[int], list[float]]:
        """Return steps and values so far."""
        steps, values = series(self._scalars, tag)
        seen = sum(step <= self._now for step in steps)
        return steps[:seen], values[:seen]

    def ready(self, *tags: str) -> bool:
        """Return whether all of these curves have passed their warm-up."""
        return all(len(self.points(tag)[1]) >= self.rules.warm_up for tag in tags)

    def smooth(self, tag: str) -> list[float]:
        """Return the running median of a curve."""
        return medians(self.points(tag)[1], self.rules.window)

    def start(self, tag: str) -> float:
        """Return the median of the first points of a curve."""
        return median(self.points(tag)[1][: self.rules.warm_up])

    def tail(self) -> "History":
        """Return the history with one more curve: longest over mean response, under the tag of the longest."""
        mean = self._scalars.get(LENGTH_MEAN, {})
        ratio = {s: v / mean[s] for s, v in self._scalars.get(LENGTH_MAX, {}).items() if mean.get(s, 0.0) > 0}
        return History({LENGTH_MAX: ratio}, self._now, self.rules)

    def scores(self) -> tuple[list[int], list[float]]:
        """Return steps and values of the held-out avg@k."""
        tags = matching(self._scalars, SCORE)
        return self.points(tags[0]) if tags else ([], [])


def _fallen(history: History, tag: str, fraction: float | None, what: str) -> str | None:
    if fraction is None or not history.ready(tag):
        return None
    values = history.smooth(tag)
    now, best = values[-1], max(values)
    if best < history.rules.floor or now >= fraction * best:
        return None
    return f"{what} fell to {now:.3g}, below {fraction:g} of its best {best:.3g}"


def reward(history: History) -> str | None:
    """The reward of rollouts is far below its best."""
    return _fallen(history, REWARD, history.rules.reward_fall, "the reward of rollouts")


def teacher_lost(history: History) -> str | None:
    """The fraction of rollouts with a teacher is far below its best."""
    return _fallen(history, TEACHER, history.rules.teacher_fall, "the fraction of rollouts with a teacher")


def score(history: History) -> str | None:
    """The held-out score is far below its best. It is an average over many answers, so it is not smoothed."""
    fraction, (_, values) = history.rules.score_fall, history.scores()
    if fraction is None or not values or max(values) < history.rules.floor or values[-1] >= fraction * max(values):
        return None
    return f"the held-out score fell to {values[-1]:.3g}, below {fraction:g} of its best {max(values):.3g}"


def entropy_rises(history: History) -> str | None:
    """The student becomes random."""
    growth = history.rules.entropy_rise
    if growth is None or not history.ready(ENTROPY):
        return None
    now, start = history.smooth(ENTROPY)[-1], history.start(ENTROPY)
    if start <= 0 or now <= growth * start:
        return None
    return f"the entropy of rollouts rose to {now:.3g} nats a token, above {growth:g} times its start {start:.3g}"


def rho_at_bound(history: History) -> str | None:
    """PGPO takes its largest steps because the student becomes random."""
    growth = history.rules.entropy_rise_at_bound
    if growth is None or not history.ready(AT_BOUND, ENTROPY):
        return None
    now, start = history.smooth(ENTROPY)[-1], history.start(ENTROPY)
    if start <= 0 or now <= growth * start or history.smooth(AT_BOUND)[-1] < 1:
        return None
    return (
        f"rho was at its upper bound in most of the last steps while the entropy of rollouts rose to {now:.3g} nats a token, "
        f"above {growth:g} times its start {start:.3g}: the student becomes random, and the feedback is not more "
        "informative than before"
    )


def entropy_vanishes(history: History) -> str | None:
    """The student becomes certain without becoming better."""
    fraction = history.rules.entropy_vanish
    if fraction is None or not history.ready(ENTROPY, REWARD):
        return None
    now, start = history.smooth(ENTROPY)[-1], history.start(ENTROPY)
    gained = history.smooth(REWARD)[-1] - history.start(REWARD)
    if now >= fraction * start or gained > 0:
        return None
    return (
        f"the entropy of rollouts fell to {now:.3g} nats a token, below {fraction:g} of its start {start:.3g}, while the reward "
        f"changed by {gained:+.3g}"
    )


def length_tail(history: History) -> str | None:
    """A few responses become far longer than the others."""
    limit, growth, tail = history.rules.length_tail, history.rules.length_growth, history.tail()
    if limit is None or not tail.ready(LENGTH_MAX):
        return None
    now, start = tail.smooth(LENGTH_MAX)[-1], tail.start(LENGTH_MAX)
    if now <= limit or now <= growth * start:
        return None
    return f"the longest response has {now:.3g} times the mean length, above {limit:g}, from {start:.3g} at the start"


def cut_off(history: History) -> str | None:
    """More responses reach the length limit."""
    rise = history.rules.cut_off_rise
    if rise is None or not history.ready(CUT_OFF):
        return None
    now, start = history.smooth(CUT_OFF)[-1], history.start(CUT_OFF)
    if now - start <= rise:
        return None
    return (
        f"the fraction of responses that are cut off rose to {now:.3g}, more than {rise:g} above its start {start:.3g}"
    )


def no_gradient(history: History) -> str | None:
    """The gradient vanishes, although not all questions are solved."""
    fraction, window = history.rules.gradient_vanish, history.rules.window
    if fraction is None or not history.ready(GRADIENT, REWARD):
        return None
    now, start, rewards = history.smooth(GRADIENT)[-1], history.start(GRADIENT), history.smooth(REWARD)
    earlier, lately = rewards[: -2 * window], rewards[-2 * window :]
    better = max(lately) > max(earlier) if earlier else rewards[-1] > rewards[0]
    if now >= fraction * start or better or rewards[-1] >= history.rules.solved:
        return None
    return (
        f"the gradient norm fell to {now:.3g}, below {fraction:g} of its start {start:.3g}, while the reward stood at "
        f"{rewards[-1]:.3g}"
    )


def teacher_gap(history: History) -> str | None:
    """Student and teacher drift apart."""
    growth = history.rules.gap_growth
    if growth is None or not history.ready(DIVERGENCE):
        return None
    now, start = history.smooth(DIVERGENCE)[-1], history.start(DIVERGENCE)
    if start <= 0 or now <= growth * start:
        return None
    return (
        f"the divergence from the teacher rose to {now:.3g} nats a token, above {growth:g} times its start {start:.3g}"
    )


def broken_teacher(history: History) -> str | None:
    """Student and teacher disagree although they have the same weights."""
    fraction, (steps, values), (_, bounds) = (
        history.rules.broken_teacher,
        history.points(DIVERGENCE),
        history.points(BOUND),
    )
    if fraction is None or steps[:1] != [1] or not bounds or values[0] <= fraction * bounds[0]:
        return None
    return (
        f"the divergence from the teacher was {values[0]:.3g} nats a token at the first step, above {fraction:g} of its largest "
        f"value {bounds[0]:.3g}. Student and teacher have the same weights at that step, so the teacher reads the wrong tokens, "
        "template or weights"
    )


Rule = Callable[[History], str | None]

BROKEN_TEACHER = "broken-teacher"

RULES: dict[str, Rule] = {
    "reward": reward,
    "teacher-lost": teacher_lost,
    "score": score,
    "entropy-rises": entropy_rises,
    "rho-at-bound": rho_at_bound,
    "entropy-vanishes": entropy_vanishes,
    "length-tail": length_tail,
    "cut-off": cut_off,
    "no-gradient": no_gradient,
    "teacher-gap": teacher_gap,
    BROKEN_TEACHER: broken_teacher,
}
"""Name to rule."""


def alarms(scalars: Scalars, now: int, rules: CollapseRules) -> dict[str, str]:
    """Return the rules that fire at a step, with their reasons.

    Args:
        scalars: Curves of a run; steps after `now` are ignored.
        now: Step.
        rules: Thresholds.

    Example:
        >>> curve = {"critic/score/mean": {1: 0.5, 2: 0.5, 3: 0.1, 4: 0.6, 5: 0.1, 6: 0.1, 7: 0.1}}
        >>> [bool(alarms(curve, step, CollapseRules())) for step in range(1, 8)]
        [False, False, False, False, False, False, True]
        >>> alarms(curve, 7, CollapseRules())
        {'reward': 'the reward of rollouts fell to 0.1, below 0.3 of its best 0.5'}
    """
    history = History(scalars, now, rules)
    return {name: reason for name, rule in RULES.items() if (reason := rule(history)) is not None}


def signs(scalars: Scalars, now: int, rules: CollapseRules) -> dict[str, float]:
    """Return the values that the rules compare with their thresholds, as far as the curves exist.

    Args:
        scalars: Curves of a run.
        now: Step.
        rules: For the window and the warm-up.

    Returns:
        `reward_of_best`, `teacher_of_best`: smoothed, over their best; `entropy_of_start`, `gradient_of_start`,
        `gap_of_start`: smoothed, over their start; `length_tail`: longest over mean response, smoothed; `cut_off_rise`:
        since the start; `divergence_of_bound`: at the first step, over its largest value, if it has one; `score_of_best`: at
        the last evaluation.
    """
    history = History(scalars, now, rules)
    found: dict[str, float] = {}
    for name, tag in (("reward_of_best", REWARD), ("teacher_of_best", TEACHER)):
        if (values := history.smooth(tag)) and max(values) > 0:
            found[name] = values[-1] / max(values)
    for name, tag in (("entropy_of_start", ENTROPY), ("gradient_of_start", GRADIENT), ("gap_of_start", DIVERGENCE)):
        if (values := history.smooth(tag)) and history.start(tag) > 0:
            found[name] = values[-1] / history.start(tag)
    if tail := history.tail().smooth(LENGTH_MAX):
        found["length_tail"] = tail[-1]
    if cut := history.smooth(CUT_OFF):
        found["cut_off_rise"] = cut[-1] - history.start(CUT_OFF)
    (steps, values), (_, bounds) = history.points(DIVERGENCE), history.points(BOUND)
    if steps[:1] == [1] and bounds:
        found["divergence_of_bound"] = values[0] / bounds[0]
    _, scores = history.scores()
    if scores and max(scores) > 0:
        found["score_of_best"] = scores[-1] / max(scores)
    return found
