"""HAPO's whole steps against plain autograd, and its runs from the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.checkpoints.finding import newest_checkpoint
from pgpo_lightning.commands.main import main
from pgpo_lightning.losses.policy_gradient import (
    group_advantages,
)
from pgpo_lightning.modules import GRPO, HAPO
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.objectives.demonstrations import SuccessBuffer
from pgpo_lightning.objectives.gates import (
    ConfidenceGate,
    MatchedRandomGate,
)
from tests.support.hapo import HAPO_LIMITS, record
from tests.support.helpers import TOKENIZER, build, config, half_right, loader, questions, tiny_model, trainer


def test_a_run_longer_than_the_gates_record_is_refused_at_the_start(tmp_path):
    with pytest.raises(MisconfigurationException, match="at most the 1 batches"):
        fit(tmp_path / "run", steps=2, gate=MatchedRandomGate(record(tmp_path, [1.0])))


def fit(folder, steps=1, module=HAPO, items=8, **settings):
    known = {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2), "num_generations": 4} | HAPO_LIMITS
    made = build(module, tiny_model(), half_right, tokenizer=TOKENIZER, **(known | settings))
    t = trainer(folder, max_steps=steps)
    t.fit(made, loader(questions(items), 4))
    return made, t


def weights(module):
    return [p.detach().clone() for p in module.model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_agg_mode": "token-mean", "norm_adv_by_std_in_grpo": False},
        {"updates_per_batch": 2, "num_iterations": 2},
    ],
)
def test_a_gate_that_never_opens_is_grpo(tmp_path, settings):
    settings = {
        "norm_adv_by_std_in_grpo": True, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)
    } | settings  # fmt: skip
    steps = 2 * settings.get("updates_per_batch", 1) * settings.get("num_iterations", 1)
    grpo, _ = fit(tmp_path, steps, GRPO, **settings)
    hapo, _ = fit(tmp_path, steps, gate=ConfidenceGate(1 / 6), **settings)
    assert hapo.scalars["hapo/injected_groups"] == 0
    assert same(grpo, hapo)
    open_gate, _ = fit(tmp_path, steps, gate=ConfidenceGate(0.9), **settings)
    assert not same(grpo, open_gate)


def naive_loss(model, learned, old, by_sequence, with_advantage):
    """The objective of a step as the paper writes it, one response at a time."""
    total = 0.0
    for row, old_log_p in zip(learned, old, strict=True):
        prompt, y = row.rollout.prompt_ids, row.rollout.response_ids
        logits = model(torch.tensor([[*prompt, *y]])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.log_softmax(-1)[torch.arange(len(y)), torch.tensor(y)]
        if row.demonstration:
            p = log_p.exp()
            loss = -(row.advantage if with_advantage else 1.0) * p / (p + 0.1)
        else:
            ratio = (log_p - (log_p.detach() if old_log_p is None else old_log_p)).exp()
            loss = -torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.28) * row.advantage)
        total = total + (loss.mean() / len(learned) if by_sequence else loss.sum() / sum(r.length for r in learned))
    return total


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("loss_agg_mode", ["seq-mean-token-mean", "token-mean"])
@pytest.mark.parametrize("with_advantage", [True, False])
def test_the_step_is_that_of_a_naive_implementation(tmp_path, iterations, loss_agg_mode, with_advantage):
    module, _ = fit(
        tmp_path, iterations, max_grad_norm=None, is_clip=None, num_iterations=iterations, clip_ratio_c=None,
        loss_agg_mode=loss_agg_mode, demonstration_advantage=with_advantage,
    )  # fmt: skip
    learned = [row.replaced_by or row for row in module.last_samples]
    given = [row for row in learned if row.demonstration]
    assert 0 < len(given) < 4  # half of the demonstrations were refused
    groups = torch.tensor([row.verdict.reward for row in learned]).view(-1, 4)
    expected = group_advantages(groups, True).view(-1)
    for row, advantage in zip(learned, expected.tolist(), strict=True):
        assert row.advantage == (1.0 if row.demonstration and not with_advantage else pytest.approx(advantage))
    assert all(row.old_log_probs is None for row in given)
    start = tiny_model()
    old = [row.old_log_probs for row in learned]
    for _ in range(iterations):
        start.zero_grad()
        naive_loss(start, learned, old, loss_agg_mode == "seq-mean-token-mean", with_advantage).backward()
        with torch.no_grad():
            for p in start.parameters():
                p -= 1e-2 * p.grad
    for naive, ours in zip(start.parameters(), module.model.parameters(), strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=2e-7)


def test_one_minus_confidence_as_a_weight(tmp_path):
    plain, _ = fit(tmp_path)
    weighted, _ = fit(tmp_path, confidence_weight=True)
    for i in range(0, 16, 4):
        a, b = (module.last_samples[i : i + 4] for module in (plain, weighted))
        c = (1 + sum(row.verdict.reward for row in a)) / 6
        for row, other in zip(a, b, strict=True):
            if row.replaced_by is not None:
                assert other.replaced_by.advantage == pytest.approx((1 - c) * row.replaced_by.advantage)


def test_what_is_reported_is_the_students_own(tmp_path):
    module, t = fit(tmp_path, gate=ConfidenceGate(0.9))
    own = module.last_samples
    learned = [row.replaced_by or row for row in own]
    given = [row for row in learned if row.demonstration]
    assert given
    assert not any(row.demonstration for row in own)
    metrics = t.callback_metrics
    assert float(metrics["critic/score/mean"]) == pytest.approx(sum(r.verdict.reward for r in own) / 16)
    assert float(metrics["response_length/total"]) == sum(row.length for row in own)
    assert len(module.step_statistics) == sum(row.advantage != 0 and not row.demonstration for row in learned)
    assert module.step_statistics.sampler_gap.max() < 1e-4
    successes = [sum(row.verdict.reward for row in own[i : i + 4]) for i in range(0, 16, 4)]
    scalars = module.scalars
    assert scalars["hapo/injected_groups"] == len(given) / 4
    assert scalars["hapo/confidence"] == pytest.approx(sum((1 + s) / 6 for s in successes) / 4)
    assert scalars["hapo/gate_open"] == sum((1 + s) / 6 < 0.9 for s in successes) / 4 == 1
    assert scalars["critic/informative_groups"] == sum(0 < s < 4 for s in successes) / 4
    assert scalars["hapo/threshold"] == 0.9
    active = [row for row in learned if row.advantage]
    share = sum(row.length for row in active if row.demonstration) / sum(row.length for row in active)
    assert scalars["hapo/teacher_token_share"] == pytest.approx(share)
    assert scalars["hapo/advantage"] == pytest.approx(sum(row.advantage for row in given) / len(given))


def test_accuracy_where_the_gate_is_closed(tmp_path):
    module, _ = fit(tmp_path, gate=ConfidenceGate(0.3))
    groups = [sum(row.verdict.reward for row in module.last_samples[i : i + 4]) for i in range(0, 16, 4)]
    closed = [s for s in groups if (1 + s) / 6 >= 0.3]
    assert 0 < len(closed) < 4
    assert module.scalars["hapo/closed_success"] == pytest.approx(sum(closed) / (4 * len(closed)))


def test_a_success_serves_from_the_next_visit_on(tmp_path):
    class Finishing(HAPO):
        def sample(self, *arguments):
            return [replace(rollout, finished=True) for rollout in super().sample(*arguments)]

    settings = {"module": Finishing, "gate": ConfidenceGate(2.0), "items": 4}
    first, _ = fit(tmp_path, steps=1, demonstrations=SuccessBuffer(), **settings)
    assert first.scalars["hapo/injected_groups"] == 0
    again, _ = fit(tmp_path, steps=2, demonstrations=SuccessBuffer(), **settings)
    assert again.scalars["hapo/injected_groups"] > 0
    kept = {tuple(ids.tolist()) for kept in first.objective.demonstrations.kept.values() for ids, _ in kept}
    given = [row.replaced_by for row in again.last_samples if row.replaced_by is not None]
    assert {tuple(row.rollout.response_ids) for row in given} <= kept


def test_measuring_the_gradients_apart_changes_nothing(tmp_path):
    plain, _ = fit(tmp_path, steps=2)
    measured, _ = fit(tmp_path, steps=2, gradient_parts_every_n_steps=2)
    assert same(plain, measured)
    assert "hapo/gradient_cosine" not in measured.scalars  # not in the second batch
    measured, _ = fit(tmp_path, steps=1, gradient_parts_every_n_steps=2)
    given, sampled, cosine = (
        measured.scalars[f"hapo/gradient_{name}"] for name in ("norm_demonstrations", "norm_rollouts", "cosine")
    )
    together = given**2 + sampled**2 + 2 * cosine * given * sampled
    assert given > 0
    assert together**0.5 == pytest.approx(measured.scalars["actor/grad_norm"], rel=1e-4)


def settings_of(folder, steps, **model):
    path = Path(config(folder, steps, module="HAPO", model={"max_response_length": 32} | model))
    settings = yaml.safe_load(path.read_text())
    del settings["model"]["init_args"]["reprompt"]
    settings["summary"] = {"picture": False}
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


REMEMBERING = {
    "class_path": "ConfidenceGate",
    "init_args": {
        "posterior": "draw",
        "memory": 0.5,
        "threshold": {"class_path": "ProgressThreshold", "init_args": {"slope": 1.0}},
    },
}


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path):
    buffer = {"class_path": "SuccessBuffer", "init_args": {"choice": "random"}}
    model = {"gate": REMEMBERING, "ties": "random", "demonstrations": buffer}  # all that has a state or draws lots
    main(settings_of(tmp_path / "whole", 6, **model))
    main(settings_of(tmp_path / "cut", 4, **model))  # the second epoch has begun: some questions are seen again
    main([*settings_of(tmp_path / "cut", 6, **model), "--ckpt_path", "last"])
    saved = [
        torch.load(newest_checkpoint(tmp_path / name / "checkpoints"), weights_only=True) for name in ("whole", "cut")
    ]
    for name, value in saved[0]["state_dict"].items():
        assert torch.equal(value, saved[1]["state_dict"][name]), name
    states = [json.dumps(s["pgpo_lightning"]["objective"], default=torch.Tensor.tolist) for s in saved]
    assert states[0] == states[1]
    assert len(saved[0]["pgpo_lightning"]["objective"]["gate"]["state"]["seen"]) > 10
    curves = [read_scalars(tmp_path / name) for name in ("whole", "cut")]
    assert len(curves[0]["hapo/injected_groups"]) == 6
    assert any(share > 0 for step, share in curves[0]["hapo/injected_groups"].items() if step > 4)  # after the cut
    assert {t: v for t, v in curves[0].items() if "hapo" in t} == {t: v for t, v in curves[1].items() if "hapo" in t}
    assert "hapo/gate_open" in RunRecord.load(tmp_path / "whole").curves
    other = settings_of(
        tmp_path / "cut", 6, **(model | {"gate": {"class_path": "RandomGate", "init_args": {"rate": 1}}})
    )
    with pytest.raises(MisconfigurationException, match=r"`model.gate` is {.*RandomGate.* was {.*ConfidenceGate"):
        main([*other, "--ckpt_path", "last"])


def test_a_column_that_is_not_there_stops_before_anything_is_generated(tmp_path, monkeypatch):
    monkeypatch.setattr("pgpo_lightning.rollout.transformers_engine.TransformersEngine.generate", None)
    source = {"class_path": "ColumnDemonstrations", "init_args": {"column": "worked"}}
    with pytest.raises(ValueError, match=r"no training question has `worked`.*toy train:0.* domain, a, b, c, solution"):
        main(settings_of(tmp_path / "run", 2, demonstrations=source))
