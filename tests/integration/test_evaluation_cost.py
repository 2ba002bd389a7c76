"""Evaluations of the shipped configurations cost at most a tenth of the training, by the plan."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from pgpo_lightning.commands.plan import PlanCommand
from pgpo_lightning.data.sciknoweval import Domain, SciKnowEval
from pgpo_lightning.memory_planner.cards import Assumptions, rates
from pgpo_lightning.memory_planner.seconds import step_seconds
from tests.support import CONFIGS

CARDS = {
    "sciknoweval": "h200",
    "sciknoweval-qwen3-0.6b": "l4",
    "24gb-qwen3-0.6b": "l4",
    "24gb-qwen3-1.7b": "l4",
    "80gb-qwen3-8b": "h100",
    "141gb-qwen3-8b": "h200",
    "8x80gb-qwen3-8b": "h100",
    "2x8x80gb-qwen3-8b": "h100",
}
TYPICAL = ["--prompt_tokens", "300", "--reprompt_tokens", "900", "--response_tokens", "500", "--spread", "0.5"]
FILES = [*CONFIGS.glob("sciknoweval*.yaml"), *(CONFIGS / "scale").glob("*.yaml")]


def arguments(path: Path) -> list[str]:
    base = ["--config", str(CONFIGS / "sciknoweval.yaml")] if path.parent.name == "scale" else []
    return [*base, "--config", str(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_evaluation_costs_a_tenth_of_the_training_at_most(path):
    command = PlanCommand([*arguments(path), *TYPICAL])
    run = command.run()
    tests = run.evaluations
    assert tests.batch is None, "all questions are in one call of the engine"
    limit = command.datamodule.limits["validation"]
    most = max(SciKnowEval(domain, limit_val=limit).held_out_questions() for domain in get_args(Domain))
    assert tests.questions == most, "of all domains, the one with the most questions"
    found = step_seconds(run, rates(CARDS[path.stem], Assumptions(), torch.bfloat16, run.nodes))
    assert 0 < found.amortised <= 0.1 * found.step
    assert 0.2 * found.evaluation > 0.1 * found.step, "with an evaluation every fifth step it is far above"


@pytest.mark.parametrize("path", sorted((CONFIGS / "domains").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_domain_changes_nothing_but_its_questions(path):
    names = {line.strip().split(":")[0] for line in path.read_text().splitlines() if not line.startswith("#")}
    assert names == {"trainer", "default_root_dir", "data", "init_args", "domain"}
