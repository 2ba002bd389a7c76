"""Simulated studies with known differences: coverage of a report's intervals, and how often its answers are wrong.

Run: ``python -m benchmarks.study_simulation``. 1,000 studies a line take about 8 CPU minutes. ``--repeats 100`` is a look.
Every study has an information arm and the five controls; all arms are alike unless a line says otherwise. The analysis is the
report's own code, without records and files.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np

from pgpo_lightning.core.files import markdown_table, plain, write_json
from pgpo_lightning.studies.collapse_shares import compare_collapse
from pgpo_lightning.studies.comparisons import Arm, Condition
from pgpo_lightning.studies.coverage import Rates
from pgpo_lightning.studies.decisions import decide_arm, differences, question
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import Mean, pigeonhole, two_way
from pgpo_lightning.studies.pooling import interaction, poolable, pooled_questions
from pgpo_lightning.studies.sample_size import seeds_for, seeds_range
from pgpo_lightning.studies.sequential import SequentialPlan
from pgpo_lightning.studies.simulation import World, simulated_condition
from pgpo_lightning.studies.tuned import tuned

DESIGN = Design(draws=0)
FINAL = Design(draws=0, measures=("final",))
CONTROLS = DESIGN.controls
ANSWERS = ("yes", "equivalent", "no", "not resolved")
LOOKS = (5, 10, 15, 20, 30)
MARGIN = DESIGN.margin


@dataclass(frozen=True)
class Case:
    """What is true in a line of the table.

    Attributes:
        name: Name of the line.
        gain: What the information arm adds to the final score of a run that lives.
        collapse: Arm to its rate of collapse.
    """

    name: str
    gain: float
    collapse: dict[str, float]

    def arms(self) -> dict[str, float]:
        """Return the arms and what each adds."""
        return {"sdpo": 0.0, "pgpo": self.gain} | dict.fromkeys(CONTROLS, 0.0)

    def true_gain(self, world: World) -> float:
        """Return the true difference of the final score to every control, collapsed runs included."""
        return world.truth("pgpo", self.gain) - world.truth("constant", 0.0)


ALL = ("sdpo", "pgpo", *CONTROLS)
CASES = (
    Case("alike", 0.0, {}),
    Case(f"gain {MARGIN:g}", MARGIN, {}),
    Case("gain 0.05", 0.05, {}),
    Case("10 % of all runs collapse", 0.0, dict.fromkeys(ALL, 0.1)),
    Case("5 % of the information arm's runs collapse", 0.0, {"pgpo": 0.05}),
    Case("5 % of the controls' runs collapse", 0.0, dict.fromkeys(CONTROLS, 0.05)),
)


def one_condition(case: Case, world: World, repeats: int, draws: int = 500) -> dict[str, float]:
    """Analyse many studies of one condition, and count.

    Args:
        case: What is true.
        world: Parameters of the runs; the case sets the collapses.
        repeats: Number of studies.
        draws: Number of bootstrap resamples.

    Returns:
        Fractions of the studies: the 95 % interval of the final score contains the true difference, to one control (`covered`),
        to the mean of the exchangeable controls (`averaged`), of the seeds on which both runs live (`living`), and by bootstrap
        (`bootstrap`); each answer, whether it is `false`, and whether it is if only the final score decides (`final false`); the
        test of the shares of collapsed runs has p < 0.05 (`shares`). `narrower` is the median ratio of the widths of the
        intervals to the mean of the controls and to one.
    """
    world = replace(world, collapse=case.collapse)
    truth, counts, answers = case.true_gain(world), Counter[str](), Counter[str]()
    narrower, best, living = [], [], 0
    for number in range(repeats):
        condition = simulated_condition(case.arms(), world, number, DESIGN)
        asked = question(condition, DESIGN, "pgpo")
        single, averaged = two_way(asked.controls["constant"]["final"]), two_way(asked.averaged["final"])
        counts["covered"] += covers(single.interval(), truth)
        counts["averaged"] += covers(averaged.interval(), truth)
        counts["bootstrap"] += covers(pigeonhole(asked.controls["constant"]["final"], draws), truth)
        narrower.append(width(averaged) / width(single))
        best.append(asked.averaged["best"].mean())
        answers[decide_arm(asked, DESIGN)["answer"]] += 1
        final = decide_arm(question(condition, FINAL, "pgpo"), FINAL)["answer"]
        counts["final false"] += is_false(final, (truth,))
        if case.collapse:
            (row,) = (row for row in compare_collapse(condition, DESIGN) if row["against"] == "constant")
            counts["shares"] += row["p"] < 0.05
            living += row["living"]["seeds"] > 1
            limits = row["living"]["low"], row["living"]["high"]
            counts["living"] += row["living"]["seeds"] > 1 and covers(limits, case.gain)
    # The true difference of the best score has no formula; its mean over all studies is close.
    truths = truth, float(np.mean(best))
    counts["false"] = sum(number for answer, number in answers.items() if is_false(answer, truths))
    counts |= {answer: answers[answer] for answer in ANSWERS}
    names = ("covered", "averaged", "bootstrap", *ANSWERS, "false", "final false")
    found = {name: counts[name] / repeats for name in names} | {"narrower": float(np.median(narrower))}
    if case.collapse:
        found |= {"living": counts["living"] / max(1, living), "shares": counts["shares"] / repeats}
    return found


def covers(interval: tuple[float, float], truth: float) -> bool:
    """Return whether an interval contains the true value."""
    return interval[0] <= truth <= interval[1]


def width(mean: Mean) -> float:
    """Return the width of the 95 % interval."""
    low, high = mean.interval()
    return high - low


def is_false(answer: str, truths: tuple[float, ...]) -> bool:
    """Return whether an answer contradicts the true gains on the deciding measures."""
    found = {"yes": min(truths) <= 0, "no": min(truths) >= MARGIN, "equivalent": max(map(abs, truths)) >= MARGIN}
    return found.get(answer, False)


def several_conditions(gains: tuple[float, ...], world: World, repeats: int) -> dict[str, float]:
    """Analyse many studies of three conditions: under two the baseline learns equally well, under the third it does not learn.

    Args:
        gains: Gain of the information arm under each condition.
        world: Parameters of the runs.
        repeats: Number of studies.

    Returns:
        Fractions of the studies: the answer is `yes` under any condition (`any_yes`), and for the pooled conditions
        (`pooled_yes`); the 95 % interval of the pooled difference contains its true value (`pooled`); exactly the two conditions
        are pooled (`right_pool`); the interaction is significant (`interaction`); the interval of the tuned difference contains
        the true value (`tuned`). `bias` is the mean error of the information arm's tuned score, and `naive_bias` that of its best
        mean over seeds. `tuned` and both biases are meaningful for equal gains under the first two conditions.
    """
    counts, bias, naive = Counter[str](), [], []
    for number in range(repeats):
        groups = []
        for i, (gain, level) in enumerate(zip(gains, (world.level, world.level, world.base - 0.05), strict=True)):
            arms = Case("", gain, {}).arms()
            groups.append(simulated_condition(arms, replace(world, level=level), number, DESIGN, condition=i))
        answers = [
            decide_arm(question(group, DESIGN, "pgpo"), DESIGN, family=len(groups))["answer"] for group in groups
        ]
        chosen = [groups.index(group) for group in poolable(groups, DESIGN)]
        together = pooled_questions([groups[i] for i in chosen], DESIGN)
        counts["any_yes"] += "yes" in answers
        counts["pooled_yes"] += any(decide_arm(asked, DESIGN)["answer"] == "yes" for asked in together)
        counts["right_pool"] += chosen == [0, 1]
        if chosen:
            truth = float(np.mean([gains[i] for i in chosen]))
            counts["pooled"] += covers(two_way(together[0].averaged["final"]).interval(), truth)
        counts["asked"] += bool(chosen)
        counts["interaction"] += min(row["p_holm"] for row in interaction(groups, DESIGN)) < 0.05
        own = tuned(groups, DESIGN)
        truth = world.level + gains[0]
        if own["arms"]:
            row = next(row for row in own["comparisons"] if row["against"] == "constant")
            counts["tuned"] += covers((row["low"], row["high"]), gains[0])
            bias.append(next(arm["value"] for arm in own["arms"] if arm["arm"] == "pgpo") - truth)
        naive.append(max(group.arms["pgpo"].tables["final"].mean() for group in groups) - truth)
    found = {name: counts[name] / repeats for name in ("any_yes", "pooled_yes", "right_pool", "interaction")}
    found["pooled"] = counts["pooled"] / max(1, counts["asked"])
    if bias:
        found |= {"tuned": counts["tuned"] / repeats, "bias": float(np.mean(bias))}
    return found | {"naive_bias": float(np.mean(naive))}


def looks(gain: float, world: World, repeats: int) -> dict[str, dict[str, float]]:
    """Look at many studies while seeds are added, and stop at the first answer.

    Args:
        gain: Gain of the information arm.
        world: Parameters of the runs; it has as many seeds as the last look.
        repeats: Number of studies.

    Returns:
        For each rule (`peeking`: the level of a single look at every look; both spending functions; `once`: only the last look):
        the fraction of studies that end with each answer, the mean number of `seeds`, and the fraction in which the final score
        alone is above that of one control at any look (`one comparison`), whose error rate the levels are made for.
    """
    plans: dict[str, SequentialPlan | None] = {
        "once": None,
        "peeking": None,
        "obrien-fleming": SequentialPlan(LOOKS, "obrien-fleming"),
        "pocock": SequentialPlan(LOOKS, "pocock"),
    }
    counts = {rule: Counter[str]() for rule in plans}
    case = Case("", gain, {})
    for number in range(repeats):
        condition = simulated_condition(case.arms(), replace(world, seeds=LOOKS[-1]), number, DESIGN)
        asked = {look: question(first_seeds(condition, look), DESIGN, "pgpo") for look in LOOKS}
        for rule, plan in plans.items():
            own = LOOKS[-1:] if rule == "once" else LOOKS
            found = {look: decide_arm(asked[look], DESIGN, plan) for look in own}
            end = next((look for look in own if found[look]["answer"] != "not resolved"), own[-1])
            counts[rule][found[end]["answer"]] += 1
            counts[rule]["seeds"] += end
            first = [next(iter(each["comparisons"])) for each in found.values()]
            counts[rule]["one comparison"] += any(
                row["p"] < each["level"] for row, each in zip(first, found.values(), strict=True)
            )
    names = (*ANSWERS, "seeds", "one comparison")
    return {rule: {name: found[name] / repeats for name in names} for rule, found in counts.items()}


def first_seeds(condition: Condition, number: int) -> Condition:
    """Return a condition with its first seeds only."""
    arms = {
        name: Arm(
            name,
            arm.seeds[:number],
            arm.base[:number],
            {measure: table[:number] for measure, table in arm.tables.items()},
            arm.collapsed[:number],
        )
        for name, arm in condition.arms.items()
    }
    return Condition(condition.name, arms)


def sample_sizes(world: World, repeats: int) -> dict[str, float]:
    """Return how often the range of needed seeds contains the number that is needed with the true variances.

    Args:
        world: Parameters of the runs.
        repeats: Number of studies.
    """
    arms = {"pgpo": 0.0, "constant": 0.0}

    def mean(seeds: int, number: int) -> Mean:
        condition = simulated_condition(arms, replace(world, seeds=seeds), number, DESIGN)
        return two_way(differences(condition.arms["pgpo"], condition.arms["constant"], ("final",))["final"])

    # Not all questions are alike, so the true variances are means over studies, as if each had all seeds.
    many = [mean(400, 1_000_000 + number) for number in range(30)]
    true = Mean(
        0.0,
        float(np.mean([one.seed_variance for one in many])),
        float(np.mean([one.question_variance for one in many])),
        float(np.mean([one.cell_variance for one in many])),
        400,
        world.questions,
    )
    needed = seeds_for(true, MARGIN)
    found = [seeds_range(mean(world.seeds, number), MARGIN) for number in range(repeats)]
    limits = [(one[0], math.inf if one[1] is None else one[1]) if one else (math.inf, math.inf) for one in found]
    inside = [needed is not None and low <= needed <= high for low, high in limits]
    low, high = np.median(limits, axis=0)
    return {"needed": float(needed or 0), "inside": float(np.mean(inside)), "low": float(low), "high": float(high)}


def rates(content: dict[str, Any], seeds: int) -> Rates:
    """Return what reports say of their own coverage, for one number of seeds.

    Args:
        content: From :func:`simulate_all`, or its JSON file.
        seeds: One of its numbers of seeds.
    """
    alike, _, _, everywhere, *one_side = (content["one condition"][f"{seeds} seeds, {case.name}"] for case in CASES)
    return Rates(
        alike["covered"],
        alike["averaged"],
        alike["bootstrap"],
        everywhere["covered"],
        everywhere["averaged"],
        everywhere["bootstrap"],
        min(case["covered"] for case in one_side),
        min(case["averaged"] for case in one_side),
        min(case["living"] for case in (everywhere, *one_side)),
        max(case[name] for case in one_side for name in ("false", "final false")),
    )


def simulate_all(world: World, seeds: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Return all tables; keys are the lines."""
    content: dict[str, Any] = {"one condition": {}, "three conditions": {}, "looks": {}, "sample sizes": {}}
    for number in seeds:
        sized = replace(world, seeds=number)
        for case in CASES:
            content["one condition"][f"{number} seeds, {case.name}"] = one_condition(case, sized, repeats)
        for name, gains in (("alike", (0.0, 0.0, 0.0)), ("gains 0.05, -0.05, 0", (0.05, -0.05, 0.0))):
            content["three conditions"][f"{number} seeds, {name}"] = several_conditions(gains, sized, repeats)
        if number >= 5:
            content["sample sizes"][f"{number} seeds"] = sample_sizes(sized, repeats)
    for gain in (0.0, MARGIN, 0.05):
        for rule, found in looks(gain, world, repeats).items():
            content["looks"][f"gain {gain:g}, {rule}"] = found
    return content


def main(
    world: World,
    seeds: tuple[int, ...] = (3, 5, 10, 30),
    repeats: int = 1000,
    output: str | None = None,
) -> None:
    """Simulate studies with known differences, and print coverage and answers of the report.

    Args:
        world: Parameters of the runs; its number of seeds is not used.
        seeds: Numbers of seeds per arm.
        repeats: Number of studies of each line.
        output: JSON file for the numbers.
    """
    start = time.process_time()
    content = simulate_all(world, seeds, repeats)
    for title, lines in content.items():
        columns = list(dict.fromkeys(name for line in lines.values() for name in line))
        rows = [[name, *(f"{line[key]:.3g}" if key in line else "" for key in columns)] for name, line in lines.items()]
        print(f"\n## {title}\n\n{markdown_table(['', *columns], rows)}")
    minutes = (time.process_time() - start) / 60
    print(f"\n{repeats} studies a line, {minutes:.1f} CPU minutes")
    if output:
        write_json(Path(output), plain(content | {"repeats": repeats}, digits=4), indent=1, allow_nan=False)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
