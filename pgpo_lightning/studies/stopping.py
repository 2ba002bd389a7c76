"""When a study with planned looks ends: the decision at a look, and the runs that may be made before the next one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies.comparisons import conditions
from pgpo_lightning.studies.decisions import decide_conditions
from pgpo_lightning.studies.pooling import pooled
from pgpo_lightning.studies.spec import PlannedRun, StudySpec


@dataclass(frozen=True)
class Decision:
    """What follows from the runs so far.

    Attributes:
        stop: Whether the study ends.
        why: In one sentence.
        seeds: Number of its seeds that may be made.
    """

    stop: bool
    why: str
    seeds: int


def decide_to_stop(runs: Sequence[RunRecord], study: StudySpec) -> Decision:
    """Decide whether a study ends at one of the looks that its runs have reached.

    The looks are taken in their order, each with its own number of seeds only: the first seeds of the study of which all runs are
    there. A study ends at the first look at which every information arm has an answer other than `not resolved`, by the
    answer that is primary in a report (of the pooled conditions, if there are several), and at its last look.

    Args:
        runs: The finished runs.
        study: The study.
    """
    plan = study.sequential
    if plan is None:
        return Decision(False, "The study has no planned looks.", len(study.seeds))
    made = {(run.study, run.arm, run.seed) for run in runs}
    wanted = [(condition, arm) for condition in study.conditions for arm in study.arms_of(condition)]
    complete = 0
    for seed in study.seeds:
        if not all((*pair, seed) in made for pair in wanted):
            break
        complete += 1
    for look in plan.looks:
        if look > complete:
            return Decision(False, f"The next look is at {look} seeds.", min(look, len(study.seeds)))
        seeds = set(study.seeds[:look])
        decided = _primary([run for run in runs if run.seed in seeds], study)
        answers = [f"{arm['arm']}: {arm['answer']}" for arm in decided["arms"]]
        if answers and all(arm["answer"] != "not resolved" for arm in decided["arms"]):
            return Decision(True, f"Decided at the look at {look} seeds ({', '.join(answers)}).", look)
    return Decision(True, f"The look at {plan.looks[-1]} seeds was the last one.", plan.looks[-1])


def _primary(runs: list[RunRecord], study: StudySpec) -> dict[str, Any]:
    groups = conditions(runs, study.design)
    if len(groups) > 1:
        return pooled(groups, study.design, study.sequential)
    return decide_conditions(groups, study.design, study.sequential)[groups[0].name]


class Looks:
    """The runs of a study that may be made now.

    Args:
        study: The study.
        runs: All of its runs.
        load: Reads the record of a finished run.
    """

    def __init__(self, study: StudySpec, runs: list[PlannedRun], load: Callable[[PlannedRun], RunRecord]) -> None:
        self.study = study
        self.runs = {run.name: run for run in runs}
        self.load = load
        self.decision = Decision(False, "", 0)
        self.admitted: set[str] = set() if study.sequential else set(self.runs)
        self._before: set[str] | None = None

    def update(self, finished: set[str]) -> None:
        """Decide again, if the runs that were admitted are finished.

        Args:
            finished: Names of the finished runs.
        """
        if self.study.sequential is None or self.decision.stop or not self.admitted <= finished:
            return
        if self._before == finished:
            return
        self._before = set(finished)
        self.decision = decide_to_stop([self.load(self.runs[name]) for name in sorted(finished)], self.study)
        self.admitted = self._within(self.decision.seeds)

    def _within(self, seeds: int) -> set[str]:
        """Return the runs of the first seeds, and those whose records they read."""
        first = set(self.study.seeds[:seeds])
        names: set[str] = set()
        ahead = [name for name, run in self.runs.items() if run.seed in first]
        while ahead:
            name = ahead.pop()
            if name not in names:
                names.add(name)
                ahead += self.runs[name].needs
        return names
