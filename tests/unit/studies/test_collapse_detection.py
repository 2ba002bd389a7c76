"""The table of detections, false alarms and leads counts what it says, on records made by hand."""

import json
import re
from dataclasses import replace

import pytest

from pgpo_lightning.commands.main import main
from pgpo_lightning.monitoring.collapse_rules import RULES, CollapseRules, collapse_step
from pgpo_lightning.monitoring.run_record import RunRecord, write_runs
from pgpo_lightning.studies.collapse_detection import ANY, detection_table, markdown, outcome, scalars_from
from pgpo_lightning.studies.inference import exact_interval


def record(seed=0, rewards=(0.5,) * 20, scores=(0.5, 0.5, 0.5), entropies=(0.1,) * 20, arm="sdpo"):
    """A run of 20 steps with evaluations at 0, 10 and 20."""
    steps = list(range(1, len(rewards) + 1))
    curves = {
        "critic/score/mean": [steps, list(rewards)],
        "rollout/neg_log_prob": [steps, list(entropies)[: len(steps)]],
        "val/avg@8": [[0, 10, 20][: len(scores)], list(scores)],
    }
    return RunRecord("toy", arm, seed, len(rewards), 8, 1.0, 1.0, curves, {})


def falling(at, low=0.1, start=0.5):
    """The value falls at a step."""
    return tuple(start if step < at else low for step in range(1, 21))


# An alarm at the second of two bad steps: what is counted here are alarms, not how good the defaults are.
QUICK = CollapseRules(window=3, reward_fall=0.6, teacher_fall=0.6, score_fall=0.6)

RUNS = [
    record(0),  # healthy and calm
    record(1, entropies=falling(5, low=0.3, start=0.1)),  # healthy, with an alarm at 6
    record(2, rewards=falling(4), scores=(0.5, 0.0, 0.0)),  # alarm at 5, seen lost at 10, the reward lost at 5
    record(3, rewards=falling(16), scores=(0.5, 0.5, 0.1)),  # alarm at 17, seen lost at 20, the reward lost at 17
    record(4, rewards=falling(4), entropies=falling(2, low=0.3, start=0.1), scores=(0.5, 0.1, 0.1)),
    record(
        5, entropies=falling(12, low=0.3, start=0.1), scores=(0.5, 0.1, 0.4)
    ),  # alarm of entropy too late; lost once
    record(6, rewards=(*[0.5] * 5, *[0.28] * 5, *[0.2] * 10), scores=(0.5, 0.3, 0.2)),  # alarm at 7, reward lost at 12
]


def test_rows_by_hand():
    rows = {row.rule: row for row in detection_table(RUNS, QUICK)}
    assert list(rows) == [ANY, *RULES]
    any_rule, reward, entropy, score = rows[ANY], rows["reward"], rows["entropy-rises"], rows["score"]
    for row in rows.values():
        assert (row.collapsed, row.healthy, row.declining) == (5, 2, 0)
    assert (reward.detected, reward.late, reward.false_alarms) == (4, 0, 0)
    assert reward.leads == [3, 5, 5, 13]
    assert reward.reward_leads == [0, 0, 0, 5]
    # Run 4's entropy jumps within the warm-up, which is its start then: no change. Run 5's jumps after the score was lost.
    assert (entropy.detected, entropy.late, entropy.false_alarms) == (0, 1, 1)
    assert (score.detected, score.late, score.false_alarms) == (5, 0, 0)
    assert score.leads == [0] * 5
    assert (any_rule.detected, any_rule.late, any_rule.false_alarms) == (5, 0, 1)
    assert any_rule.leads == [0, 3, 5, 5, 13]
    assert rows["teacher-lost"].detected == rows["teacher-lost"].false_alarms == 0


def test_what_counts_as_a_collapse_is_an_argument():
    end = {row.rule: row for row in detection_table(RUNS, QUICK, when="end")}
    assert (end[ANY].collapsed, end[ANY].healthy, end[ANY].declining) == (4, 2, 1)  # run 5 recovered, but not quite
    assert [(end[rule].false_alarms, end[rule].declining_alarms) for rule in ("score", "entropy-rises")] == [
        (0, 1),
        (1, 1),
    ]
    assert detection_table(RUNS, QUICK, below=0.1)[0].collapsed == 1
    assert detection_table(RUNS, replace(QUICK, score_fall=None))[0].detected == 4


