"""Whole fits on a pretended GPU: no mixed devices, and budgets of what a real one would wait for.

Every pair of settings that go together is in at least one fit (pairwise testing).
"""

import pytest
import torch

from pgpo_lightning.rollout import transformers_engine
from tests.support.external import saved
from tests.support.gpu_runs import FACTORS, covering_runs, fit, valid
from tests.support.pretended_gpu import NAME, DeviceMismatchError
from tests.support.pretended_gpu.fixture import take_for_gpu

RUNS = covering_runs()
PLAIN = {name: values[0] for name, values in FACTORS.items()} | {"teacher": "ema", "precision": "bf16-mixed"}
WAITS_PER_PASS = 6
"""Of a micro-batch: four transfers (the student's tokens, the teacher's, what is known of them, rewards), and a look of
transformers at the positions in each forward pass."""


@pytest.fixture(scope="module")
def external(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("external"))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    take_for_gpu(monkeypatch)


def check(run, done):
    """Assert that a fit was trained on the device, and its budgets."""
    module, precision = done.module, run["precision"]
    assert module.steps == 2 + module.learner.skipped
    assert done.learning.operations["mm"] + done.learning.operations["addmm"] > 20
    assert module.learner.skipped == 0 or precision == "16-mixed"  # which looks for its scale
    assert all(p.isfinite().all() for p in module.model.parameters())
    if run["module"] == "HAPO":
        assert module.scalars["hapo/injected_groups"] > 0
    if not run["offload"]:  # whose weights are transferred
        more = 2 * (run["module"] == "CEPO") + (run["teacher"] == "trust-region")  # one more forward pass
        more += 2 * (run["module"] == "HAPO")  # what belongs to demonstrations
        most = WAITS_PER_PASS + more
        assert done.learning.waits.total() <= most * done.passes, done.learning.report()
        assert done.moving.waits.total() == 0, done.moving.report()
    moves = run["teacher"] in ("ema", "narrow") and precision != "16-mixed"  # which may skip every step
    assert sum(done.moving.operations.values()) > 0 or not moves
    # A copy of the weights, a batch's start and end, and a look at every 16th token.
    assert done.decoding.waits.total() <= 12 * done.batches + done.tokens / 16, done.decoding.report()


@pytest.mark.filterwarnings("ignore:Weights in bfloat16 and an optimizer that rounds to nearest")
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(str(value) for value in run.values() if value))
def test_a_whole_fit(run, external, tmp_path, monkeypatch):
    check(run, fit(run, tmp_path, external, monkeypatch))


def test_every_pair_of_settings_that_go_together_is_in_a_fit():
    assert all(valid(run) for run in RUNS)
    for name, values in FACTORS.items():
        assert {run[name] for run in RUNS} == set(values)
    pairs = {(run["teacher"], run["precision"]) for run in RUNS}
    assert len(pairs) == len(FACTORS["teacher"]) * len(FACTORS["precision"])


def test_a_deterministic_fit(external, tmp_path, monkeypatch):
    try:
        check(PLAIN, fit(PLAIN, tmp_path, external, monkeypatch, deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)


# --- the check fails where a real GPU would


def test_a_tensor_that_is_left_on_the_device_is_found(external, tmp_path, monkeypatch):
    sample = transformers_engine._sample

    def left(*args):
        return [(*response, log_probs.to(NAME)) for *response, log_probs in sample(*args)]  # as without `.cpu()`

    monkeypatch.setattr(transformers_engine, "_sample", left)
    with pytest.raises(DeviceMismatchError, match="two devices, pretend:0 and cpu"):
        fit(PLAIN, tmp_path, external, monkeypatch)


def test_a_generator_of_the_cpu_is_found(external, tmp_path, monkeypatch):
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **given: rand(*size, **given, generator=torch.Generator()))
    with pytest.raises(DeviceMismatchError, match="generator"):
        fit(PLAIN, tmp_path, external, monkeypatch)
