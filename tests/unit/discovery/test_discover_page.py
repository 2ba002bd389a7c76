"""Figures of the study in docs/discover.md are those of the committed outcomes of its runs."""

import json
import lzma

import pytest

from pgpo_lightning.discovery.analysis import analyse
from pgpo_lightning.discovery.outcomes import Outcome
from pgpo_lightning.discovery.spec import read_discovery
from tests.support import CONFIGS, ROOT
from tests.support.committed import page, unknown


@pytest.fixture(scope="module")
def spec():
    return read_discovery(CONFIGS / "studies" / "discover.yaml")


@pytest.fixture(scope="module")
def outcomes():
    with lzma.open(ROOT / "docs" / "discover" / "outcomes.jsonl.xz", "rt", encoding="utf-8") as file:
        return [Outcome(**json.loads(line)) for line in file]


@pytest.fixture(scope="module")
def content(spec, outcomes):
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    return analyse(outcomes, spec.baseline, spec.budget, spec.predictions)


def test_the_records_are_the_whole_study(spec, outcomes):
    made = {(each.method, each.question, each.seed) for each in outcomes}
    questions = {each.question for each in outcomes}
    assert made == {(m, q, s) for m in spec.methods for q in questions for s in spec.seeds}
    assert len(made) == len(outcomes)
    assert len(questions) == spec.questions.count
    assert all(each.complete for each in outcomes)


def test_rows_of_the_methods(content):
    shown = lambda e: f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"  # noqa: E731
    for method in content["methods"]:
        at = method["discovery_at"]
        means = [f"{method[axis]['mean']['value']:,.3g}" for axis in ("generations", "tokens", "seconds")]
        cells = [method["name"], f"{method['found']}/{method['runs']}", shown(at["32"]), shown(at["128"]), *means]
        assert f"| {' | '.join(cells)} |" in page("discover.md")


def test_what_was_predicted_and_seen(content):
    signed = lambda e: f"{e['value']:+.2f} [{e['low']:+.2f}, {e['high']:+.2f}]"  # noqa: E731
    for row in content["predictions"]:
        low, high = row["interval"]
        cells = [f"{row['method']} - {row['against']}", f"{row['at']}", f"{low:+.2f} to {high:+.2f}"]
        cells += [signed(row["seen"]), "yes" if row["inside"] else "no"]
        assert f"| {' | '.join(cells)} |" in page("discover.md")


def test_every_interval_of_the_page_is_known(content):
    quoted = set()

    def collect(part):
        if isinstance(part, dict) and isinstance(part.get("value"), float):
            quoted.update(
                f"{part['value']:{sign}.2f} [{part['low']:{sign}.2f}, {part['high']:{sign}.2f}]" for sign in ("", "+")
            )
        elif isinstance(part, (dict, list)):
            for each in part.values() if isinstance(part, dict) else part:
                collect(each)

    collect(content)
    assert unknown(page("discover.md"), quoted) == []
    found = {row["question"]: row for row in content["by_question"]}
    assert (found[0]["sdpo"]["found"], found[0]["best-of-k"]["found"]) == (1, 3)
