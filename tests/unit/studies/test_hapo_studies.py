"""The studies of HAPO have the arms and controls that their comments promise."""

import pytest

from pgpo_lightning.studies.spec import read_study
from tests.support import CONFIGS

MATCHED = {"random": ["hapo-0.8"], "random-injected": ["hapo-0.8"], "random-0.2": ["hapo-0.2"]}


@pytest.mark.parametrize("study", ["hapo", "hapo-rare"])
def test_the_studies_have_the_arms_and_controls_that_they_say(study):
    spec = read_study(CONFIGS / "studies" / f"{study}.yaml")
    runs = spec.runs()
    assert len(runs) == len(spec.conditions) * len(spec.arms) * 5
    first = spec.seeds[0]
    by_arm = {run.arm: run for run in runs if run.seed == first}
    assert by_arm["grpo"].settings["model"]["init_args"]["policy_gradient"][
        "norm_adv_by_std_in_grpo"
    ]  # as HAPO by default
    for arm, run in by_arm.items():
        assert run.needs == tuple(f"{run.condition}/{of}/seed={first}" for of in MATCHED.get(arm, ()))
