"""Short runs of SRPO, I-SDPO and RLSD."""

import pytest
import torch

from pgpo_lightning.commands.main import main
from pgpo_lightning.modules import RLSD, SRPO
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    build,
    config,
    half_right,
    loader,
    questions,
    tiny_model,
    trainer,
)
from tests.support.runs import assert_same_run


def test_a_routed_run_distils_failures_with_a_teacher_only(tmp_path):
    module = build(SRPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, updates_per_batch=2,
                  optimizer=lambda p: torch.optim.SGD(p, lr=1e-2), **LIMITS)  # fmt: skip
    trainer(tmp_path, max_steps=4).fit(module, loader(questions(8), 4))
    kinds = set()
    for group in (module.last_samples[i : i + 4] for i in range(0, len(module.last_samples), 4)):
        mean = sum(row.verdict.reward for row in group) / 4
        for row in group:
            assert (row.reprompt_ids is not None) == (row.verdict.reward == 0 and mean > 0)
            assert row.advantage == pytest.approx(row.verdict.reward - mean)  # over the whole group
            assert (row.old_log_probs is not None) == (row.reprompt_ids is None and row.advantage != 0)
            kinds.add((row.reprompt_ids is not None, row.advantage != 0))
    assert {(True, True), (False, True)} <= kinds


def test_rlsd_forgets_the_teacher_and_copies_the_student(tmp_path):
    module = build(RLSD, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, teacher_period=2, mixing_steps=3,
                  optimizer=lambda p: torch.optim.SGD(p, lr=1e-2), **LIMITS)  # fmt: skip
    seen = []
    module.configure_model()
    move = module.learner.move_teacher
    module.learner.move_teacher = lambda: (move(), seen.append((module.objective.current_mixing, same(module))))
    trainer(tmp_path, max_steps=4).fit(module, loader(questions(16), 4))
    assert [mixing for mixing, _ in seen] == pytest.approx([0.5, 1 / 3, 1 / 6, 0.0])
    assert [copied for _, copied in seen] == [False, True, False, True]


def same(module):
    pairs = zip(module.model.parameters(), module.teacher.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_resumed_run_with_routes_by_question_is_the_whole_one(tmp_path):
    """I-SDPO: questions without a success are distilled from feedback, before the cut and after it."""
    settings = {
        "route": "group",
        "verifier": {"class_path": "pgpo_lightning.rewards.BoxedAnswer", "init_args": {"feedback": True}},
        "loss_agg_mode": "token-mean",
        "token_weights": {"unit": "token", "signal": "teacher-certainty", "sensitivity": 1.0, "maximum": None},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
        "num_generations": 2,
    }
    pgpo = {"class_path": "InformationMultiplier", "init_args": {"sensitivity": 5.0, "rho_min": None, "rho_max": 5.0}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(["fit", "--config", config(whole, module="SRPO", model=settings, multiplier=pgpo)])
    main(["fit", "--config", config(cut, steps=3, module="SRPO", model=settings, multiplier=pgpo)])
    main(["fit", "--config", config(cut, module="SRPO", model=settings, multiplier=pgpo), "--ckpt_path", "last"])
    assert_same_run(whole, cut)
    curves = {tag: list(points.values()) for tag, points in read_scalars(whole).items()}
    routed = curves["self_distillation/routed_fraction"]
    assert max(routed[:3]) > 0
    assert 0 < max(routed[3:]) < 1
    assert len(set(curves["lr/multiplier"])) > 3
