"""Gaps of the self-teacher before training, and the line from gaps to gains: closed forms, published points, a fake model."""

import json
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import t as student_t

from pgpo_lightning.commands.main import main
from pgpo_lightning.commands.probe import calibrate, dumps, measure, save
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.data.toy import solution
from pgpo_lightning.modules import SDPO
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.probe.calibration import Point, bootstrap, points
from pgpo_lightning.probe.contexts import CONTEXTS, CONTROLS, answers, contexts, effective, others, wrong
from pgpo_lightning.probe.gaps import gap, kept, question_draws, ratio
from pgpo_lightning.probe.line import fit, lines, reliability
from pgpo_lightning.probe.measure import Prober, write
from pgpo_lightning.rewards import BoxedAnswer
from pgpo_lightning.rollout.engine import Engine, Sampling
from pgpo_lightning.studies.spec import read_study
from pgpo_lightning.teachers.reprompt import RepromptBuilder
from tests.support import CONFIGS
from tests.support.helpers import build, tiny_sdpo

QUICKSTART = CONFIGS / "quickstart.yaml"

# ------------------------------------------------------------------------------------------------ gaps


def tables(questions=60, samples=8, seed=0):
    """Scores of student, plain teacher and a teacher that 30 % of the rollouts do not have."""
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(0, 1, (questions, 1))
    draw = lambda p: (rng.random((questions, samples)) < p).astype(float)  # noqa: E731
    student, none, teacher = draw(difficulty), draw(difficulty), draw(difficulty**0.3)
    return student, none, np.where(rng.random(teacher.shape) < 0.3, np.nan, teacher)


def test_gaps_are_sums_over_rollouts():
    student, none, teacher = tables()
    made = gap(student, none, teacher, 0.5, question_draws(len(student)))
    count = net = net_failed = recovered = again = failed = 0
    for s, n, t in zip(student.flat, none.flat, teacher.flat, strict=True):
        shown = n if np.isnan(t) else t
        count += 1
        net += shown - n
        if s == 0:
            failed += 1
            net_failed += shown - n
            recovered += shown
            again += n
    assert made.net.value == pytest.approx(net / count)
    assert made.net_failed.value == pytest.approx(net_failed / count)
    assert made.recovery.value == pytest.approx(recovered / failed)
    assert made.recovery_net.value == pytest.approx((recovered - again) / failed)
    assert made.coverage == pytest.approx(1 - np.isnan(teacher).mean())
    # g = (1 - acc_S) * (rec - rec_none) where successes keep the prompt, and g(c) = net + g(none)
    assert made.net_failed.value == pytest.approx((1 - student.mean()) * made.recovery_net.value)
    resampled = gap(student, none, none, 0.5, question_draws(len(student)))
    assert resampled.net.value == resampled.net.error == 0
    assert made.gap.value == pytest.approx(made.net.value + resampled.gap.value)


def test_the_error_is_that_of_paired_questions():
    student, none, teacher = tables(questions=300)
    made = gap(student, none, teacher, 0.5, question_draws(len(student)))
    assert made.net.error == pytest.approx(made.by_question.std() / 300**0.5, rel=0.08)
    unpaired = (np.where(np.isnan(teacher), none, teacher).mean(axis=1).var() + none.mean(axis=1).var()) / 300
    assert made.net.error < 0.7 * unpaired**0.5


def test_a_context_that_nobody_gets_brings_exactly_nothing():
    student, none, teacher = tables()
    made = gap(student, none, np.full_like(teacher, np.nan), 0.5, question_draws(len(student)))
    assert (made.coverage, made.net.value, made.net.error, made.recovery_net.value) == (0, 0, 0, 0)


def test_without_failures_there_is_no_recovery():
    ones = np.ones((4, 2))
    made = gap(ones, ones, ones, 0.5, question_draws(4))
    assert np.isnan([made.recovery.value, made.coverage_failed]).all()
    assert made.net_failed.value == 0
    assert np.isnan(ratio(np.ones(3), np.zeros(3), question_draws(3)).value)


def test_tables_have_one_shape_and_the_control_covers_all():
    student, none, teacher = tables()
    with pytest.raises(ValueError, match="Expected tables of one shape"):
        gap(student, none[:-1], teacher, 0.5, question_draws(60))
    with pytest.raises(ValueError, match="Expected `none` to cover every rollout"):
        gap(student, teacher, teacher, 0.5, question_draws(60))


