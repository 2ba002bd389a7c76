"""`pgpo plan` against real steps of SDPO and of objectives whose loss costs more: operations and the highest peak."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pgpo_lightning.commands.plan import PlanCommand
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.memory_planner.counter import LiveBytes
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.plan import RunSpec, plan_memory
from pgpo_lightning.memory_planner.workload import Lengths
from pgpo_lightning.modules import CEPO, DRIFT, SDPO
from tests.support import CONFIGS
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, tiny_model

LENGTHS = Lengths(24, 64, 32, spread=0.25)
BY_RESPONSE = {"token_weights": TokenWeights("sequence")}


def rows_of(cls):
    """Rows whose teacher does as much as it can: successes on medium questions, with a wrong answer beside each."""
    rows = LENGTHS.rows(4, 4)
    for row in rows:
        row.advantage, row.verdict.reward = 0.5, 1.0
        row.contrast_ids = list(row.reprompt_ids) if cls is CEPO else None
    return rows


def measured(module, rows):
    """Bytes that a step adds at its highest, and its operations."""
    with LiveBytes() as counter:
        module.learner.accumulate(rows)
    module.model.zero_grad()
    for model in {module.model, getattr(module.teacher, "model", module.model)}:
        model.set_attn_implementation("eager")  # the CPU's fused attention is not counted by torch
    with FlopCounterMode(display=False) as operations:
        module.learner.accumulate(rows)
    return counter.peak, operations.get_total_flops()


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SDPO, {}),
        (DRIFT, {"teacher_regularization": "ema"}),
        (DRIFT, {"teacher_regularization": "trust-region"}),
        (CEPO, {"teacher_regularization": "live"}),
        (CEPO, {"teacher_regularization": "frozen"}),
        (SDPO, BY_RESPONSE),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else ", ".join(map(str, value.values())),
)
def test_a_plan_is_what_a_step_takes(cls, settings):
    model = tiny_model(vocab_size=2048, hidden_size=64)
    module = build(cls, model, half_right, tokenizer=TOKENIZER, micro_batch_tokens=512, **LIMITS, **settings)
    module.configure_model()
    objective, rows = module.objective, rows_of(cls)
    objective.warming_up = False
    taught = max(objective.routes(rows), key=lambda route: len(route.samples))
    assert (len(taught.samples), taught.taught) == (16, True)
    assert (taught.factors is not None) == (cls is DRIFT)
    plan = plan_memory(
        RunSpec(
            config=model.config,
            compute=Compute(),
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-3),
            teacher=objective.teaching.config.kind,
            lengths=LENGTHS,
            questions=4,
            samples=4,
            longest_response=48,
            micro_batch_tokens=512,
            device="cpu",
            contrasted=objective.contrasted,
            recomputes_logits=objective.recomputes_logits,
        )
    )
    peak, operations = measured(module, rows)
    standing = sum(p.nbytes for each in (module.model, module.teacher) for p in each.parameters())
    told = sum(count for phase, count in plan.flops.items() if phase != "rollouts")
    # torch does not see the product that adds to the gradient of the head.
    uncounted = 2 * plan.count.head * plan.tokens["response tokens"]
    assert operations == pytest.approx(told - uncounted, rel=0.02)
    assert peak + standing == pytest.approx(plan.need.peak("gradients"), rel=0.05)
    assert plan.flops["loss"] > 0.5 * told  # or the heads would not be seen


def test_the_command_knows_whose_logits_are_computed_twice():
    def told(overlay, *args):
        paths = [word for name in ("quickstart", overlay) for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
        return PlanCommand([*paths, *args]).run().recomputes_logits

    assert told("ablations/drift")
    assert not told("ablations/drift", "--model.rhythm.strength", "0")
    assert told("ablations/allocation-sequence")
    assert not told("ablations/allocation-token")
