"""A run on the toy programs: the teacher reads what running the student's programs gave."""

import json

from pgpo_lightning.commands.main import main
from pgpo_lightning.monitoring.curves import read_scalars

SMALL = {
    "data.batch_size": "2",
    "data.limit_val": "4",
    "model.num_generations": "4",
    "model.evaluation.samples": "1",
    "trainer.max_steps": "1",
    "trainer.val_check_interval": "1",
    "trainer.enable_progress_bar": "false",
    "summary.picture": "false",
}


def test_a_step_learns_from_execution_feedback(tmp_path):
    configs = [word for name in ("code", "code/feedback", "code/no-expected") for word in ("--config", name)]
    small = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    main(["fit", *configs, *small, "--trainer.default_root_dir", str(tmp_path)])
    (rollouts,) = tmp_path.rglob("rollouts/step=*.jsonl")
    rows = [json.loads(line) for line in rollouts.read_text().splitlines()]
    failed = [row for row in rows if row["reward"] < 1]
    assert failed
    for row in failed:
        question, told = row["prompt"], row["what the teacher sees"]
        assert told.startswith(f"{question}\nThe following is feedback from your unsuccessful earlier attempt:\n\n")
        assert "Test Case" in told or "Runtime Error" in told
        assert "Expected" not in told
    curves = read_scalars(tmp_path)
    used = curves["self_distillation/feedback_used_fraction"][1]
    assert 0 < used == 1 - curves["critic/score/mean"][1]
    assert curves["actor/grad_norm"][1] > 0
