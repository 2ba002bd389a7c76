"""The benchmark programs at sizes at which they show that they run and that everybody computes the same; not how fast."""

import importlib
import json
import math

import pytest

from tests.support.helpers import config


@pytest.fixture
def program():
    """Imports a program by its name."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_loss(program, tmp_path, capsys):
    path = tmp_path / "loss.jsonl"
    rows = program("loss").main(
        ["--case", "jsd:512x32x4096", "rkl-top100:40x8x300", "--repeats", "1", "--json", str(path)]
    )
    table = capsys.readouterr().out
    assert lines(path) == rows
    assert [table.count(f"\n| {name} |") for name in ("four products", "ours", "plain")] == [2, 2, 2]
    for row in rows:
        if row["method"] != "four products":
            assert row["error_loss"] < 1e-5
            assert max(row["error_hidden"], row["error_head"]) < 1e-4
    peak = {row["method"]: row["peak_mib"] for row in rows if row["kind"] == "jsd"}
    assert peak["four products"] < peak["ours"] < peak["plain"] / 2
    assert peak["plain"] > 5 * 512 * 4096 * 4 / 2**20


def test_recomputation(program):
    rows = program("recomputation").main(["--rounds", "1", "--rows", "1", "--tokens", "16", "--layers", "4"])
    held = {row["recomputed"]: row["held_mib"] for row in rows}
    assert held["every layer"] < min(held["op"], held["every 2nd layer"]) < held["nothing"]
    assert all(row["plan_to_held"] == pytest.approx(1, abs=0.02) for row in rows)


def test_fsdp_start(program):
    shards, whole = program("fsdp_start").main(["--layers", "2", "--hidden", "512"])
    assert shards["loss"] == whole["loss"] != 0
    assert shards["norm"] == whole["norm"] > 0
    assert shards["peak_mib"] < whole["peak_mib"] - shards["model_mib"] / 2


def test_sampling(program, monkeypatch):
    sampling = program("sampling")
    shape = {"questions": 3, "prompt": (5, 9), "limit": 12, "mean": 6, "layers": 1, "vocabulary": 64, "at_once": 6}
    monkeypatch.setitem(sampling.SHAPES, "trl", shape)
    monkeypatch.setattr(sampling.transformers_engine, "end_tokens", None)  # put back what the program puts in
    (row,) = sampling.main(["--shapes", "trl", "--repeats", "1"])
    assert len(row["seconds"]) == 1
    assert 0 < row["useful"] <= row["row_tokens"] < 2 * row["useful"]
    assert row["passes"] > 12


def test_every_method_of_the_loss_agrees(program):
    loss = program("loss")
    case = loss.Case.of("fkl:30x8x50")
    exact = loss.reference(loss.draw(case), case.which, rows=7)
    for name in loss.methods_for(case, compiled=False):
        if name != loss.FLOOR:
            assert max(loss.errors(loss.METHODS[name](loss.draw(case), case.which), exact).values()) < 1e-4


def test_the_floor_is_the_products_in_chunks(program):
    loss = program("loss")
    x = loss.draw(loss.Case.of("jsd:10x4x20"))
    logits = (x.hidden @ x.head.T).detach()
    for by_logits in (None, logits):  # given, its first rows serve every chunk
        by_hidden, by_head = loss.products(x, 10, by_logits)
        assert (by_hidden - logits @ x.head).norm() < 1e-5 * by_hidden.norm()
        assert (by_head - logits.T @ x.hidden).norm() < 1e-5 * by_head.norm()
    assert (loss.products(x, 3)[1] - by_head).norm() < 1e-5 * by_head.norm()


def test_scaling(program, capsys):
    scaling = program("scaling")
    rows = scaling.main(["--parts", "tokens", "--sizes", "512", "1024", "--repeats", "1"])
    assert [row["part"] for row in rows] == ["tokens", "tokens", "tokens, exponents"]
    assert rows[-1]["plain_peak_mib"] == pytest.approx(1, abs=0.1)
    assert rows[-1]["peak_mib"] < 0.3
    assert "plain_peak_mib grows with tokens to the power of" in capsys.readouterr().out
    halves = scaling.step_of(2)
    assert len(halves["sampling"]()) == 2 * scaling.QUESTIONS
    assert math.isfinite(halves["update"]())


def test_exponents(program):
    measure = program("measure")
    assert measure.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert measure.per_unit([1, 2, 4], [5, 8, 14]) == pytest.approx(3)


def test_accelerator(program, tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    gpu = program("gpu")
    rows = gpu.main(["--tiny", "--json", str(path)])
    assert lines(path) == rows
    assert not [row for row in rows if "error" in row]
    parts = {part: [row for row in rows if row["part"] == part] for part in gpu.PARTS}
    for row in parts["check"]:
        narrow = row["dtype"] == "bfloat16"
        assert row["error_loss"] < 1e-5
        assert max(row["error_hidden"], row["error_head"]) < (1e-2 if narrow else 1e-4)
    assert {row["kind"] for row in parts["loss"] if row["method"] == "ours, eager"} == set(gpu.KINDS)
    table = capsys.readouterr().out
    assert all(f"\n{part}\n" in table for part in gpu.PARTS)


def test_lora_ema(program, tmp_path):
    model = {
        "lora": {"r": 4, "lora_alpha": 8},
        "verifier": "tests.support.helpers.half_right",
        "max_response_length": 12,
    }
    model["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.0}}
    quick = ["--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
    settings = config(tmp_path / "run", steps=2, model=model, multiplier=None)
    first, second = program("lora_ema").main(["fit", "--config", settings, *quick])
    # B starts at zero, so A has no gradient yet: the average of the factors is exact, and 20 times what it is from zero.
    assert first["factors"] < 1e-6
    assert first["from_zero"] == pytest.approx(0.95, abs=1e-4)
    assert first["log_p_max"] < 1e-3
    assert 1e-4 < second["factors"] < 0.1
    assert second["rank_2r"] < 1e-10  # the average of two products
    assert second["rank_1r"] > 1e-6
    assert 0 < second["kl"] < second["kl_to_student"]
    assert lines(tmp_path / "run" / "lora_ema.jsonl") == [first, second]


def test_ema_types(program, tmp_path):
    model = {"verifier": "tests.support.helpers.half_right", "max_response_length": 12, "teacher.update_rate": 0.01}
    quick = ["--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
    settings = config(tmp_path / "run", steps=10, model=model, multiplier=None)
    rows = program("ema_types").main(["fit", "--config", settings, *quick])
    assert [row["step"] for row in rows] == [1, 2, 5, 10]
    last = rows[-1]
    assert last["fp32"] < 1e-9
    assert last["fp32"] < last["difference"] < last["stochastic"]
    assert 10 * last["stochastic"] < last["nearest"] < last["student"]
    assert last["stochastic"] < min(last["stochastic_mixed"], last["student"])
    assert lines(tmp_path / "run" / "ema_types.jsonl") == rows


def test_a_part_that_fails_does_not_stop_the_others(program, monkeypatch, capsys):
    gpu = program("gpu")

    def fails(_):
        yield {"before": 1.0}
        raise MemoryError("no room\nat all")

    monkeypatch.setitem(gpu.PARTS, "check", (fails, 0.0))
    rows = gpu.main(["--tiny", "--parts", "check", "environment"])
    assert rows[:2] == [
        {"program": "gpu", "part": "check", "before": 1.0},
        {"program": "gpu", "part": "check", "error": "MemoryError: no room"},
    ]
    assert rows[2]["product_tflops"] > 0
    rows = gpu.main(["--tiny", "--parts", "check", "environment", "--budget", "0"])
    assert [row["skipped"] for row in rows] == ["0 s left", "0 s left"]


def test_a_method_that_fails_is_left_out_of_the_comparison(program):
    gpu = program("gpu")
    setup = gpu.replace(gpu.Setup("cpu", False, gpu.SMALL), repeats=1)

    def fails():
        raise RuntimeError("CUDA out of memory")

    rows = list(gpu.compare({"kind": "jsd"}, {"floor": lambda: sum(range(9999))}, {"a": fails, "b": list}, setup))
    assert rows[0] == {"kind": "jsd", "method": "a", "error": "RuntimeError: CUDA out of memory"}
    assert [row["method"] for row in rows[1:]] == ["floor", "b"]


def test_steps_with_unequal_lengths(program, tmp_path):
    unequal = program("unequal")
    shape = unequal.Shape(2, (20, 40), (4, 12), 1024, 32, 1)
    unequal.write_model(tmp_path, shape)
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    assert len(prompts) == 2
    assert len(prompts[0][0]["content"]) < len(prompts[1][0]["content"])
    found = unequal.measure("ours", tmp_path, shape, "top100", 2)
    assert found["step"] == pytest.approx(found["generation"] + found["update"], abs=0.01)
    assert min(found["generation"], found["update"], found["in_loss"]) > 0
    assert 2 < found["length"] < 10, "most responses end before the limit of 12 tokens"
