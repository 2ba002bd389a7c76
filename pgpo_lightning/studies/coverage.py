"""How often the intervals and answers of a report are right, as measured on simulated studies.

`python -m benchmarks.study_simulation` measures these rates; the tests hold the table and its output together.
"""

from typing import NamedTuple

STUDIES = 1000
"""Simulated studies behind each rate."""


class Rates(NamedTuple):
    """Rates for one number of seeds. Coverage is that of the 95 % interval of the final score.

    Attributes:
        covered: Of a difference to one control, no run collapses.
        averaged: Of the difference to the mean of four controls.
        bootstrap: Of the bootstrap interval of a difference to one control.
        covered_all: As `covered`, where 10 % of all runs collapse.
        averaged_all: As `averaged`, likewise.
        bootstrap_all: As `bootstrap`, likewise.
        covered_one: As `covered`, where 5 % of the runs of one arm collapse and none of the other's; the worse of both cases.
        averaged_one: As `averaged`, likewise.
        living: Of the difference of runs that live, the lowest rate of these three cases.
        false_one: False answers, where 5 % of the runs on one side collapse; the worse of both cases.
    """

    covered: float
    averaged: float
    bootstrap: float
    covered_all: float
    averaged_all: float
    bootstrap_all: float
    covered_one: float
    averaged_one: float
    living: float
    false_one: float


RATES: dict[int, Rates] = {
    3: Rates(
        covered=0.964,
        averaged=0.964,
        bootstrap=0.973,
        covered_all=0.979,
        averaged_all=0.969,
        bootstrap_all=0.93,
        covered_one=0.835,
        averaged_one=0.774,
        living=0.9601,
        false_one=0.073,
    ),
    5: Rates(
        covered=0.959,
        averaged=0.962,
        bootstrap=0.984,
        covered_all=0.985,
        averaged_all=0.96,
        bootstrap_all=0.927,
        covered_one=0.712,
        averaged_one=0.572,
        living=0.955,
        false_one=0.096,
    ),
    10: Rates(
        covered=0.94,
        averaged=0.94,
        bootstrap=0.982,
        covered_all=0.976,
        averaged_all=0.854,
        bootstrap_all=0.916,
        covered_one=0.581,
        averaged_one=0.479,
        living=0.946,
        false_one=0.131,
    ),
    30: Rates(
        covered=0.953,
        averaged=0.956,
        bootstrap=0.986,
        covered_all=0.958,
        averaged_all=0.928,
        bootstrap_all=0.931,
        covered_one=0.75,
        averaged_one=0.748,
        living=0.937,
        false_one=0.234,
    ),
}
"""By the number of seeds."""

TEXT = """\
- **Coverage**, measured on {studies:,} simulated studies with {seeds} seeds (`python -m benchmarks.study_simulation`): the 95 %
  interval of a difference to one control contains the true value in {covered}, that of the difference to the mean of four
  controls in {averaged}, the bootstrap's in {bootstrap}. Where 10 % of all runs collapse: {covered_all},
  {averaged_all} and {bootstrap_all}. **Where 5 % of the runs of one arm collapse and none of the other's, only
  {covered_one} and {averaged_one}**: few seeds often show no collapse, and {false_one} of the answers are false. The
  difference of the runs that live is covered in at least {living}. {here}"""

COLLAPSED = "Runs of this report collapsed: read shares and living runs apart, not the mean over both."

ALIVE = "No run of this report collapsed, which does not exclude rare collapses."


def coverage_text(seeds: int, collapsed: bool) -> str:
    """Return what was measured for the number of seeds that is closest to that of a report, by ratio.

    Args:
        seeds: Of the report.
        collapsed: Whether any of its runs collapsed.
    """
    nearest = min(RATES, key=lambda number: max(number / max(1, seeds), max(1, seeds) / number))
    rates = {name: f"{100 * rate:.1f} %" for name, rate in RATES[nearest]._asdict().items()}
    return TEXT.format(studies=STUDIES, seeds=nearest, here=COLLAPSED if collapsed else ALIVE, **rates)
