"""A real second model: the toy taught longer teaches the toy, with the multiplier, and a resumed run is the same run."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from benchmarks.toy_base import BASE_MODEL, solution_probabilities
from benchmarks.toy_teacher import divergence, teach
from pgpo_lightning.callbacks import InformationMultiplier
from pgpo_lightning.commands.main import main
from pgpo_lightning.data.toy import ToyArithmetic, questions
from pgpo_lightning.models.loading import load_model, load_tokenizer
from pgpo_lightning.modules import OPD, TGPO
from pgpo_lightning.rewards import BoxedAnswer
from pgpo_lightning.teachers.configs import TeacherConfig
from tests.support.helpers import build, config, trainer
from tests.support.runs import assert_same_run, final

HELD_OUT = questions("test")[:64]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    teach(folder, steps=40)
    return str(folder)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(OPD, {}), (TGPO, {"guidance": 0.5})],
    ids=["OPD", "TGPO"],
)
def test_the_student_approaches_the_teacher(tmp_path, teacher, cls, settings):
    module = build(cls, "toy", BoxedAnswer(), num_generations=4, max_prompt_length=64, max_response_length=32,
                   teacher=TeacherConfig(model=teacher), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4),
                   **settings)  # fmt: skip
    module.configure_model()
    theirs = load_model(teacher)
    before = divergence(module.model.eval(), theirs, HELD_OUT)
    module.model.train()
    multiplier = InformationMultiplier(sensitivity=1.0)
    trainer(tmp_path, max_steps=24, callbacks=[multiplier]).fit(module, ToyArithmetic(batch_size=16))
    after = divergence(module.model.eval(), theirs, HELD_OUT)
    module.model.save_pretrained(tmp_path / "student")
    load_tokenizer("toy").save_pretrained(tmp_path / "student")
    scores = [solution_probabilities(f, HELD_OUT).mean().item() for f in (BASE_MODEL, tmp_path / "student", teacher)]
    print(f"{cls.__name__}: KL {before:.4f} -> {after:.4f}, solution probability {scores}")
    assert after < 0.8 * before
    assert scores[0] + 0.05 < scores[1] < scores[2]
    assert module.reported["lr/multiplier"] >= 1
    assert module.reported["information/mean"] != 0
    assert "self_distillation/divergence_bound" not in module.reported


@pytest.mark.parametrize(("module", "settings"), [("OPD", {}), ("TGPO", {"guidance": 0.5, "guidance_steps": 3})])
def test_a_resumed_run_is_the_same_run(tmp_path, teacher, module, settings):
    def written(name, steps):
        path = Path(
            config(tmp_path / name, steps=steps, module=module, model=settings | {"teacher": {"model": teacher}})
        )
        content = yaml.safe_load(path.read_text())
        del content["model"]["init_args"]["reprompt"]  # the teacher reads the student's prompt
        path.write_text(yaml.safe_dump(content))
        return str(path)

    main(["fit", "--config", written("whole", 6)])
    main(["fit", "--config", written("parts", 2)])
    main(["fit", "--config", written("parts", 6), "--ckpt_path", "last"])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    names = [name for name in final(tmp_path / "whole")["state_dict"] if name.startswith("teacher.")]
    assert names == ["teacher._extra_state"]
    with pytest.raises(MisconfigurationException, match=r"`teacher.model` to be the teacher that the run began with"):
        main(["fit", "--config", written("parts", 8), "--ckpt_path", "last", "--model.teacher.model", "toy"])
