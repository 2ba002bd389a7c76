"""A multiplier of the gradient: before the moments, after the clip, and without a dose under Adam."""

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from pgpo_lightning.callbacks import ConstantMultiplier
from tests.support.fixed_gradients import LR, OPTIMIZERS, RHO, STEPS, FixedGradients, Scripted, gradient_loop
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, tiny_model, trainer

MAKE = {
    "sgd": OPTIMIZERS["sgd"],
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
    "adam, beta1 0": lambda p: torch.optim.Adam(p, lr=LR, betas=(0.0, 0.999)),
}
PLAIN_SGD = lambda p: torch.optim.SGD(p, lr=LR)  # noqa: E731


def fit(folder, make, multiplier=None, clip=None, **settings):
    module = build(
        FixedGradients, tiny_model(), half_right, tokenizer=TOKENIZER, optimizer=make, max_grad_norm=clip, **LIMITS
    )
    t = trainer(folder, max_steps=STEPS, callbacks=[multiplier] if multiplier else [], **settings)
    t.fit(module, loader(range(STEPS), 1))
    return module


@pytest.mark.parametrize("clip", [None, 0.5, 42.0])
@pytest.mark.parametrize("name", MAKE)
def test_equals_a_hand_written_loop_bit_for_bit(tmp_path, name, clip):
    """Three micro-batches. The norm is about 42: a clip at 0.5 always holds, one at 42 sometimes."""
    multiplier = Scripted(RHO, "gradient")
    module = fit(tmp_path, MAKE[name], multiplier, clip)
    expected = gradient_loop(MAKE[name], RHO, clip)
    assert torch.equal(module.path[-1], expected)
    assert module.rates == [LR] * STEPS
    assert multiplier.history == RHO
    assert not torch.allclose(expected, gradient_loop(MAKE[name], [1.0] * STEPS, clip), rtol=1e-3), "rho must matter"


def test_under_a_gradient_scaler_it_equals_the_loop_as_well(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    module = fit(tmp_path, MAKE["adamw"], Scripted(RHO, "gradient"), 0.5, plugins=[plugin])
    assert torch.equal(module.path[-1], gradient_loop(MAKE["adamw"], RHO, 0.5))


@pytest.mark.parametrize("value", [0.1, 3.0])
def test_a_constant_on_the_gradient_changes_nothing_under_adam_and_everything_under_sgd(tmp_path, value):
    """Under Adam nothing but for eps and rounding: 1e-5 of a step, with gradients of about 0.6 and an eps of 1e-8."""
    constant = lambda: ConstantMultiplier(value, applies_to="gradient")  # noqa: E731
    plain, scaled = fit(tmp_path, OPTIMIZERS["adamw"]), fit(tmp_path, OPTIMIZERS["adamw"], constant())
    assert (scaled.path[-1] - plain.path[-1]).abs().mean() < 1e-5 * LR
    no_eps = lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0, eps=1e-14)  # noqa: E731
    plain, scaled = fit(tmp_path, no_eps), fit(tmp_path, no_eps, constant())
    torch.testing.assert_close(scaled.path[-1], plain.path[-1], rtol=0, atol=5e-7)
    assert plain.path[-1].abs().mean() > 0.01
    plain, scaled = fit(tmp_path, PLAIN_SGD), fit(tmp_path, PLAIN_SGD, constant())
    torch.testing.assert_close(scaled.path[-1], value * plain.path[-1], rtol=1e-4, atol=1e-6)


def test_a_constant_on_the_update_is_a_dose_under_adam(tmp_path):
    plain, scaled = fit(tmp_path, OPTIMIZERS["adamw"]), fit(tmp_path, OPTIMIZERS["adamw"], ConstantMultiplier(3.0))
    torch.testing.assert_close(scaled.path[-1], 3.0 * plain.path[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "applies_to", "momentum"),
    [("adamw", "update", 0.9), ("sgd", "update", 0.9), ("adam, beta1 0", "update", 0.0), ("adamw", "gradient", 0.0)],
)
def test_what_momentum_leaves_is_logged(tmp_path, name, applies_to, momentum):
    """A batch's weight is what its gradient moves the weights by, counted out step by step."""
    module = fit(tmp_path, MAKE[name], Scripted(RHO, applies_to))
    rho = torch.tensor(RHO, dtype=torch.float64)
    weights = []
    for batch in range(STEPS):
        shares = torch.tensor([(1 - momentum) * momentum**i for i in range(STEPS - batch)], dtype=torch.float64)
        weights.append(((shares * rho[batch:]).sum() / shares.sum()).item())
    weights = torch.tensor(weights, dtype=torch.float64)
    assert module.scalars["lr/multiplier_std"] == pytest.approx(rho.std(correction=0).item())
    assert module.scalars["lr/batch_weight_std"] == pytest.approx(weights.std(correction=0).item())
    if momentum:
        assert "lr/batch_weight" not in module.scalars, "no weight is known to 5 % within 20 steps"
        assert module.scalars["lr/batch_weight_std"] < 0.6 * module.scalars["lr/multiplier_std"]
    else:
        assert module.scalars["lr/batch_weight"] == RHO[-1]
