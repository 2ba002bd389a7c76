"""Every rule fires on what it is meant for, says why, and stays silent on its neighbours."""

import dataclasses
import math
import random
import re

import pytest
import torch

from pgpo_lightning.core.types import Sample
from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.modules import SDPO
from pgpo_lightning.monitoring.collapse_rules import RULES, TAGS, CollapseRules, alarms, medians, signs
from pgpo_lightning.monitoring.run_record import CURVES
from pgpo_lightning.rewards import BoxedAnswer
from tests.support.helpers import build, prepare, questions

LN2 = math.log(2)
RUN = {
    "critic/score/mean": [0.5] * 10,
    "self_distillation/reprompt_sample_fraction": [0.9] * 10,
    "rollout/neg_log_prob": [0.1] * 10,
    "response_length/mean": [20.0] * 10,
    "response_length/max": [30.0] * 10,
    "response_length/clip_ratio": [0.0] * 10,
    "actor/grad_norm": [0.2] * 10,
    "lr/at_bound": [0.0] * 10,
    "self_distillation/divergence": [0.02] * 10,
    "self_distillation/divergence_bound": [math.log(2)] * 10,
}


def curves(evaluations=None, **changes):
    """A calm run of ten steps; a change replaces the end of the one curve whose tag ends so."""
    scalars = {}
    for tag, values in RUN.items():
        end = next((change for name, change in changes.items() if tag.replace("/", "_").endswith(name)), [])
        scalars[tag] = dict(enumerate([*values[: len(values) - len(end)], *end], start=1))
    return scalars | ({"val/avg@8": evaluations, "val/pass@8": {0: 0.1}} if evaluations else {})


FIRING = {
    "reward": ({"score_mean": [0.14] * 4}, "the reward of rollouts fell to 0.14, below 0.3 of its best 0.5"),
    "teacher-lost": (
        {"sample_fraction": [0.44] * 4},
        "the fraction of rollouts with a teacher fell to 0.44, below 0.5 of its best 0.9",
    ),
    "score": (
        {"evaluations": {0: 0.5, 5: 0.6, 10: 0.29}},
        "the held-out score fell to 0.29, below 0.5 of its best 0.6",
    ),
    "entropy-rises": (
        {"neg_log_prob": [0.21] * 4},
        "the entropy of rollouts rose to 0.21 nats a token, above 2 times its start 0.1",
    ),
    "rho-at-bound": (
        {"at_bound": [1.0] * 4, "neg_log_prob": [0.13] * 4},
        "rho was at its upper bound in most of the last steps while the entropy of rollouts rose to 0.13 nats a token, above "
        "1.25 times its start 0.1: the student becomes random, and the feedback is not more informative than before",
    ),
    "entropy-vanishes": (
        {"neg_log_prob": [0.009] * 4},
        "the entropy of rollouts fell to 0.009 nats a token, below 0.1 of its start 0.1, while the reward changed by +0",
    ),
    "length-tail": (
        {"length_max": [66.0] * 4},
        "the longest response has 3.3 times the mean length, above 3.2, from 1.5 at the start",
    ),
    "cut-off": (
        {"clip_ratio": [0.11] * 4},
        "the fraction of responses that are cut off rose to 0.11, more than 0.1 above its start 0",
    ),
    "no-gradient": (
        {"grad_norm": [0.009] * 4},
        "the gradient norm fell to 0.009, below 0.05 of its start 0.2, while the reward stood at 0.5",
    ),
    "teacher-gap": (
        {"divergence": [0.061] * 4},
        "the divergence from the teacher rose to 0.061 nats a token, above 3 times its start 0.02",
    ),
}


def test_a_calm_run_raises_nothing_at_any_step():
    scalars = curves(evaluations={0: 0.5, 5: 0.55, 10: 0.45})
    assert [alarms(scalars, step, CollapseRules()) for step in range(11)] == [{}] * 11


@pytest.mark.parametrize("rule", FIRING)
def test_a_rule_fires_alone_and_gives_its_numbers(rule):
    changes, reason = FIRING[rule]
    assert alarms(curves(**changes), 10, CollapseRules()) == {rule: reason}


@pytest.mark.parametrize("rule", [rule for rule in FIRING if rule != "score"])
def test_three_odd_steps_of_seven_are_not_enough(rule):
    changes = {name: [*values[:3], RUN[tag][0]] for name, values in FIRING[rule][0].items() for tag in RUN
               if tag.replace("/", "_").endswith(name)}  # fmt: skip
    scalars = curves(**changes)
    assert [alarms(scalars, step, CollapseRules()) for step in range(7, 11)] == [{}] * 4


@pytest.mark.parametrize("rule", [*FIRING, "broken-teacher"])
def test_a_rule_sees_nothing_of_the_future(rule):
    changes = FIRING.get(rule, ({"divergence": [0.4] * 10}, ""))[0]
    whole = curves(**changes)
    for now in range(11):
        seen = {tag: {s: v for s, v in points.items() if s <= now} for tag, points in whole.items()}
        assert alarms(whole, now, CollapseRules()) == alarms(seen, now, CollapseRules())
        assert signs(whole, now, CollapseRules()) == signs(seen, now, CollapseRules())


