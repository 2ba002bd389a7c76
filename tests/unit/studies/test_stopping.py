"""A study with planned looks: which runs may be made, and at which look it ends."""

from dataclasses import replace
from pathlib import Path

import pytest

from pgpo_lightning.studies.design import CONTROLS, Design
from pgpo_lightning.studies.sequential import SequentialPlan
from pgpo_lightning.studies.simulation import World
from pgpo_lightning.studies.spec import StudySpec
from pgpo_lightning.studies.stopping import Looks, decide_to_stop
from tests.support.studies import runs

PLAN = SequentialPlan((3, 6, 8), "pocock")
WORLD = World(seeds=8, questions=60)


def study(**changes):
    known = {
        "base": ("base.yaml",),
        "folder": Path("runs"),
        "seeds": tuple(range(8)),
        "arms": {name: {} for name in ("sdpo", "pgpo", *CONTROLS)},
        "conditions": {"one": {}},
        "sequential": PLAN,
        "design": Design(draws=0),
    }
    return StudySpec(**known | changes)


def made(gain=0.0, seeds=8, study="one"):
    arms = {"sdpo": 0.0, "pgpo": gain} | dict.fromkeys(CONTROLS, 0.0)
    return [run for run in runs(1, study, arms, WORLD, doses={}) if run.seed < seeds]


def test_before_the_first_look_its_seeds_may_be_made():
    decision = decide_to_stop(made(seeds=2), study())
    assert (decision.stop, decision.why, decision.seeds) == (False, "The next look is at 3 seeds.", 3)
    assert decide_to_stop([], study()).seeds == 3
    assert decide_to_stop(made(), study(sequential=None)).seeds == 8
    assert decide_to_stop([], study(sequential=SequentialPlan((20, 40)))).seeds == 8


def test_a_look_waits_for_every_run_of_its_seeds():
    all_but_one = [run for run in made(0.4, seeds=3) if (run.arm, run.seed) != ("inverse", 1)]
    assert not decide_to_stop(all_but_one, study()).stop


def test_a_large_gain_ends_the_study_at_the_first_look():
    decision = decide_to_stop(made(0.35, seeds=3), study())
    assert (decision.stop, decision.seeds) == (True, 3)
    assert decision.why == "Decided at the look at 3 seeds (pgpo: yes)."
    # With more runs than the look has, it is still the look that decided.
    assert decide_to_stop(made(0.35), study()) == decision


def test_what_is_not_resolved_goes_on_to_the_last_look():
    unclear = made(0.015)
    first = [run for run in unclear if run.seed < 3]
    assert decide_to_stop(first, study()).seeds == 6
    # The arm's own control is missing its counterpart in the middle: not resolved there either.
    assert decide_to_stop(unclear, study()).why in (
        "The look at 8 seeds was the last one.",
        "Decided at the look at 8 seeds (pgpo: no).",
    )


def test_several_conditions_end_by_their_pooled_answer():
    both = study(conditions={"one": {}, "two": {}})
    found = made(0.35, seeds=3) + made(0.35, seeds=3, study="two")
    assert decide_to_stop(found, both).why == "Decided at the look at 3 seeds (pgpo: yes)."
    # Nothing is pooled where the baseline does not learn, and without an answer nothing ends early.
    flat = [replace(run, questions=dict.fromkeys(run.questions, run.questions["0"])) for run in found]
    assert decide_to_stop(flat, both).seeds == 6


def test_runs_are_admitted_look_by_look_with_those_that_they_read():
    arms = {"sdpo": {}, "pgpo": {}, "constant": {}, "replayed": {"run": "{run:pgpo:next}"}}
    planned = study(arms=arms)
    records = {f"{run.study}/{run.arm}/seed={run.seed}": run for run in made(0.0) if run.arm in arms}
    looks = Looks(planned, planned.runs(), lambda run: records[run.name])
    looks.update(set())
    within = {name for name in records if name.endswith(("seed=0", "seed=1", "seed=2"))}
    assert looks.admitted == within | {"one/pgpo/seed=3"}
    looks.update(within)  # one that is read is missing
    assert len(looks.admitted) == 13
    looks.update(within | {"one/pgpo/seed=3"})
    assert {name.rpartition("=")[2] for name in looks.admitted} == set("0123456")
    assert not looks.decision.stop
    everything = Looks(study(sequential=None), planned.runs(), lambda run: records[run.name])
    assert everything.admitted == set(records)


@pytest.mark.parametrize("looks", [[5, 5], "5", None])
def test_a_file_with_wrong_looks_is_refused(tmp_path, looks):
    from tests.unit.studies.test_spec import spec

    with pytest.raises(ValueError, match=r"Expected `looks` .*, in `sequential`\."):
        spec(tmp_path, sequential={"looks": looks})
