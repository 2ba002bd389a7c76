"""The file of a comparison, and what it may not say."""

import pytest
import yaml

from pgpo_lightning.core.shipped_configs import SHIPPED
from pgpo_lightning.discovery.methods import METHODS
from pgpo_lightning.discovery.spec import read_discovery

GOOD = {
    "base": "quickstart",
    "folder": "runs/x",
    "questions": {"indices": [1, 2]},
    "methods": ["sdpo", "best-of-k"],
    "seeds": 2,
    "budget": 32,
}


def read(tmp_path, **changes):
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (GOOD | changes).items() if value != "absent"}))
    return read_discovery(path)


def test_a_comparison_is_read(tmp_path):
    constant = {"class_path": "ConstantMultiplier", "init_args": {"value": 2.0}}
    methods = {
        "sdpo": None,
        "twice": {"like": "pgpo", "settings": {"multiplier": constant, "model.init_args.temperature": 0.5}},
    }
    spec = read(tmp_path, methods=methods)
    assert spec.seeds == (0, 1)
    assert spec.methods["twice"].settings["multiplier"] == constant
    assert spec.methods["twice"].settings["model"] == {"init_args": {"temperature": 0.5}}
    assert spec.methods["sdpo"].settings == {"multiplier": None}
    narrow = spec.narrowed(methods=["twice", "multi-turn"], questions=[7], seeds=[5], budget=16)
    assert (narrow.questions.indices, narrow.seeds, narrow.budget) == ((7,), (5,), 16)
    assert narrow.methods["twice"] is spec.methods["twice"]
    assert narrow.methods["multi-turn"].kind == "feedback"


def test_the_shipped_comparison_is_read_and_predicts():
    spec = read_discovery(SHIPPED / "studies" / "discover.yaml")
    assert len(spec.predictions) >= 3
    assert {"best-of-k", "sdpo", "pgpo", "multi-turn"} <= set(spec.methods)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["sdqo"]}, f"`methods` to be among {', '.join(METHODS)}, but got sdqo"),
        ({"methods": {"mine": {"like": "me"}}}, "`methods.mine.like` to be among"),
        ({"methods": {"mine": {"alike": "sdpo"}}}, "`methods.mine` to be a mapping with the keys like, settings"),
        ({"methods": {"sdpo": {"like": "pgpo"}}}, "`methods.sdpo` to be the method of this name"),
        ({"methods": {"best-of-k": {"settings": {"multiplier": None}}}}, "no `methods.best-of-k.settings`"),
        (
            {"methods": {"sdpo": {"settings": {"trainer.default_root_dir": "x"}}}},
            "not to set `trainer.default_root_dir`",
        ),
        ({"questions": {"indices": [1], "below": 0.1}}, "no `questions.below` with `questions.indices`"),
        ({"questions": {}}, "`questions.indices`, or `questions.below`"),
        ({"questions": {"below": 0.1, "above": 0.2}}, "`questions.above` to be less than `questions.below` 0.1"),
        ({"questions": {"indices": [1, 1]}}, "every one of `questions.indices` once"),
        ({"questions": {"indices": [-1]}}, "`indices"),
        ({"budget": 0}, "`budget` to be at least 1"),
        ({"budget": "absent"}, "to have `budget`"),
        ({"tries": 3}, "to have the keys base, .*but got tries"),
        ({"predictions": [{"method": "sdpo", "against": "grpo", "interval": [0, 1], "reason": "r"}]}, "no grpo"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **changes)


def test_a_narrowed_comparison_knows_its_methods(tmp_path):
    with pytest.raises(ValueError, match=r"`methods` to be among .*, but got grpo"):
        read(tmp_path).narrowed(methods=["grpo"])
    with pytest.raises(ValueError, match=r"there is no nowhere\.yaml"):
        read_discovery("nowhere.yaml")
