"""Two steps of each overlay that is a method or a placebo, on a batch of four questions."""

import json
import math

import pytest

from pgpo_lightning.commands.main import main
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.external import LARGER, saved

# What a run logs of its own, and its value at both steps; null for any number above 0.
LOGGED = {
    "cepo": ("self_distillation/contrasted_fraction", None),
    "drift": ("drift/warming_up", 1.0),
    "i-sdpo": ("information/allocation_mean", None),
    "opcd": ("self_distillation/reprompt_sample_fraction", 1.0),
    "opd": ("self_distillation/reprompt_sample_fraction", 1.0),
    "opsd": ("self_distillation/reprompt_sample_fraction", 1.0),
    "opsd-clip": ("self_distillation/divergence", None),
    "placebo-other": ("context/other", 1.0),
    "placebo-other-feedback": ("context/other-feedback", 1.0),
    "placebo-template": ("context/template", 1.0),
    "sdft": ("self_distillation/reprompt_sample_fraction", 1.0),
    "tgpo": ("self_distillation/guidance", None),
}
SMALL = [
    "--data.batch_size",
    "4",
    "--data.eval_batch_size",
    "4",
    "--data.limit_train",
    "16",
    "--data.limit_val",
    "4",
    "--model.evaluation.samples",
    "2",
    "--trainer.max_steps",
    "2",
    "--trainer.val_check_interval",
    "2",
    "--summary.picture",
    "false",
    "--trainer.enable_progress_bar",
    "false",
]


@pytest.mark.parametrize("name", LOGGED)
def test_a_run_learns_and_sums_itself_up(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name in ("opd", "tgpo"):
        saved(tmp_path / "runs" / "toy-teacher", **LARGER)
    folder = tmp_path / "run"
    main(
        [
            "fit",
            "--config",
            "quickstart",
            "--config",
            f"ablations/{name}",
            *SMALL,
            "--trainer.default_root_dir",
            str(folder),
        ]
    )
    summary, curves = json.loads((folder / "summary.json").read_text()), read_scalars(folder)
    assert summary["steps"] == 2
    assert summary.get("multiplier") is None
    for part, step in (("base", 0), ("final", 2)):
        assert summary[part]["step"] == step
        assert 0 <= summary[part]["avg@2"] <= summary[part]["pass@2"] <= 1
    assert min(curves["actor/grad_norm"].values()) > 0
    assert all(math.isfinite(value) for points in curves.values() for value in points.values())
    tag, expected = LOGGED[name]
    values = list(curves[tag].values())
    assert len(values) == 2
    assert min(values) > 0 if expected is None else values == [expected] * 2
