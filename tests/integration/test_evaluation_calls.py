"""An evaluation is one call of the engine, with a number of responses decoded at the same time of its own."""

import dataclasses

import pytest

from pgpo_lightning.commands.main import main
from pgpo_lightning.commands.plan import PlanCommand
from pgpo_lightning.data import ToyArithmetic
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rollout import TransformersEngine
from pgpo_lightning.rollout.engine import Engine
from pgpo_lightning.training.configs import EvaluationConfig
from tests.support import CONFIGS
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, questions, tiny_model, trainer


class Calls(TransformersEngine):
    """Remembers the size of every call and how many responses it may decode at the same time."""

    def generate(self, model, tokenizer, asked, *args, **kwargs):
        """See :meth:`Engine.generate`."""
        seen.append((len(asked), self.max_sequences))
        return super().generate(model, tokenizer, asked, *args, **kwargs)


class Scheduling(Engine):
    """Decides itself what it decodes at the same time."""

    def generate(self, *args, **kwargs):
        """See :meth:`Engine.generate`."""
        raise NotImplementedError


seen = []


def evaluated(folder, data, **settings):
    seen.clear()
    config = EvaluationConfig(samples=2, **settings)
    module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, engine=Calls(6), evaluation=config, **LIMITS)
    trainer(folder).validate(module, datamodule=data, verbose=False)
    return module


def test_all_questions_are_in_one_call(tmp_path):
    module = evaluated(tmp_path, ToyArithmetic(limit_val=10, eval_batch_size=None), max_sequences=8)
    assert seen == [(10, 8)]
    assert module.engine.max_sequences == 6, "that of training"
    one_call = module.evaluator.held_out.path.read_text()
    evaluated(tmp_path, ToyArithmetic(limit_val=10, eval_batch_size=4))
    assert seen == [(4, 6), (4, 6), (2, 6)]
    assert module.evaluator.held_out.path.read_text() == one_call


def test_predictions_have_the_limit_of_evaluations(tmp_path):
    seen.clear()
    config = EvaluationConfig(samples=2, max_sequences=4)
    module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, engine=Calls(), evaluation=config, **LIMITS)
    trainer(tmp_path).predict(module, loader(questions(3), 3))
    assert seen == [(3, 4)]
    assert module.engine.max_sequences is None


def test_an_engine_that_decides_itself_refuses_the_setting():
    with pytest.raises(ValueError, match=r"Expected no `evaluation.max_sequences` with Scheduling, .* but got 4"):
        build(
            SDPO,
            tiny_model(),
            half_right,
            tokenizer=TOKENIZER,
            engine=Scheduling(),
            evaluation=EvaluationConfig(max_sequences=4),
        )


def plan(*args):
    return PlanCommand(["--config", str(CONFIGS / "quickstart.yaml"), *args]).run()


def test_the_plan_knows_how_many_answers_are_decoded_at_the_same_time():
    samples = plan().eval_samples
    assert plan().evaluated == 100 * samples
    assert plan("--data.eval_batch_size", "7").evaluated == 7 * samples
    assert plan("--model.evaluation.max_sequences", "5").evaluated == 5
    assert plan("--data.eval_batch_size", "null", "--questions", "9").evaluated == 9 * samples
    assert plan("--trainer.limit_val_batches", "0").evaluated == 0
    unknown = ["--data.class_path", "FileQuestions", "--data.train", "t.jsonl", "--data.eval_batch_size", "null"]
    unknown += ["--data.limit_val", "null"]
    with pytest.raises(ValueError, match=r"Expected `questions`, the number of held-out questions, .* but got null"):
        plan(*unknown)
    assert plan(*unknown, "--data.limit_val", "3").evaluations.questions == 3
    assert plan(*unknown, "--model.evaluation.max_sequences", "5").evaluations.questions is None


def test_the_plan_counts_evaluations_per_step():
    every = ["--trainer.max_steps", "40", "--trainer.val_check_interval"]
    assert plan(*every, "10").evaluations.per_step == pytest.approx((1 + 4) / 40)
    assert plan(*every, "10", "--trainer.num_sanity_val_steps", "0").evaluations.per_step == pytest.approx(4 / 40)
    assert plan(*every, "0.5", "--trainer.check_val_every_n_epoch", "1").evaluations.per_step is None
    updates = plan(*every, "10", "--model.update.updates_per_batch", "2")
    assert updates.evaluations == dataclasses.replace(plan(*every, "10").evaluations, per_step=(1 + 2) / 20)


def test_the_plan_prints_seconds_beside_those_of_a_run(tmp_path, capsys):
    args = ["--config", str(CONFIGS / "quickstart.yaml"), "--data.limit_val", "4"]
    quick = ["--trainer.max_steps", "2", "--trainer.num_sanity_val_steps", "0", "--data.batch_size", "4"]
    main(["fit", *args, *quick, "--trainer.default_root_dir", str(tmp_path / "run")])
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"Expected `assume.tflops` and `assume.bandwidth` with `measured`"):
        main(["plan", *args, *quick, "--measured", str(tmp_path / "run")])
    assert "predicted" not in capsys.readouterr().out.split("GiB per device")[1]
    rates = ["--assume.tflops", "0.02", "--assume.bandwidth", "5", "--assume.launch_overhead", "5e-6"]
    main(["plan", *args, *quick, *rates, "--measured", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "Seconds per step, predicted and not measured, on CPU: products at 0.02 TFLOP/s" in out
    rows = [line for line in out.split("predicted / measured |")[1].splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| rollouts", "| update", "| step"]
    predicted, measured, ratio = (float(cell) for cell in rows[-1].strip("| ").split(" | ")[1:])
    assert ratio == pytest.approx(predicted / measured, rel=0.02)