def test_what_a_control_keeps():
    whole = np.array([0.5, 0.25, 0.0, 0.25])
    assert kept(whole / 2, whole, question_draws(4)) == pytest.approx((0.5, 0.5, 0.5))
    assert np.isnan(kept(whole, 0 * whole, question_draws(4))[0])


# ------------------------------------------------------------------------------------------------ the line

PUBLISHED = {  # read off the figures of arXiv 2605.30070; slope (the paper's: 1.492, .663, 1.508), LOO RMSE, LOO R2 and R2
    "Qwen3-8B": (
        [(-0.004, 0.004), (0.006, -0.012), (0.0275, 0.027), (0.0535, 0.106), (0.0725, 0.0935), (0.137, 0.2005)],
        (1.499, 0.0215, 0.913, 0.950),
    ),
    "Olmo-3-7B": ([(-0.001, 0), (0.0555, 0.045), (0.174, 0.1175)], (0.662, 0.0146, 0.909, 0.995)),
    "scale": ([(0.058, 0.071), (0.103, 0.142), (0.1355, 0.177), (0.1375, 0.2005)], (1.500, 0.0134, 0.925, 0.977)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_lines_of_the_published_points(name):
    given, (slope, rmse, loo_r2, r2) = PUBLISHED[name]
    line = fit(*np.array(given).T)
    assert line.slope == pytest.approx(slope, abs=5e-4)
    assert line.loo_rmse == pytest.approx(rmse, abs=5e-5)
    assert line.loo_r2 == pytest.approx(loo_r2, abs=5e-4)
    assert line.r2 == pytest.approx(r2, abs=5e-4)


def test_one_published_point_carries_the_fit():
    line = fit(*np.array(PUBLISHED["Qwen3-8B"][0]).T)
    assert line.leverage.max() == pytest.approx(0.75, abs=5e-3)
    assert line.leverage.sum() == pytest.approx(2)
    assert line.scatter == pytest.approx(0.020, abs=5e-4)
    value, half = line.predict(0.05)
    assert half == pytest.approx(0.06, abs=1e-3)
    assert value == pytest.approx(line.intercept + 0.05 * line.slope)


def test_left_out_errors_are_those_of_refits():
    g, d = np.array(PUBLISHED["Qwen3-8B"][0]).T
    line = fit(g, d)
    for i in range(len(g)):
        others = np.arange(len(g)) != i
        again = fit(g[others], d[others])
        assert line.left_out[i] == pytest.approx(d[i] - again.intercept - again.slope * g[i])
    assert line.loo_constant == pytest.approx(
        np.sqrt(np.mean([(d[i] - np.delete(d, i).mean()) ** 2 for i in range(6)]))
    )


def test_the_prediction_interval_is_the_textbook_one():
    g, d = np.array(PUBLISHED["scale"][0]).T
    x = np.column_stack([np.ones(4), g])
    residuals = d - x @ np.linalg.lstsq(x, d, rcond=None)[0]
    new = np.array([1, 0.1])
    half = student_t.isf(0.025, 2) * np.sqrt(residuals @ residuals / 2 * (1 + new @ np.linalg.inv(x.T @ x) @ new))
    assert fit(g, d).predict(0.1)[1] == pytest.approx(half)


def test_the_interval_covers_new_configurations():
    rng = np.random.default_rng(1)
    g, hits = np.array([0.0, 0.02, 0.05, 0.1, 0.12]), 0
    for _ in range(2000):
        line = fit(g, 0.01 + 1.5 * g + 0.02 * rng.standard_normal(5))
        value, half = line.predict(0.07)
        hits += abs(0.01 + 1.5 * 0.07 + 0.02 * rng.standard_normal() - value) < half
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("outside", [-0.01, 0.14])
def test_no_silent_extrapolation(outside):
    line = fit(*np.array(PUBLISHED["Qwen3-8B"][0]).T)
    with pytest.raises(ValueError, match="calibrated range"):
        line.predict(outside)
    assert line.predict(outside, extrapolate=True)[1] > line.predict(0.05)[1]


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="at least 3 configurations"):
        fit(np.array([0.0, 0.1]), np.array([0.0, 0.1]))
    with pytest.raises(ValueError, match="at least 3 different gaps"):
        fit(np.array([0.0, 0.1, 0.1]), np.array([0.0, 0.1, 0.2]))


def test_many_lines_at_once_are_single_ones():
    rng = np.random.default_rng(0)
    g, d = rng.random((3, 5)), rng.random((3, 5))
    intercepts, slopes = lines(g, d)
    assert slopes[1] == pytest.approx(fit(g[1], d[1]).slope)
    assert intercepts[2] == pytest.approx(fit(g[2], d[2]).intercept)
    assert reliability(np.array([0.0, 0.1, 0.2]), 0.05**2) == pytest.approx(0.75)


# ------------------------------------------------------------------------------------------------ contexts and controls

BUILDER = RepromptBuilder(
    success_reward_threshold=0.5,
    demonstration_choice="shared",
    dont_reprompt_on_self_success=True,
    remove_thinking_from_demonstration=True,
    include_environment_feedback=True,
    environment_feedback_only_without_solution=True,
    max_reprompt_len=160,
    reprompt_template="{prompt}|{solution}|{feedback}",
    solution_template="S:{successful_previous_attempt}",
    feedback_template="F:{feedback_raw}",
)


def question(index, a=3, b=4, c=5):
    return Question(f"{a}*{b}+{c}?", str(a * b + c), index=index, columns={"a": a, "b": b, "c": c})


def row(asked, text, reward, feedback=None):
    return Sample(Rollout(asked, [1], [2], torch.zeros(1), text, True), Verdict(reward, feedback))


def reprompts(context):
    ids = lambda messages: [ord(c) for c in messages[-1]["content"]]  # noqa: E731
    asked = question(0)
    rows = [row(asked, "right", 1.0), row(asked, "wrong", 0.0, "no"), row(asked, "also", 1.0)]
    import random

    context.builder.attach(rows, ids, lambda t: [ord(c) for c in t], lambda i: "".join(map(chr, i)), random.Random(0))
    return [made.reprompt for made in rows]


def test_what_each_context_tells_the_teacher():
    asked = contexts(list(CONTEXTS), {"careful": "{prompt}!!", "tale": "{prompt}<{feedback}>"}, [], BUILDER)
    told = {context.name: reprompts(context) for context in asked}
    assert told["none"] == ["3*4+5?"] * 3
    assert told["feedback"] == [None, "3*4+5?||F:no", None]
    assert told["own"] == ["3*4+5?|S:right|", None, "3*4+5?|S:also|"]
    assert told["own+feedback"] == ["3*4+5?|S:right|", "3*4+5?||F:no", "3*4+5?|S:also|"]
    assert told["careful"] == ["3*4+5?!!"] * 3
    assert told["tale"] == [None, "3*4+5?<F:no>", None]
    first, failed, last = told["sibling"]
    assert (first, last) == ("3*4+5?|S:also|", "3*4+5?|S:right|")
    assert failed in (first, last)
    assert told["sibling+feedback"] == [first, failed + "F:no", last]
    assert told["configured"] == told["sibling"]


def test_none_is_always_measured_and_names_are_checked():
    assert [context.name for context in contexts(["own"], {}, ["wrong"], BUILDER)] == ["none", "own", "wrong"]
    for given, message in [
        ((["peer"], {}, []), "`contexts` to be among"),
        ((["own", "own"], {}, []), "once"),
        (([], {}, ["leak"]), "`controls` to be among"),
        (([], {"own": "{prompt}"}, []), "names that are taken|that are taken"),
        (([], {"a/b": "{prompt}"}, []), "letters, digits"),
        (([], {"mine": "no placeholder"}, []), "`templates.mine` to contain the placeholder {prompt}"),
    ]:
        with pytest.raises(ValueError, match=message):
            contexts(*given, BUILDER)


def test_a_configuration_that_shows_no_demonstration_is_probed_as_it_is():
    bare = replace(BUILDER, demonstration_source="none", reprompt_template="{prompt} Careful: {feedback}")
    told = {context.name: reprompts(context) for context in contexts(["feedback", "configured"], {}, [], bare)}
    assert told["configured"] == told["feedback"] == [None, "3*4+5? Careful: F:no", None]
    for names, controls, culprit in ((["sibling"], [], "sibling"), ([], ["wrong"], "wrong")):
        with pytest.raises(ValueError, match=f"placeholder {{solution}}.* does not go with {culprit}: leave that out"):
            contexts(names, {}, controls, bare)


def test_settings_without_effect_do_not_tell_contexts_apart():
    plain = asdict(contexts(["sibling"], {}, [], BUILDER)[1].builder)
    assert effective(plain) == effective(plain | {"feedback_template": "?{feedback_raw}"})
    assert effective(plain) != effective(plain | {"solution_template": "?{successful_previous_attempt}"})
    assert "environment_feedback_only_without_solution" not in effective(plain)


def test_arms_of_the_study_are_the_contexts_of_the_probe():
    """What is measured under a name is what is trained under it."""
    study = read_study(CONFIGS / "studies" / "probe.yaml")
    base = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]
    defaults = {"dont_reprompt_on_self_success": True, "remove_thinking_from_demonstration": True}
    defaults |= {
        "demonstration_choice": "shared",
        "include_environment_feedback": True,
        "success_reward_threshold": 0.5,
    }
    defaults |= {"environment_feedback_only_without_solution": True}
    module = tiny_sdpo()
    names = {field.name for field in fields(RepromptBuilder)}
    configured = asdict(module.objective.teaching.builder) | {
        name: value for name, value in base.items() if name in names
    }
    assert defaults.items() <= configured.items()
    templates = {"instruction": "{prompt}\n\nCorrectly solve the original question."}
    known = {c.name: c.settings for c in contexts(list(CONTEXTS), templates, [], RepromptBuilder(**configured))}
    assert set(study.arms) == set(known) - {"configured"}
    for name, settings in study.arms.items():
        trained = configured | settings["model"]["init_args"]
        assert {"control": None, **effective(trained)} == known[name], name


