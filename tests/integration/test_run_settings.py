"""A resumed run takes another setting for real, or refuses it by name; what was run stays on record."""

import io
import itertools
import shutil

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import InformationMultiplier, InverseMultiplier, StepSizeMultiplier
from pgpo_lightning.commands.main import main
from pgpo_lightning.core.run_settings import MAY_CHANGE, SEEN_BY_EFFECT, Remembers, check_settings, describe, settings
from pgpo_lightning.data import ToyArithmetic
from pgpo_lightning.modules import SDPO
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.training.resumed_optimizer import describe_optimizer, take_effect
from tests.support.helpers import LIMITS, TOKENIZER, build, config, half_right, tiny_model, tiny_sdpo
from tests.support.runs import final


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of 2 steps."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    main(["fit", "--config", config(folder, steps=2, seed_everything=6)])  # whose third step has a signal
    return folder


@pytest.fixture
def run(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    return folder, config(folder, steps=3, seed_everything=6)


CHANGED = {
    "--model.num_generations=2": r"`model.num_generations` is 2 and was 4",
    "--model.temperature=0.9": r"`model.temperature` is 0.9 and was 1.0",
    "--model.model_config.dtype=bfloat16": r"`model.model_config.dtype` is 'bfloat16' and was 'float32'",
    "--model.teacher.update_rate=0.5": r"`model.teacher.update_rate` is 0.5 and was 0.05",
    "--model.verifier=tests.support.helpers.half_right": r"`model.verifier` is .*half_right.* was {.*BoxedAnswer",
    "--multiplier=ConstantMultiplier": r"`multiplier` is .*ConstantMultiplier and was .*RandomMultiplier",
    "--multiplier.high=1.6": r"`multiplier.high` is 1.6 and was 1.5",
    "--multiplier=null": r"`multiplier` is None and was .*RandomMultiplier",
    "--trainer.precision=bf16-mixed": r"`trainer.precision` is 'bf16-mixed' and was '32-true'",
    "--seed_everything=4": r"Expected the seed of the checkpoint, 6, but got 4",
    "--data.hard=true": r"`data.questions` is '[0-9a-f]{64}' and was '[0-9a-f]{64}'",
    "--model.optimizer=torch.optim.SGD": r"Expected the `optimizer` that the run began with, .*AdamW, but got .*SGD",
    "--model.optimizer.amsgrad=true": r"Expected the `optimizer.amsgrad` that the run began with, False, but got True",
    "--model.scheduler=torch.optim.lr_scheduler.LinearLR": r"Expected the `scheduler` .*ExponentialLR, but got .*LinearLR",
    "--model.scheduler=null": r"Expected the `scheduler` that the run began with, .*ExponentialLR, but got None",
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_must_not_change_is_refused_by_name_and_nothing_is_written(run, change):
    folder, path = run
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(MisconfigurationException, match=CHANGED[change]):
        main(["fit", "--config", path, "--ckpt_path", "last", change])
    assert {file: file.read_bytes() for file in before} == before
    assert not list(folder.glob("config.resumed*"))


def resumed(run, *changes):
    folder, path = run
    before = (folder / "config.yaml").read_text()
    main(["fit", "--config", path, "--ckpt_path", "last", *changes])
    assert (folder / "config.yaml").read_text() == before
    saved = final(folder, 3)
    return saved, saved["optimizer_states"][0]["param_groups"][0], read_scalars(folder)


def test_optimizer_and_schedule_take_the_new_settings(run, capsys):
    """1e-3 * 0.9^n was the rate of step n."""
    changes = ["--model.optimizer.lr=0.01", "--model.optimizer.weight_decay=0.3", "--model.scheduler.gamma=0.5"]
    saved, group, curves = resumed(run, *changes)
    assert curves["lr/base"] == pytest.approx({1: 1e-3, 2: 9e-4, 3: 0.01 * 0.5**2})
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == pytest.approx((0.01 * 0.5**3, 0.01, 0.3))
    assert saved["lr_schedulers"][0]["base_lrs"] == [0.01]
    kept = yaml.safe_load((run[0] / "config.resumed-at-step=2.yaml").read_text())
    assert kept["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert saved["pgpo_lightning"]["settings"]["optimizer"]["groups"][0]["lr"] == 0.01
    # Once more, without a change since: nothing moves the rate again, and no further configuration is written.
    main(["fit", "--config", run[1], "--ckpt_path", "last", *changes, "--trainer.max_steps=4"])
    assert read_scalars(run[0])["lr/base"][4] == pytest.approx(0.01 * 0.5**3)


def test_evaluation_clipping_and_passes_take_the_new_settings(run):
    folder, _ = run
    _, _, curves = resumed(
        run, "--model.evaluation.samples=3", "--model.update.max_grad_norm=1e-6", "--trainer.val_check_interval=1"
    )
    assert 3 in curves["val/avg@3"]
    step = [final(folder, n)["state_dict"]["model.model.layers.0.mlp.up_proj.weight"] for n in (1, 2, 3)]
    moved = [(b - a).abs().max().item() for a, b in itertools.pairwise(step)]
    assert 0 < moved[1] < moved[0]  # Adam's moments take in next to nothing


def test_micro_batches_may_change_and_the_step_is_the_same(run):
    folder, path = run
    main(["fit", "--config", path, "--ckpt_path", "last"])
    whole = final(folder, 3)["state_dict"]
    main(
        [
            "fit",
            "--config",
            path,
            "--ckpt_path",
            str(folder / "checkpoints" / "step=000002.ckpt"),
            "--model.update.micro_batch_tokens=200",
        ]
    )
    for name, value in final(folder, 3)["state_dict"].items():
        torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_an_older_version_is_continued_with_a_warning(run):
    folder, path = run
    file = folder / "checkpoints" / "step=000002.ckpt"
    saved = torch.load(file, weights_only=True)
    del saved["pgpo_lightning"]["settings"]
    torch.save(saved, file)
    with pytest.warns(UserWarning, match="does not say which settings its run had"):
        main(["fit", "--config", path, "--ckpt_path", str(file)])
    assert final(folder, 3)["pgpo_lightning"]["steps"] == 3


def test_the_teachers_start_is_compared_where_no_checkpoint_holds_it():
    from pgpo_lightning.teachers.self_teaching import check_start

    one, other = (tiny_sdpo(seed, teacher_regularization="frozen").objective.teaching.start for seed in (0, 1))
    check_start(one, one)
    with pytest.raises(MisconfigurationException, match="Expected `model` to be the one that the run began with"):
        check_start(one, other)
    assert tiny_sdpo(teacher_regularization="ema").objective.teaching.start is None


def test_what_is_new_must_not_change_until_somebody_says_so():
    class Mine(Remembers):
        def __init__(self, new=1, mine=2):
            pass

    class Free(Mine):
        may_change_on_resume = frozenset({"mine"})

    def compare(cls):
        before, now = ({"model": settings(cls(**given))} for given in ({}, {"mine": 3}))
        return check_settings(before, now, {"model": cls.may_change_on_resume}, "x.ckpt")

    with pytest.raises(
        MisconfigurationException, match=r"of the run that x.ckpt belongs to, but `model.mine` is 3 and was 2. Go on"
    ):
        compare(Mine)
    assert compare(Free) == ["`model.mine` is 3 and was 2"]


def test_arguments_are_found_through_all_classes_and_by_either_of_two_names():
    assert settings(InformationMultiplier(alpha=2.0)) == settings(InformationMultiplier(2.0))
    assert settings(InformationMultiplier(alpha=2.0)) != settings(InformationMultiplier(3.0))
    assert {"run", "rho_min", "rho_max", "estimator"} <= {*_names(InverseMultiplier)}
    known = {*MAY_CHANGE["data"], *SEEN_BY_EFFECT["data"], "class"}
    assert set(settings(ToyArithmetic(limit_train=3))) <= known
    module = settings(tiny_sdpo(alpha=0.5))
    assert {*MAY_CHANGE["model"], *SEEN_BY_EFFECT["model"]} <= set(module)
    assert module["divergence.alpha"] == 0.5
    # What is left open is what it stands for.
    assert (
        module["teacher.update_rate"] == settings(tiny_sdpo(alpha=0.5, teacher_update_rate=0.05))["teacher.update_rate"]
    )


def _names(cls: type[StepSizeMultiplier]):
    class Known(cls):
        def __init__(self):
            pass

    found = Known.__new__(cls)
    return settings(found)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20, eta_min=1e-4),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=o.param_groups[0]["lr"], total_steps=20),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[4],
        ),
        None,
    ],
)
def test_a_new_rate_goes_on_as_if_the_schedule_had_had_it_from_the_start(schedule):
    def bare(lr):
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=lr)

    def make(lr):
        optimizer = bare(lr)
        return optimizer, None if schedule is None else schedule(optimizer)

    def rates(optimizer, scheduler, n):
        seen = []
        for _ in range(n):
            optimizer.step()
            seen.append(optimizer.param_groups[0]["lr"])
            if scheduler is not None:
                scheduler.step()
        return seen

    old, new = (describe_optimizer(bare(lr), schedule)[1] for lr in (1e-2, 3e-3))
    optimizer, scheduler = make(1e-2)
    rates(optimizer, scheduler, 7)
    resumed, resumed_schedule = make(3e-3)
    resumed.load_state_dict(optimizer.state_dict())
    if scheduler is not None:
        resumed_schedule.load_state_dict(scheduler.state_dict())
    take_effect(resumed, resumed_schedule, old, old, lambda: make(1e-2))
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    take_effect(resumed, resumed_schedule, old, new, lambda: make(3e-3))
    assert rates(resumed, resumed_schedule, 9) == pytest.approx(rates(*make(3e-3), 16)[7:], rel=1e-12)


def test_numbers_of_numpy_are_plain_in_a_checkpoint():
    given = {"temperature": 0.5, "num_generations": 2, "seed": 3}
    plain = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS | given)
    given = {name: np.asarray(value)[()] for name, value in given.items()}
    module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS | given)
    assert settings(module) == settings(plain)
    file = io.BytesIO()
    torch.save([settings(module), module.seed, describe(np.ones(2))], file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == [settings(plain), 3, [1.0, 1.0]]
    assert repr(module.seed) == "3"  # of which every random number is made
