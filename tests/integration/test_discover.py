"""`pgpo discover` on the toy model: every method, a run that is killed, and what is refused."""

import json
import signal
import time

import pytest
import yaml

from pgpo_lightning.commands.main import main
from pgpo_lightning.discovery.methods import METHODS
from tests.support.processes import start

BATCH = 4
RATE = "model.init_args.optimizer.init_args.lr"


def comparison(folder, **changes):
    """A comparison on one question that the toy never solves, with answers of a few tokens."""
    content = {
        "base": ["configs/quickstart.yaml", "configs/ablations/feedback.yaml"],
        "folder": str(folder),
        "questions": {"indices": [5]},
        "methods": ["sdpo"],
        "seeds": 1,
        "budget": 2 * BATCH,
        "settings": {
            "model.init_args": {"num_generations": BATCH, "max_response_length": 6, "max_prompt_length": 40},
            RATE: 1e-2,
            "checkpoint.every_n_train_steps": 2,
            "summary": {"texts_every_n_steps": 0, "picture": False},
        },
    } | changes
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return str(path)


def attempts(folder, method):
    (path,) = (folder / "runs" / method).rglob("attempts.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(rows):
    return [(row["number"], row["batch"], row["text"], row["feedback"], row["tokens"]) for row in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discover") / "all"
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    main(["discover", "--config", comparison(folder, methods=[*METHODS])])
    return folder


def test_every_method_makes_its_attempts(made, capsys):
    rows = {name: attempts(made, name) for name in METHODS}
    assert {name: len(each) for name, each in rows.items()} == dict.fromkeys(METHODS, 2 * BATCH)
    for name, each in rows.items():
        assert [row["number"] for row in each] == list(range(1, 2 * BATCH + 1))
        assert all(row["feedback"] and row["seconds"] > 0 and not row["success"] for row in each), name
        assert any(row["update_tokens"] for row in each) == METHODS[name].trains
    first = {name: drawn(each[:BATCH]) for name, each in rows.items()}
    second = {name: drawn(each[BATCH:]) for name, each in rows.items()}
    trained = [name for name, method in METHODS.items() if method.trains]
    assert all(first[name] == first["best-of-k"] for name in trained), "the draws of the base model, until weights move"
    assert all(second[name] != second["best-of-k"] for name in trained)
    lengths = [row["prompt_tokens"] for row in rows["multi-turn"]]
    assert lengths[1] > lengths[0], "the second turn reads feedback"
    assert rows["multi-turn-attempts"][1]["prompt_tokens"] != lengths[1]


def test_the_report_is_written(made):
    content = json.loads((made / "report.json").read_text())
    assert {row["name"]: row["complete"] for row in content["methods"]} == dict.fromkeys(METHODS, 1)
    assert [row["method"] for row in content["comparisons"]] == [name for name in METHODS if name != "best-of-k"]
    assert "## discovery@k" in (made / "report.md").read_text()
    assert (made / "discovery.png").read_bytes().startswith(b"\x89PNG")
    assert not list(made.rglob("*.ckpt"))


def test_a_finished_comparison_makes_nothing_and_refuses_other_settings(made, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("attempts.jsonl")}
    path = comparison(made, methods=["sdpo"])
    main(["discover", "--config", path, "--dry-run"])
    assert "sdpo, question 5, seed 0: 8 of 8 attempts, found: False" in capsys.readouterr().out
    main(["discover", "--config", path])
    assert {path: path.stat().st_mtime_ns for path in made.rglob("attempts.jsonl")} == before
    kept = attempts(made, "sdpo")
    main(["discover", "--config", path, "--budget", str(3 * BATCH)])
    more = attempts(made, "sdpo")
    assert more[: 2 * BATCH] == kept, "a larger budget continues the run"
    assert [row["number"] for row in more] == list(range(1, 3 * BATCH + 1))
    other = comparison(made, settings={"model.init_args.num_generations": 2})
    with pytest.raises(ValueError, match=r"comparison.json to have the settings .* `methods.sdpo.model.init_args"):
        main(["discover", "--config", other])


def test_a_killed_run_goes_on_without_a_repeated_attempt(tmp_path):
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(["discover", "--config", comparison(whole, budget=5 * BATCH)])
    path = comparison(killed, budget=5 * BATCH)
    process = start(["pgpo", "discover", "--config", path], tmp_path / "log")
    file = killed / "runs/sdpo/question=5/seed=0/attempts.jsonl"
    deadline = time.monotonic() + 240
    # Past the checkpoint after the second batch: what follows it is made again, and is in the file already.
    while not (file.exists() and file.read_bytes().count(b"\n") >= 3 * BATCH) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    survived = drawn(attempts(killed, "sdpo"))
    assert 3 * BATCH <= len(survived) < 5 * BATCH
    assert list(file.parent.glob("checkpoints/*.ckpt"))
    with file.open("ab") as half:
        half.write(b'{"number": 99, "te')  # the power failed during a write
    main(["discover", "--config", path])
    rows = drawn(attempts(killed, "sdpo"))
    assert rows[: len(survived)] == survived
    assert rows == drawn(attempts(whole, "sdpo")), "the same draws as without an interruption"


NO_FEEDBACK = {"base": ["configs/quickstart.yaml"]}


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"questions": {"indices": [99_999]}}, [], r"numbers from 0 to \d+, .* but got 99999"),
        ({}, ["--methods", "[sdqo]"], "`methods` to be among sdpo, pgpo"),
        ({"budget": 6}, [], "`budget` to be a multiple of `num_generations`, 4 for sdpo, but got 6"),
        (
            NO_FEEDBACK | {"methods": ["multi-turn"]},
            [],
            r"`verifier` to give feedback .* which a multi-turn method needs",
        ),
        (NO_FEEDBACK, [], r"`verifier` to give feedback .* which the self-teacher needs"),
        ({"base": ["configs/quickstart.yaml", "configs/ablations/grpo.yaml"]}, [], "no gradient: it is best-of-k"),
        ({"methods": ["pgpo"], "settings": {"multiplier": None}}, [], "a `multiplier` for pgpo"),
        ({"seeds": "one"}, [], "`seeds` to be their number"),
    ],
)
def test_what_is_refused(tmp_path, changes, words, message):
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    with pytest.raises(ValueError, match=message):
        main(["discover", "--config", comparison(tmp_path / "x", **changes), *words])
    written = [path for path in (tmp_path / "x").rglob("attempts.jsonl") if "multi-turn" not in str(path)]
    assert not written