def test_controls():
    right, slip = solution(3, 4, 5), solution(3, 4, 5, error=1)
    other = question(1, 2, 6, 8)
    rows = [row(question(0), right, 1.0), row(question(0), slip, 0.0)]
    rows += [row(other, solution(2, 6, 8), 1.0), row(other, "?", 0.0)]
    made = answers(rows, 0.5, BoxedAnswer())
    assert [r.rollout.text for r in made] == ["\\boxed{17}", slip, "\\boxed{20}", "?"]
    made = wrong(rows, 0.5, BoxedAnswer())
    assert [r.verdict.reward >= 0.5 for r in made] == [False, True, False, True]
    made = others(rows, 0.5, BoxedAnswer())
    assert [(r.rollout.question.index, r.rollout.text) for r in made] == [
        (0, solution(2, 6, 8)),
        (0, "?"),
        (1, right),
        (1, slip),
    ]
    assert [r.verdict.reward for r in made] == [1.0, 0.0, 1.0, 0.0]
    assert rows[0].rollout.text == right
    alone = others(rows[:2], 0.5, BoxedAnswer())
    assert all(r.verdict.reward < 0.5 for r in alone)


def test_an_answer_that_a_verifier_cannot_bear_cut_is_left_whole():
    def code(asked, text):
        if not text.startswith("def"):
            raise SyntaxError(text)
        return 1.0

    (made,) = answers([row(question(0), "def f(x): return x", 1.0)], 0.5, code)
    assert made.rollout.text == "def f(x): return x"