@pytest.mark.parametrize(
    ("rule", "off"),
    [
        ("reward", "reward_fall"), ("teacher-lost", "teacher_fall"), ("score", "score_fall"),
        ("rho-at-bound", "entropy_rise_at_bound"),
        ("entropy-rises", "entropy_rise"), ("entropy-vanishes", "entropy_vanish"), ("length-tail", "length_tail"),
        ("cut-off", "cut_off_rise"), ("no-gradient", "gradient_vanish"), ("teacher-gap", "gap_growth"),
    ],
)  # fmt: skip
def test_a_rule_can_be_switched_off(rule, off):
    assert alarms(curves(**FIRING[rule][0]), 10, CollapseRules(**{off: None})) == {}


def test_every_rule_is_tested():
    assert {*FIRING, "broken-teacher"} == set(RULES)


def test_rules_read_only_what_the_record_of_a_run_keeps():
    assert set(TAGS) <= set(CURVES)
    assert set(TAGS) == set(RUN)


def test_no_rule_fires_before_the_warm_up():
    bad = {tag: dict(enumerate(values, start=1)) for tag, values in {
        "critic/score/mean": [0.5, 0.0, 0.0, 0.0, 0.0], "rollout/neg_log_prob": [0.1, 0.9, 0.9, 0.9, 0.9],
    }.items()}  # fmt: skip
    rules = CollapseRules(warm_up=4, window=3)
    assert [list(alarms(bad, step, rules)) for step in range(1, 6)] == [[], [], [], ["reward"], ["reward"]]
    # The start is the median of the warm-up: what happened within it is no change.
    assert "entropy-rises" not in alarms(bad, 5, rules)


def test_a_fall_within_the_first_steps_is_measured_from_the_first():
    curve = {"critic/score/mean": {1: 0.5, 2: 0.1, 3: 0.05}}
    assert [list(alarms(curve, step, CollapseRules())) for step in (2, 3)] == [[], ["reward"]]


def test_growing_certain_is_no_sign_when_the_reward_grows():
    assert alarms(curves(neg_log_prob=[0.009] * 4, score_mean=[0.6] * 4), 10, CollapseRules()) == {}


def test_no_gradient_is_no_sign_when_the_reward_grows_or_all_is_solved():
    assert alarms(curves(grad_norm=[0.0] * 4, score_mean=[0.6] * 4), 10, CollapseRules()) == {}
    solved = curves(grad_norm=[0.0] * 4)
    solved["critic/score/mean"] = dict.fromkeys(range(1, 11), 0.95)
    assert alarms(solved, 10, CollapseRules()) == {}


def test_lengths_that_are_uneven_by_nature_are_judged_by_their_growth():
    uneven = curves()
    uneven["response_length/max"] = {**dict.fromkeys(range(1, 7), 70.0), **dict.fromkeys(range(7, 11), 100.0)}
    assert alarms(uneven, 10, CollapseRules()) == {}
    uneven["response_length/max"] |= dict.fromkeys(range(7, 11), 110.0)
    assert list(alarms(uneven, 10, CollapseRules())) == ["length-tail"]


def test_short_responses_are_no_sign():
    assert alarms(curves(length_mean=[8.0] * 5, length_max=[12.0] * 5), 10, CollapseRules()) == {}


def test_a_score_near_zero_has_nothing_to_lose():
    scalars = {
        "critic/score/mean": dict(enumerate([0.04, 0.02, 0.03, 0.0, 0.0, 0.0, 0.0], start=1)),
        "val/avg@8": {0: 0.04, 5: 0},
    }
    assert alarms(scalars, 7, CollapseRules()) == {}
    assert list(alarms(scalars, 7, CollapseRules(floor=0.02))) == ["reward", "score"]


def test_curves_that_are_missing_empty_or_not_numbers_are_silent():
    nan = {tag: dict.fromkeys(range(1, 9), math.nan) for tag in RUN}
    for scalars in ({}, {tag: {} for tag in RUN}, nan):
        assert alarms(scalars, 9, CollapseRules()) == {}
        assert signs(scalars, 9, CollapseRules()) == {}
    zeros = {tag: dict.fromkeys(range(1, 9), 0.0) for tag in RUN} | {"val/avg@8": {0: 0.0, 8: 0.0}}
    assert alarms(zeros, 9, CollapseRules()) == {}
    zeros["self_distillation/divergence_bound"] = {1: math.log(2)}
    assert signs(zeros, 9, CollapseRules()) == {"cut_off_rise": 0.0, "divergence_of_bound": 0.0}