def test_runs_between_lost_and_healthy_are_counted_apart():
    runs = [record(7, scores=(0.5, 0.45, 0.5)), record(8, scores=(0.5, 0.44, 0.5), rewards=falling(10))]
    (row, *_) = detection_table(runs, QUICK)
    assert (row.healthy, row.false_alarms, row.declining, row.declining_alarms) == (1, 0, 1, 1)
    (row, *_) = detection_table(runs, QUICK, healthy=0.8)
    assert (row.healthy, row.false_alarms, row.declining, row.declining_alarms) == (2, 1, 0, 0)
    with pytest.raises(ValueError, match=r"Expected `healthy` to be at least `below` \(0.5\), but got 0.4"):
        detection_table(runs, healthy=0.4)


def test_the_defaults_are_those_of_the_callbacks():
    assert detection_table(RUNS) == detection_table(RUNS, CollapseRules()) != detection_table(RUNS, QUICK)


def test_a_part_of_the_seeds(tmp_path, capsys):
    write_runs(RUNS, tmp_path / "runs.jsonl")
    main(["guard", str(tmp_path / "runs.jsonl"), "--seeds", "[0,2]"])
    assert re.search(r"any rule \| 1 of 1 \[.*?\] \| 0 \| 0 of 1 \[.*?\] \| 0 of 0 \|", capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"Expected `seeds` to be among .* \[0, 1, 2, 3, 4, 5, 6\], but got \[9\]"):
        main(["guard", str(tmp_path / "runs.jsonl"), "--seeds", "[9]"])


@pytest.mark.parametrize(
    ("scores", "any_step", "end_step"),
    [
        ([0.5, 0.25, 0.25], None, None),  # half is not below half
        ([0.5, 0.24, 0.5], 10, None),
        ([0.5, 0.5, 0.24], 20, 20),
        ([0.5, 0.2, 0.1], 10, 10),
        ([0.0, 0.0, 0.0], None, None),
    ],
)
def test_the_step_at_which_a_score_is_lost(scores, any_step, end_step):
    assert collapse_step([0, 10, 20], scores) == any_step
    assert collapse_step([0, 10, 20], scores, when="end") == end_step


def test_the_reward_is_measured_from_the_base_model():
    assert outcome(record(rewards=(0.5, 0.2, 0.1, 0.1)), QUICK).reward_collapsed_at == 3
    assert outcome(record(rewards=(0.5, 0.2, 0.5, 0.5)), QUICK).reward_collapsed_at is None  # one odd step
    assert outcome(record(rewards=(0.5, 0.3, 0.26, 0.3)), QUICK).reward_collapsed_at is None


def test_a_run_without_the_base_models_score_is_refused():
    run = record(7)
    run.curves["val/avg@8"] = [[10, 20], [0.5, 0.5]]
    with pytest.raises(ValueError, match=r"Expected toy/sdpo/7 to be evaluated before the first step .* at \[10, 20\]"):
        detection_table([run])
    with pytest.raises(ValueError, match="Expected toy/sdpo/0 to be evaluated before the first step and after it"):
        detection_table([record(scores=(0.5,))])


def test_steps_of_a_record_are_whole_numbers():
    run = RunRecord.parse(json.dumps(vars(record())), "here")
    run.curves["critic/score/mean"][0] = [float(step) for step in run.curves["critic/score/mean"][0]]
    assert list(scalars_from(run)["critic/score/mean"]) == list(range(1, 21))


def test_the_printed_table_has_exact_intervals(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    write_runs(RUNS, path)
    quick = ["--rules.window", "3", "--rules.reward_fall", "0.6", "--rules.score_fall", "null"]
    main(["guard", str(path), "--each", "true", *quick])
    text = capsys.readouterr().out
    low, high = exact_interval(4, 5)
    cells = [line[2:-2].split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    lines = dict(cells)
    assert (
        lines["any rule"]
        == f"4 of 5 [{low:.2f}, {high:.2f}] | 1 | 1 of 2 [0.01, 0.99] | 0 of 0 | 5 (3 to 13) | 0 (0 to 5)"
    )
    assert lines["score"] == "0 of 5 [0.00, 0.52] | 0 | 0 of 2 [0.00, 0.84] | 0 of 0 |  | "
    assert lines["toy/sdpo/2"] == "10 | 5 | reward @5"
    assert lines["toy/sdpo/0"].strip(" |") == ""


def test_no_runs_of_a_kind_give_no_share():
    assert "| any rule | 0 of 0 | 0 | 0 of 1 [0.00, 0.97] | 0 of 0 |  |  |" in markdown(detection_table(RUNS[:1]))
