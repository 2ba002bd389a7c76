"""The estimator study: against all responses listed one by one, the library's own training step, and known variances."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from benchmarks.theory.command import run
from benchmarks.theory.estimator import ESTIMATORS, LOGIT, _multiplier, estimator, per_sequence
from benchmarks.theory.estimator_batches import arranged, design_effect, draw_batches, sequences_for
from benchmarks.theory.estimator_source import PAIRINGS, STUDENTS, Source, Student
from benchmarks.theory.estimator_toy import rows_with_teacher, toy_bank, toy_module
from benchmarks.theory.estimator_views import View, sequence_statistics, token_statistics, views
from pgpo_lightning.data.toy import questions
from pgpo_lightning.losses.information import information
from pgpo_lightning.losses.step_statistics import StepStatistics
from tests.support.helpers import accumulate

SOURCE = Source(chances=(0.2, 0.5, 0.7), vocabulary=8)

# ------------------------------------------------------------------------------------------------- the known source


def listed(source, student, pairing, length):
    """Every response of upper and lower tokens in turn, straight from the definitions."""
    p = np.array(source.chances)
    m = len(p)
    prior = np.array([student.skew] + [1.0] * (m - 1))
    h = lambda q: -(q * np.log(q) + (1 - q) * np.log(1 - q))  # noqa: E731
    total = np.zeros(3)
    joint = {}
    for response in itertools.product((0, 1), repeat=length):
        likelihood = lambda prefix: np.prod([p if up else 1 - p for up in prefix] or [np.ones(m)], axis=0)  # noqa: E731
        chances = []
        for t in range(length):
            weights = prior * likelihood(response[:t]) ** student.trust
            chances.append((weights / weights.sum()) @ p)
        sampled = np.prod([s if up else 1 - s for s, up in zip(chances, response, strict=True)])
        posterior = likelihood(response) / likelihood(response).sum() if pairing == "own" else np.full(m, 1 / m)
        joint[response] = sampled * posterior
        for f in range(m):
            for s, up in zip(chances, response, strict=True):
                kl = p[f] * np.log(p[f] / s) + (1 - p[f]) * np.log((1 - p[f]) / (1 - s))
                ratio = np.log(p[f] / s) if up else np.log((1 - p[f]) / (1 - s))
                total += joint[response][f] * np.array([h(s) - h(p[f]), kl, ratio])
    table = np.array(list(joint.values()))
    independent = table.sum(1, keepdims=True) * table.sum(0)
    return [*(total / length), (table * np.log(table / independent)).sum() / length]


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("name", STUDENTS)
def test_exact_expectations_are_those_over_all_responses(name, pairing):
    found = SOURCE.expectations(STUDENTS[name], pairing, 5)
    assert found == pytest.approx(listed(SOURCE, STUDENTS[name], pairing, 5), abs=1e-12)


def test_all_three_estimators_are_the_mutual_information_of_a_calibrated_student_with_its_own_feedback():
    """The chain rule; computed from the count of upper tokens alone, which is all that a response says of the feedback."""
    length, p = 12, np.array(SOURCE.chances)
    n = np.arange(length + 1)[:, None]
    choose = np.array([math.comb(length, k) for k in range(length + 1)])[:, None]
    given = choose * p**n * (1 - p) ** (length - n)  # (n, f)
    marginal = given.mean(axis=1, keepdims=True)
    truth = (given * np.log(given / marginal)).sum() / 3
    assert SOURCE.mutual_information(length) == pytest.approx(truth)
    assert SOURCE.expectations(Student(), "own", length) == pytest.approx([truth / length] * 4)
    assert SOURCE.mutual_information(400) == pytest.approx(math.log(3), abs=1e-3)


def test_a_siblings_feedback_has_no_mutual_information_and_the_estimators_do_not_know():
    found = SOURCE.expectations(Student(), "sibling", 12)
    assert found.information == pytest.approx(0, abs=1e-12)
    assert found.kl > 2 * SOURCE.mutual_information(12) / 12
    assert found.log_ratio < 0


@pytest.mark.parametrize(
    ("name", "pairing"), [("calibrated", "own"), ("overconfident", "own"), ("wrong prior", "sibling")]
)
def test_simulated_responses_have_the_exact_expectations(name, pairing):
    """Through the library's kernel and the statistics of a step, on the whole vocabulary."""
    n, length = 6000, 6
    sample = SOURCE.sample(STUDENTS[name], pairing, length, n, seed=0)
    assert torch.allclose(sample.student.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    assert torch.allclose(sample.teacher.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    tokens = token_statistics(sample.student + LOGIT, sample.teacher, sample.tokens, View())
    rows = sequence_statistics(tokens, torch.full((n,), length))
    exact = SOURCE.expectations(STUDENTS[name], pairing, length)
    for estimator_name, truth in zip(ESTIMATORS, exact, strict=False):
        found = information(rows, estimator_name)
        assert abs(found.value - truth) < 4 * found.standard_error
        assert found.standard_error < 0.01


def test_tokens_follow_the_bigram():
    """The next token within its half is a shift of one law by the token before: the most likely shift is none."""
    sample = SOURCE.sample(Student(), "own", 50, 200, seed=1)
    tokens = sample.tokens.reshape(200, 50).numpy()
    shift = (tokens[:, 1:] - tokens[:, :-1]) % 4
    base = 1 / np.arange(1, 5) ** 1.2
    assert np.bincount(shift.ravel()) / shift.size == pytest.approx(base / base.sum(), abs=0.02)
    # What was sampled is as likely as the student says: the mean of -log p is its mean entropy.
    entropy = -(sample.student.exp() * sample.student).sum(-1).mean()
    assert -sample.student.gather(1, sample.tokens[:, None]).mean() == pytest.approx(entropy.item(), abs=0.02)


# ------------------------------------------------------------------------------------------------------------- views


def test_views_by_hand():
    student = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    teacher = torch.tensor([[0.1, 0.6, 0.2, 0.1]]).log()
    h = lambda *p: -sum(q * math.log(q) for q in p)  # noqa: E731
    seen = lambda view: token_statistics(student + 3, teacher - 1, torch.tensor([1]), view)  # noqa: E731
    whole, tail, cut = seen(View()), seen(View(top_k=2)), seen(View(top_k=2, add_tail=False))
    assert whole.entropy_student.item() == pytest.approx(h(0.5, 0.25, 0.15, 0.1), abs=1e-6)
    assert tail.entropy_student.item() == pytest.approx(h(0.5, 0.25, 0.25), abs=1e-6)
    assert tail.entropy_teacher.item() == pytest.approx(h(0.1, 0.6, 0.3), abs=1e-6)
    assert tail.kl.item() == pytest.approx(
        sum(t * math.log(t / s) for t, s in ((0.1, 0.5), (0.6, 0.25), (0.3, 0.25))), abs=1e-6
    )
    assert cut.entropy_student.item() == pytest.approx(h(2 / 3, 1 / 3), abs=1e-6)
    for found in (whole, tail, cut):
        assert (found.log_p_teacher - found.log_p_student).item() == pytest.approx(math.log(0.6 / 0.25), abs=1e-6)
    rounded = seen(View("bf16"))
    assert 1e-5 < abs(rounded.kl - whole.kl) < 0.02
    assert abs(seen(View("fp16")).kl - whole.kl) < abs(rounded.kl - whole.kl)
    assert [view.name for view in views([2])] == ["fp32", "bf16", "fp16", "top 2 + tail", "top 2, renormalised"]


def test_only_the_first_tokens():
    sample = SOURCE.sample(Student(), "own", 5, 2, seed=0)
    tokens = token_statistics(sample.student, sample.teacher, sample.tokens, View())
    rows = sequence_statistics(tokens, torch.tensor([4, 6]), first=5)  # the ten tokens, cut as two responses
    assert rows.length.tolist() == [4, 5]
    assert rows.kl.tolist() == pytest.approx([tokens.kl[:4].mean().item(), tokens.kl[4:9].mean().item()])


# ----------------------------------------------------------------------------------------------------------- batches


def crossed(questions_, siblings, between, within, seed=0):
    rng = np.random.default_rng(seed)
    return between * rng.normal(size=(questions_, 1)) + within * rng.normal(size=(questions_, siblings))


def test_an_error_over_sequences_is_too_small_by_the_design_effect():
    """Between 0.2, within 0.1, 4 siblings: the variance is 0.0425 / Q, and that of independent sequences 0.05 / 4 Q."""
    table = crossed(4000, 4, 0.2, 0.1)
    drawn = draw_batches(table, 20, 3000, seed=0)
    assert drawn.spread == pytest.approx(math.sqrt(0.0425 / 20), rel=0.06)
    assert drawn.calibration(drawn.naive) == pytest.approx(math.sqrt(0.0125 / 0.0425), rel=0.06)
    assert drawn.calibration(drawn.clustered) == pytest.approx(1, rel=0.06)
    assert drawn.coverage(drawn.clustered, table.mean()) == pytest.approx(0.94, abs=0.02)
    assert drawn.coverage(drawn.naive, table.mean()) < 0.8
    value, low, high = design_effect(table, 300)
    assert low < value < high
    assert value == pytest.approx(3.4, rel=0.06)
    # One sibling of each question: independent sequences.
    single = draw_batches(table, 80, 2000, seed=0, siblings=1)
    assert single.calibration(single.naive) == pytest.approx(1, rel=0.06)
    assert single.spread == pytest.approx(math.sqrt(0.05 / 80), rel=0.06)
    # 1 % at alpha 2: sd(I) 0.005, so Q = 0.0425 / 0.005^2.
    assert sequences_for(table, 2.0, 0.01) == pytest.approx(4 * 0.0425 / 0.005**2, rel=0.06)


def test_a_batch_is_estimated_as_a_training_step_does():
    """Value and error of a drawn batch are those of `information`, with rollouts that have no teacher left out."""
    rng = np.random.default_rng(1)
    question = np.array([0, 0, 1, 3, 3, 3])
    values = rng.normal(size=6)
    table = arranged(values, question, 4)
    assert np.isnan(table[2]).all()
    zeros = torch.zeros(6)
    fields = [torch.from_numpy(values), zeros, *[zeros] * 7, zeros + 1, zeros, zeros + 1, torch.from_numpy(question)]
    told = information(StepStatistics(*fields))

    class Everything:
        def integers(self, n, size):
            return np.arange(n)[None]

    drawn = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: Everything())
        drawn = draw_batches(table, 4, 1, seed=0)
    assert drawn.values.item() == pytest.approx(told.value)
    assert drawn.clustered.item() == pytest.approx(told.standard_error)
    assert drawn.sequences == 6


def test_the_multiplier_is_biased_by_the_noise_in_the_information():
    """Normal I of variance 0.05 / 32 per batch: rho is log-normal, and its bias exp(alpha^2 var / 2)."""
    table = 0.2 + crossed(3000, 1, 0.3, 0.0)
    row = _multiplier("kl", table, 2.0, (0.0, 9.0), 0.05, 4000, 0)
    variance = table.var() / 32
    truth = math.exp(2 * table.mean())
    assert row["bias"] == pytest.approx(truth * math.expm1(2 * variance), rel=0.1)
    assert row["bias_normal"] == pytest.approx(truth * math.expm1(2 * variance), rel=0.05)
    assert row["relative"] == pytest.approx(2 * math.sqrt(variance), rel=0.05)
    assert row["there"] == pytest.approx(0.05, rel=0.15)
    assert _multiplier("log-ratio", -table, 2.0, (1.0, 2.0), 0.05, 200, 0)["needed"] is None


# ----------------------------------------------------------------------------------------------------------- the toy


def test_the_bank_holds_what_a_training_step_sees():
    bank = toy_bank(4, 4, 7, [View()])
    module = toy_module(4, 7)
    rows = rows_with_teacher(module, questions("train")[:4], 0, 7)
    accumulate(module, rows)
    mine = per_sequence(sequence_statistics(bank.tokens[View()], bank.lengths))
    theirs = per_sequence(module.step_statistics)
    order = np.lexsort((theirs["kl"], module.step_statistics.length))  # micro-batches sort their rows
    here = np.lexsort((mine["kl"], bank.lengths))
    for name in ESTIMATORS:
        assert mine[name][here].numpy() == pytest.approx(theirs[name][order].numpy(), abs=2e-5)
    assert bank.question.tolist() == sorted(bank.question.tolist())
    assert bank.questions == 4


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_a_report(tmp_path, capsys):
    small = {"questions": 4, "siblings": 4, "sequences": 64, "draws": 100, "source_length": 4}
    lists = {
        "lengths": [2, 4],
        "toy_lengths": [4, 32],
        "batches": [2, 4],
        "top_k": [5, 100],
        "sensitivities": [1.0],
    }
    words = [word for name, value in (small | lists).items() for word in (f"--{name}", str(value))]
    run(estimator, [*words, "--output", str(tmp_path / "out")])
    assert "nats per token" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "estimator.json").read_text())
    assert [row["view"] for row in content["source_views"]] == [view.name for view in views([5])]  # of 64 tokens
    assert len(content["toy_views"]) == len(views([5, 100]))
    assert content["students"][0]["kl"] == pytest.approx(content["students"][0]["truth"])
    report = (tmp_path / "out" / "estimator.md").read_text()
    assert "## Batches of whole questions" in report
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"estimator.{end}" for end in ("md", "json", "png")}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lengths": []}, "`lengths` not to be empty"),
        ({"toy_lengths": [0]}, r"`toy_lengths\[0\]` to be at least 1"),
        ({"batches": [1]}, r"`batches\[0\]` to be at least 2"),
        ({"top_k": [0]}, r"`top_k\[0\]` to be at least 1"),
        ({"sensitivities": []}, "`sensitivities` not to be empty"),
        ({"siblings": 1}, "`siblings` to be at least 2"),
        ({"spread": 0.0}, "`spread` to be above 0"),
        ({"rho_min": 3.0}, "`rho_min` to be at most `rho_max`"),
        ({"source": Source(chances=(0.5,))}, "`source.chances` to be at least two"),
        ({"source": Source(chances=(0.5, 1.0))}, "`source.chances` to be at least two"),
        ({"source": Source(vocabulary=7)}, "`source.vocabulary` to be an even number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        estimator(output=str(tmp_path / "out"), **settings)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("benchmarks.theory.estimator.toy_bank", None)
    with pytest.raises(FileExistsError, match="`output` to be a folder"):
        estimator(output=str(tmp_path / "file"))