def test_signs_are_what_rules_compare():
    scalars = curves(
        score_mean=[0.25] * 4, sample_fraction=[0.45] * 4, neg_log_prob=[0.3] * 4, grad_norm=[0.1] * 4, length_max=[50.0] * 4,
        clip_ratio=[0.2] * 4, divergence=[0.04] * 4, evaluations={0: 0.4, 10: 0.3},
    )  # fmt: skip
    assert signs(scalars, 10, CollapseRules()) == pytest.approx(
        {
            "reward_of_best": 0.5,
            "teacher_of_best": 0.5,
            "entropy_of_start": 3.0,
            "gradient_of_start": 0.5,
            "gap_of_start": 2.0,
            "length_tail": 2.5,
            "cut_off_rise": 0.2,
            "divergence_of_bound": 0.02 / math.log(2),
            "score_of_best": 0.75,
        }
    )


def test_the_median_runs():
    assert medians([3.0, 1.0, 2.0, 9.0, 9.0], 3) == [3.0, 2.0, 2.0, 2.0, 9.0]
    assert medians([], 3) == []


@pytest.mark.parametrize("changes", [{"at_bound": [1.0] * 4}, {"neg_log_prob": [0.13] * 4}])
def test_rho_at_its_bound_and_a_rising_entropy_are_no_alarm_alone(changes):
    assert alarms(curves(**changes), 10, CollapseRules()) == {}


def test_the_collapse_of_a_real_model_is_seen():
    """Measured: a harmful teacher, the student's entropy from 1.6 to 4.0 nats, rho at its bound of 2."""
    scalars = {"rollout/neg_log_prob": {1: 1.6, 2: 2.4, 3: 4.0}, "lr/at_bound": {1: 0.0, 2: 1.0, 3: 1.0}}
    assert alarms(scalars, 3, CollapseRules()) == {}  # the start is the median of the first three
    later = {tag: points | {step: max(points.values()) for step in range(4, 7)} for tag, points in scalars.items()}
    assert list(alarms(later, 6, CollapseRules())) == ["rho-at-bound"]


# --------------------------------------------------------------------------------------------- a broken teacher


def first(step, value, bound=LN2):
    found = {"self_distillation/divergence": {step: value}}
    return found if bound is None else found | {"self_distillation/divergence_bound": {step: bound}}


def test_a_broken_teacher_is_told_by_the_first_step_alone():
    assert list(alarms(first(1, 0.35), 1, CollapseRules())) == ["broken-teacher"]
    assert alarms(first(1, 0.34), 1, CollapseRules()) == {}
    assert alarms(first(2, 0.35), 2, CollapseRules()) == {}
    assert alarms(first(1, 0.35), 1, CollapseRules(broken_teacher=None)) == {}


def test_what_is_a_broken_teacher_depends_on_the_largest_divergence_there_is():
    assert alarms(first(1, 5.0, None), 1, CollapseRules()) == {}  # a KL has none
    bound = Divergence(0.1).bound
    assert bound == pytest.approx(0.3251, abs=1e-4)
    assert alarms(first(1, 0.16, bound), 1, CollapseRules()) == {}
    assert "above 0.5 of its largest value 0.325" in alarms(first(1, 0.17, bound), 1, CollapseRules())["broken-teacher"]


@pytest.mark.parametrize("broken", ["none", "shifted", "other weights"])
def test_the_toy_model_and_its_teacher_broken_in_two_ways(broken):
    """Measured on the shipped model: what a whole teacher says at the first step, and what broken ones say."""
    module = build(
        SDPO,
        "toy",
        BoxedAnswer(),
        max_prompt_length=64,
        max_reprompt_len=160,
        max_response_length=24,
        num_generations=8,
        seed=1,
    )
    module.configure_model()
    if broken == "other weights":
        for parameter in module.teacher.model.parameters():
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        rollouts = module.sample(questions(8), 8, module.training_sampling)
    rows = [Sample(rollout, verdict) for rollout, verdict in zip(rollouts, module.judge(rollouts), strict=True)]
    prepare(module, rows, random.Random(0))
    rows = [row for row in rows if module.objective.in_loss(row)]
    if broken == "shifted":  # the teacher answers for the token before
        whole = module.teacher.sources
        module.teacher.sources = lambda *given: [
            dataclasses.replace(s, hidden=s.hidden.roll(1, 0)) for s in whole(*given)
        ]
    _, statistics, _ = module.learner._micro_batch(module.objective.routes(rows)[0], rows, 1 / len(rows))
    divergence = statistics.divergence.mean().item()
    fired = alarms(first(1, divergence), 1, CollapseRules())
    assert bool(fired) == (broken != "none"), divergence


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "Expected `window` to be at least 1, but got 0."),
        ({"warm_up": 0}, "Expected `warm_up` to be at least 1, but got 0."),
        ({"reward_fall": 1.5}, "Expected `reward_fall` to lie in [0, 1], but got 1.5."),
        ({"entropy_rise": 0.5}, "Expected `entropy_rise` to be at least 1, but got 0.5."),
        ({"length_tail": math.nan}, "Expected `length_tail` to be at least 0 and finite, but got nan."),
        ({"gap_growth": math.inf}, "Expected `gap_growth` to be at least 1 and finite, but got inf."),
    ],
)
def test_thresholds_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CollapseRules(**settings)