# ------------------------------------------------------------------------------------------------ the prober


class Parrot(Engine):
    """Copies a demonstration; without one it is right two times of four, and three times if the prompt says so."""

    def __init__(self, stop_after=None):
        self.calls, self.left = [], stop_after

    def generate(self, model, tokenizer, questions, prompts, n, sampling):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        made = []
        for asked, ids in zip(questions, prompts, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            self.calls.append((asked.index, n))
            for i in range(n):
                a, b, c = (asked.columns[name] for name in "abc")
                said = solution(a, b, c, error=0 if i < 2 + ("!!" in text) else 1)
                if "Correct solution:" in text:
                    said = text.split("Correct solution:\n\n")[1].split("\n\nCorrectly")[0].split("\nThe following")[0]
                made.append(Rollout(asked, ids, ids[:5], torch.zeros(5), said, True))
        return made


SETTINGS = {
    "split": "validation",
    "module": {"model": "parrot", "verifier": "boxed", "dont_reprompt_on_self_success": True},
}


def prober(folder, engine, count=4, **settings):
    module = tiny_sdpo(verifier=BoxedAnswer(feedback=True), engine=engine, max_reprompt_len=300)
    asked = [question(i, 2 + i, 3, 7) for i in range(count)]
    return Prober(module, asked, 4, Sampling(12), 2, 5, folder, {"split": "validation"} | settings)


def probed(folder, engine=None, **settings):
    made = prober(folder, engine or Parrot(), **settings)
    asked = contexts(
        [name for name in CONTEXTS if name != "configured"],
        {"careful": "{prompt}!!"},
        list(CONTROLS),
        made.module.objective.teaching.builder,
    )
    return measure(made, asked, SETTINGS)


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    return probed(tmp_path_factory.mktemp("parrot"))


def test_gaps_of_a_parrot(parrot):
    content = parrot
    rows = {made["name"]: made for made in content["contexts"]}
    assert content["student"]["score"]["value"] == 0.5
    nets = {name: made["net"]["value"] for name, made in rows.items()}
    # `careful` saves one sample of four. Without the answer the parrot is lost, with it it needs no steps.
    assert (nets["none"], nets["careful"], nets["sibling"], nets["sibling+feedback"]) == (0, 0.25, 0.5, 0.5)
    assert (nets["answer"], nets["wrong"], nets["other"]) == (0.5, -0.5, -0.5)
    assert rows["feedback"]["coverage"] == 0.5
    assert rows["feedback"]["coverage_failed"] == 1
    assert rows["own"]["coverage_failed"] == 0
    assert rows["own"]["net_failed"]["value"] == 0
    assert rows["sibling"]["recovery"]["value"] == 1
    assert rows["sibling"]["net_failed"]["value"] == 0.5
    assert rows["answer"]["keeps"]["value"] == 1
    assert rows["other"]["keeps"]["value"] == -1
    assert rows["sibling"]["example"]["teacher reads"].count("Correct solution:") == 1
    assert rows["answer"]["example"]["teacher says"].startswith("\\boxed{")


def test_rows_with_the_same_reprompt_are_samples_of_one_prompt(tmp_path):
    engine = Parrot()
    made = prober(tmp_path, engine)
    rows = made.student()
    assert engine.calls == [(i, 4) for i in range(4)]
    engine.calls.clear()
    sibling = contexts(["sibling"], {}, [], made.module.objective.teaching.builder)[1]
    made.teacher(sibling, rows)
    # both successes of a group have the same text, so all four rows have one reprompt
    assert sorted(engine.calls) == [(i, 4) for i in range(4)]


def test_nothing_that_was_computed_is_lost(tmp_path):
    whole = probed(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        probed(tmp_path / "cut", Parrot(stop_after=7))
    parts = sorted((tmp_path / "cut" / "parts").rglob("*.json"))
    assert parts
    engine = Parrot()
    again = probed(tmp_path / "cut", engine)
    strip = lambda content: json.dumps([{**r, "seconds": 0} for r in content["contexts"]])  # noqa: E731
    assert strip(again) == strip(whole)
    total = Parrot()
    probed(tmp_path / "count", total)
    assert 0 < len(engine.calls) < len(total.calls)
    idle = Parrot()
    probed(tmp_path / "cut", idle)
    assert idle.calls == []
    assert not list((tmp_path / "cut").rglob("*.partial"))


def test_parts_of_another_probe_are_not_used(tmp_path):
    probed(tmp_path)
    with pytest.raises(
        ValueError, match=r"student.0000.json to be made with the settings of this probe, but `precision`"
    ):
        probed(tmp_path, precision="bf16-mixed")
    made = prober(tmp_path, Parrot())
    changed = contexts([], {"careful": "{prompt}!!!"}, [], made.module.objective.teaching.builder)[1]
    with pytest.raises(ValueError, match=r"but `context\.reprompt_template` differ"):
        made.teacher(changed, made.student())
    with pytest.raises(ValueError, match="but `questions`, `questions_sha256` differ"):
        prober(tmp_path, Parrot(), count=5).student()
    asked = [one for chunk in made.chunks for one in chunk]
    asked[0].columns["keywords"] = "which only the verifier reads"
    again = Prober(made.module, asked, 4, Sampling(12), 2, 5, tmp_path, {"split": "validation"})
    with pytest.raises(ValueError, match="but `questions_sha256` differ"):
        again.student()
    part = tmp_path / "parts" / "student" / "0000.json"
    for text in (part.read_text()[:100], "[]"):
        part.write_text(text)
        with pytest.raises(ValueError, match=r"student.0000.json to be a part of a probe, but .* Delete it"):
            made.student()


def test_the_report_of_a_probe(parrot, tmp_path, capsys):
    save(parrot, tmp_path)
    text = (tmp_path / "probe.md").read_text()
    assert (
        "| sibling | 1.00 (1.00) | 1.000 | +0.500 ± 0.000 | +0.500 ± 0.000 | +0.500 ± 0.000 | 1.000 (+1.000 ± 0.000) |"
        in text
    )
    assert "`other`: -100% [-100%, -100%] of the net gap of `sibling`" in text
    assert (tmp_path / "probe.png").stat().st_size > 5000
    assert json.loads((tmp_path / "probe.json").read_text())["settings"]["samples"] == 4
    assert "Largest net gap: feedback" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ calibration


def finished(folder, seed, gains):
    """The record of a run whose held-out questions gained so much."""
    scores = {"0": [0.2] * len(gains), "30": [0.2 + gain for gain in gains]}
    RunRecord(folder.parent.parent.name, folder.parent.name, seed, 30, 4, 1.0, 1.0, {}, scores).save(
        folder / "run.json"
    )


def study(content, tmp_path, slope=2.0, noise=0.0):
    """Runs whose gain is 0.01 + slope * gap of their context."""
    root = tmp_path / "study"
    write(root / "probe.json", dumps(content))
    gaps = {made["name"]: made["net"]["value"] for made in content["contexts"] if made["control"] is None}
    rng = np.random.default_rng(0)
    for name in ("none", "careful", "sibling"):
        for seed in (0, 1):
            each = 0.01 + slope * gaps[name] + noise * rng.standard_normal(4)
            finished(root / "base" / name / f"seed={seed}", seed, each.tolist())
    return root, gaps


def test_gains_are_foretold_from_gaps(parrot, tmp_path, capsys):
    root, gaps = study(parrot, tmp_path)
    content = calibrate([str(root)], predict=[0.3], output=str(tmp_path / "out"))
    assert content["slope"] == pytest.approx(2)
    assert content["intercept"] == pytest.approx(0.01)
    assert content["loo_rmse"] == pytest.approx(0, abs=1e-9)
    assert content["range"] == [0, 0.5]
    told = {made["name"]: made for made in content["predictions"]}
    assert told["g = 0.3"]["gain"] == pytest.approx(0.61)
    assert told["feedback"]["gain"] == pytest.approx(0.01 + 2 * gaps["feedback"])
    assert {"own", "own+feedback", "feedback", "g = 0.3"} <= set(told)
    text = (tmp_path / "out" / "calibration.md").read_text()
    assert "**Δ = +0.010 +2.000 g** over 3 configurations" in text
    assert "hangs on none (0.83), sibling (0.83)" in text
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 5000
    assert "Predictions" in capsys.readouterr().out


def test_a_context_beyond_the_calibrated_range_is_not_predicted(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    finished(root / "base" / "feedback" / "seed=0", 0, [0.1] * 4)
    content = json.loads((root / "probe.json").read_text())
    next(made for made in content["contexts"] if made["name"] == "own")["net"]["value"] = 0.9
    (root / "probe.json").write_text(json.dumps(content))
    told = {made["name"]: made for made in calibrate([str(root)], output=str(tmp_path / "out"))["predictions"]}
    assert (told["own"]["gain"], told["own"]["inside"]) == (None, False)
    assert "not predicted" in (tmp_path / "out" / "calibration.md").read_text()
    with pytest.raises(ValueError, match="calibrated range"):
        calibrate([str(root)], predict=[0.9], output=str(tmp_path / "out"))
    told = calibrate([str(root)], predict=[0.9], extrapolate=True, output=str(tmp_path / "out"))["predictions"]
    assert told[0]["gain"] is not None
    assert "outside [+0.000, +0.500]" in (tmp_path / "out" / "calibration.md").read_text()


def test_a_gap_that_foretells_nothing_is_called_so(parrot, tmp_path):
    root, _ = study(parrot, tmp_path, slope=0.0, noise=0.3)
    content = calibrate([str(root)], output=str(tmp_path / "out"))
    assert content["loo_rmse"] > content["loo_constant"]
    assert "foretells no better" in (tmp_path / "out" / "calibration.md").read_text()


def test_a_collapse_is_named_and_fitted_around(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    finished(root / "base" / "feedback" / "seed=0", 0, [-0.19] * 4)
    content = calibrate([str(root)], output=str(tmp_path / "out"))
    assert [made["name"] for made in content["points"] if made["collapsed"]] == ["feedback"]
    assert content["slope"] < 1.5
    assert content["without_collapsed"]["slope"] == pytest.approx(2)
    assert (
        "they started from: feedback. Through the other 3: Δ = +0.010 +2.000 g"
        in (tmp_path / "out" / "calibration.md").read_text()
    )


def test_the_bootstrap_draws_questions_and_seeds(parrot, tmp_path):
    root, _ = study(parrot, tmp_path, noise=0.2)
    found = points([root], None, "all")
    assert [point.name for point in found] == ["careful", "none", "sibling"]
    assert all(point.held_out and point.seeds == (0, 1) for point in found)
    boot = bootstrap(found, draws=4000)
    for i, point in enumerate(found):
        table = point.gain
        rows, columns, cells = table.mean(axis=1).var() / 2, table.mean(axis=0).var() / 4, table
        cells = (table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()).var() / 8
        assert boot.gains[i] == pytest.approx((rows + columns + cells) ** 0.5, rel=0.06)
    low, high = boot.interval(boot.slopes)
    assert low < 2 < high


def point(gap, gain, seeds=(0, 1), questions="same"):
    return Point("run", "c", gap, gain, seeds, (30,) * len(seeds), questions, Path("probe.json"), False, False)


def test_an_error_that_all_gaps_have_in_common_does_not_make_them_unreliable():
    rng = np.random.default_rng(0)
    shared, own = rng.standard_normal(400), rng.standard_normal((3, 400))
    gain = np.zeros((2, 5))
    alike = bootstrap([point(shared + shift, gain) for shift in (0.0, 0.1, 0.2)])
    assert alike.gaps == pytest.approx(400**-0.5, rel=0.1)
    assert alike.noise == pytest.approx(0, abs=1e-12)
    apart = bootstrap([point(shared + own[i], gain) for i in range(3)])
    assert apart.gaps == pytest.approx((2 / 400) ** 0.5, rel=0.15)
    assert apart.noise == pytest.approx(1 / 400, rel=0.15)  # that of `own` alone
    # Other questions: nothing in common.
    other = bootstrap([point(shared + i, gain, questions=str(i)) for i in range(3)])
    assert other.noise == pytest.approx(1 / 400, rel=0.15)


def test_other_seeds_and_questions_are_drawn_independently():
    """With the same draws, two runs whose first seed was the better one would vary together whatever their seeds are."""
    rng = np.random.default_rng(0)
    gain = np.array([[0.1], [0.2]]) + np.zeros((2, 5))
    gap = rng.standard_normal(50)
    spread = lambda *given: bootstrap(list(given), draws=4000).slopes.std()  # noqa: E731
    low, high = point(gap, gain), point(gap + 1, gain)
    assert spread(low, high) == pytest.approx(0, abs=1e-9)
    far = point(gap + 1, gain, seeds=(2, 3))
    assert spread(low, far) == pytest.approx(
        0.1 / 2**0.5 / 2**0.5, rel=0.06
    )  # of the difference of two means of two seeds


def test_runs_find_their_context_by_their_settings(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    content = json.loads((root / "probe.json").read_text())
    module = tiny_sdpo(max_reprompt_len=300)
    none = asdict(contexts([], {}, [], module.objective.teaching.builder)[0].builder)
    settings = {"model": {"init_args": none | {"model": "parrot", "verifier": "boxed"}}}
    folder = root / "base" / "careful" / "seed=0"
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert {point.context for point in points([folder], None, "failed")} == {"none"}  # whatever its folder is called
    settings["model"]["init_args"]["reprompt_template"] = "{prompt} Other"
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(
        ValueError, match=r"none of its 7 contexts has these settings; .* differs in `reprompt_template`"
    ):
        points([folder], None, "all")
    settings["model"]["init_args"] |= {"reprompt_template": "{prompt}!!", "verifier": {"class_path": "strict"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"`model.init_args.verifier` of .*config.yaml to be that of"):
        points([folder], None, "all")
    assert content["contexts"][0]["name"] == "none"
    del settings["model"]["init_args"]["demonstration_choice"]  # a GRPO has none
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"config.yaml to be of a run with a self-teacher"):
        points([folder], None, "all")
    for text in ("trainer: {}", "model: {", ""):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config.yaml to be the configuration of a run, but reading it failed"):
            points([folder], None, "all")


def test_runs_without_what_is_needed_are_refused(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Expected finished runs in"):
        points([tmp_path / "empty"], None, "all")
    with pytest.raises(ValueError, match=r"there is no .*elsewhere"):
        points([root], tmp_path / "elsewhere", "all")
    with pytest.raises(ValueError, match="at least 3 configurations"):
        calibrate([str(root / "base" / "none"), str(root / "base" / "sibling")], output=str(tmp_path / "out"))
    finished(root / "base" / "peer" / "seed=0", 0, [0.1] * 4)
    with pytest.raises(ValueError, match="named after a context"):
        points([root], None, "all")
    shutil.rmtree(root / "base" / "peer")
    RunRecord("base", "none", 5, 30, 4, 1.0, 1.0, {}, {"30": [0.1] * 4}).save(
        root / "base" / "none" / "seed=5" / "run.json"
    )
    with pytest.raises(ValueError, match="evaluated before the first step and at the end"):
        points([root], None, "all")
    finished(root / "base" / "none" / "seed=5", 5, [0.1, 0.1, float("nan"), 0.1])
    with pytest.raises(ValueError, match="scores of none/seed=5 to be numbers"):
        points([root], None, "all")
    shutil.rmtree(root / "base" / "none" / "seed=5")
    content = json.loads((root / "probe.json").read_text())
    next(row for row in content["contexts"] if row["name"] == "sibling")["by_question"][1] = None
    (root / "probe.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`by_question` of sibling in .*probe.json to be numbers"):
        points([root], None, "all")
    for text in ('{"settings": {}, "contexts": 3}', '{"settings": {}, "contexts": []}', "[]", '{"sett'):
        (root / "probe.json").write_text(text)
        with pytest.raises(ValueError, match=r"probe.json to be the result of `pgpo probe`, but reading it failed"):
            points([root], None, "all")


def test_what_the_line_does_not_speak_of(parrot, tmp_path):
    root, _ = study(parrot, tmp_path)
    longer = RunRecord("base", "sibling", 2, 60, 4, 1.0, 1.0, {}, {"0": [0.2] * 4, "60": [0.9] * 4})
    longer.save(root / "base" / "sibling" / "seed=2" / "run.json")
    content = json.loads((root / "probe.json").read_text())
    next(row for row in content["contexts"] if row["name"] == "own")["coverage"] = 0.0
    (root / "probe.json").write_text(json.dumps(content))
    told = calibrate([str(root)], output=str(tmp_path / "out"))
    assert [row["name"] for row in told["predictions"]] == ["feedback", "own+feedback", "sibling+feedback"]
    assert "Runs of 30, 60 steps" in (tmp_path / "out" / "calibration.md").read_text()


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_on_the_toy(tmp_path, capsys):
    words = ["--config", str(QUICKSTART), "--questions", "5", "--samples", "4", "--data.init_args.batch_size", "5"]
    words += ["--contexts", "[sibling]", "--controls", "[wrong]", "--templates.same", "{prompt}"]
    main(["probe", *words, "--output", str(tmp_path)])
    content = json.loads((tmp_path / "probe.json").read_text())
    rows = {made["name"]: made for made in content["contexts"]}
    assert list(rows) == ["none", "sibling", "same", "wrong"]
    assert content["student"]["score"]["value"] == pytest.approx(0.5, abs=0.35)
    # The shipped model follows a demonstration, whether it is right or wrong.
    assert rows["sibling"]["net"]["value"] > 0.2
    assert rows["wrong"]["net"]["value"] < 0
    assert rows["same"]["settings"]["reprompt_template"] == "{prompt}"
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.json")}
    main(["probe", *words, "--output", str(tmp_path), "--model.init_args.optimizer.init_args.lr", "0.5"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.json")} == files
    with pytest.raises(ValueError, match=r"but `module\.max_response_length` differ"):
        main(["probe", *words, "--output", str(tmp_path), "--model.init_args.max_response_length", "20"])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", str(CONFIGS / "ablations" / "grpo.yaml")], "`model` to be a module with a self-teacher"),
        (["--contexts", "[peer]"], "`contexts` to be among none, feedback"),
        (["--top_p", "1.5"], r"`top_p` to lie in \[0.001, 1\]"),
        (["--ckpt_path", "last"], "no `ckpt_path`"),
        (["--output", str(QUICKSTART)], "`output` to be a folder"),
        (["--calibrate", "nowhere", "--output", str(QUICKSTART)], "`output` to be a folder"),
        (["--calibrate=nowhere"], "record of a finished run, but there is no .*nowhere"),
    ],
)
def test_what_the_command_refuses(tmp_path, words, message):
    command = [] if words[0].startswith("--calibrate") else ["--config", str(QUICKSTART), "--output", str(tmp_path)]
    with pytest.raises((ValueError, FileExistsError), match=message):
        main(["probe", *command, *words])
    assert not list(tmp_path.iterdir())


def test_a_run_is_configured_to_a_context():
    for name, settings in CONTEXTS.items():
        module = build(
            SDPO, "toy", BoxedAnswer(), max_prompt_length=64, max_reprompt_len=160, max_response_length=32, **settings
        )
        assert (
            module.objective.teaching.builder == contexts([name], {}, [], module.objective.teaching.builder)[-1].builder
        )
