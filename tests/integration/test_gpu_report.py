"""The report of a first call on a GPU, as far as a CPU can run it: everything but the numbers."""

import dataclasses
import importlib
import json
import math
from functools import partial

import pytest
import torch

from benchmarks import gpu_report, recipe
from pgpo_lightning.memory_planner.dry_run import Compute
from pgpo_lightning.memory_planner.memory import GIB
from pgpo_lightning.memory_planner.plan import RunSpec, plan_memory
from pgpo_lightning.memory_planner.workload import Lengths
from tests.unit.memory_planner.test_work import CONFIG


def lines(folder):
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


@pytest.fixture
def without_vllm(monkeypatch):
    """Its own tests run it; here its parts would take minutes where it is installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))


def test_small_parts_write_their_lines(tmp_path, capsys, without_vllm):
    names = list(gpu_report.PARTS)[:4]
    rows = gpu_report.main(["--device", "cpu", "--tiny", "--parts", *names, "--out", str(tmp_path)])
    assert lines(tmp_path) == rows
    assert not [row for row in rows if "error" in row]
    parts = {part: [row for row in rows if row["part"] == part] for part in names}
    assert parts["environment"][0]["product_tflops"] > 0
    fits = {row["engine"]: row for row in parts["fit"]}
    assert fits["TransformersEngine"]["rc"] == 0
    assert fits["VLLMEngine"]["skipped"] == parts["sync"][0]["skipped"] == "vllm is not installed"
    for row in parts["decode"]:
        assert row["predicted_to_measured"] == pytest.approx(row["predicted_ms"] / row["ms_per_token"])
    assert rows[-1] == {"part": "end", "complete": False}, "a part was skipped"
    out = capsys.readouterr().out
    assert [json.loads(line) for line in out.splitlines() if line.startswith("{")] == rows
    assert all(f"\n{part}\n" in out for part in names)


@pytest.mark.parametrize("part", ["padded", "shared"])
def test_steps_of_the_recipe_stand_beside_what_is_planned(tmp_path, part, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = gpu_report.main(["--device", "cpu", "--tiny", "--parts", "environment", part, "--out", str(tmp_path)])[1:]
    assert rows.pop() == {"part": "end", "complete": True}
    assert [row["what"] for row in rows] == ["plan", *["rollouts", "update", "step"] * 2, "evaluation"]
    for row in rows[1:]:
        assert row["seconds"] > 0
        assert row["predicted_to_measured"] == pytest.approx(row["predicted_s"] / row["seconds"])
    assert {"utilisation", "plan_gib"} < set(rows[1])
    assert [path.name for path in tmp_path.iterdir()] == ["report.jsonl"], "the folder of the caller stays as it is"


def test_parts_are_in_order_of_their_size():
    assert list(gpu_report.PARTS) == ["environment", "fit", "decode", "sync", "padded", "shared"]


def test_a_part_that_fails_leaves_the_lines_before_it_and_the_parts_after_it(tmp_path, monkeypatch):
    def fails(_):
        yield {"before": 1.0}
        assert lines(tmp_path) == [{"part": "decode", "before": 1.0}], "written before the next line is known"
        raise MemoryError("no room\nat all")

    def works(_):
        yield {"after": math.pi}

    monkeypatch.setitem(gpu_report.PARTS, "decode", fails)
    monkeypatch.setitem(gpu_report.PARTS, "sync", works)
    gpu_report.main(["--device", "cpu", "--tiny", "--parts", "decode", "sync", "--out", str(tmp_path)])
    assert lines(tmp_path) == [
        {"part": "decode", "before": 1.0},
        {"part": "decode", "error": "MemoryError: no room"},
        {"part": "sync", "after": math.pi},
        {"part": "end", "complete": False},
    ]
    gpu_report.main(["--device", "cpu", "--tiny", "--parts", "sync", "--budget", "0", "--out", str(tmp_path)])
    assert lines(tmp_path)[4] == {"part": "sync", "skipped": "the budget is spent"}


def test_a_fit_that_fails_is_reported_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "arguments", lambda *_: ["--trainer.max_steps", "none"])
    rows = gpu_report.main(["--device", "cpu", "--tiny", "--parts", "fit", "--out", str(tmp_path)])
    assert rows[0]["rc"] == 2
    assert "max_steps" in rows[0]["error"]


def test_the_card_decides_the_recipe(monkeypatch):
    def overlay(memory, installed=True):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
        return gpu_report.Report(None, None, memory, None, 1.0, 0.0).overlay

    assert [overlay(gib) for gib in (139.8, 79.6, 23.6)] == ["141gb-qwen3-8b", "80gb-qwen3-8b", "24gb-qwen3-0.6b"]
    assert all((recipe.CONFIGS / "scale" / f"{name}.yaml").exists() for name in gpu_report.OVERLAYS.values())
    assert overlay(139.8, installed=False) is None


def test_as_many_layers_as_fit_the_card():
    given = {"config": CONFIG, "compute": Compute(), "optimizer": partial(torch.optim.AdamW, lr=1e-5), "teacher": "ema"}
    run = RunSpec(**given, lengths=Lengths(20, 60, 30), questions=2, samples=4, longest_response=30)
    whole = max(plan_memory(run).need.peaks.values()) / GIB
    assert recipe.fitting(run, None) is run
    assert recipe.fitting(run, 10 * whole).config.num_hidden_layers == 5
    fewer = recipe.fitting(run, whole)
    assert 2 <= fewer.config.num_hidden_layers < 5
    assert max(plan_memory(fewer).need.peaks.values()) / GIB <= recipe.ROOM * whole
    with pytest.raises(ValueError, match="Expected two layers of the recipe to fit"):
        recipe.fitting(dataclasses.replace(run), 1e-6)
