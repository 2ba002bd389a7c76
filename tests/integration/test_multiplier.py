"""The rescale holds for exactly one optimizer step: moments and schedules never see it."""

import bitsandbytes
import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision

from pgpo_lightning.callbacks import ConstantMultiplier, InformationMultiplier, RandomMultiplier
from pgpo_lightning.modules import GRPO, SDPO
from tests.support.fixed_gradients import LR, OPTIMIZERS, PARTS, RHO, STEPS, FixedGradients, Scripted
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, tiny_model, trainer


def run(folder, optimizer, callbacks, scheduler=None, max_grad_norm=None):
    module = build(
        FixedGradients,
        tiny_model(),
        half_right,
        tokenizer=TOKENIZER,
        optimizer=optimizer,
        scheduler=scheduler,
        max_grad_norm=max_grad_norm,
        **LIMITS,
    )
    t = trainer(folder, max_steps=STEPS, callbacks=callbacks)
    t.fit(module, loader(range(STEPS), 1))
    return module, t.optimizers[0]


def moments(optimizer):
    return {
        (i, name): value.clone()
        for i, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if torch.is_tensor(value)
    }


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("scheduler", [None, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_untouched_and_every_parameter_moves_rho_times_as_far(tmp_path, name, scheduler, clip):
    plain, plain_optimizer = run(tmp_path, OPTIMIZERS[name], [], scheduler, clip)
    scaled, scaled_optimizer = run(tmp_path, OPTIMIZERS[name], [Scripted(RHO)], scheduler, clip)

    expected, got = moments(plain_optimizer), moments(scaled_optimizer)
    assert expected
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key

    # ExponentialLR multiplies the *current* rate: had it seen rho, the rates would drift apart.
    assert [float(rate) for rate in plain.rates] == [float(rate) for rate in scaled.rates]

    steps = lambda module: torch.stack(module.path).diff(dim=0, prepend=torch.zeros(1, module.path[0].numel()))  # noqa: E731
    rounding = 1e-7  # of weights of up to 0.5 in fp32
    assert steps(plain).abs().mean() > 100 * rounding
    torch.testing.assert_close(steps(scaled), torch.tensor(RHO).unsqueeze(1) * steps(plain), rtol=1e-3, atol=rounding)


class Resumable(FixedGradients):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["steps"] = self.steps

    def on_load_checkpoint(self, checkpoint):
        self.steps = checkpoint["steps"]


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_the_state_of_an_8_bit_optimizer_comes_back_bit_for_bit(tmp_path, name):
    def fit(steps, checkpoint=None):
        make = lambda p: getattr(bitsandbytes.optim, name)(p, lr=LR)  # noqa: E731
        module = build(Resumable, tiny_model(), half_right, tokenizer=TOKENIZER, optimizer=make, **LIMITS)
        t = trainer(tmp_path, max_steps=steps, callbacks=[Scripted(RHO)])
        t.fit(module, loader(range(4), 1), ckpt_path=checkpoint)
        return module, t

    whole, t = fit(4)
    fit(2)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, u = fit(4, tmp_path / "half.ckpt")
    assert {torch.uint8} <= {value.dtype for value in moments(t.optimizers[0]).values()}
    assert len(resumed.path) == 2
    assert torch.equal(resumed.path[-1], whole.path[-1])
    theirs = moments(u.optimizers[0])
    for key, value in moments(t.optimizers[0]).items():
        assert torch.equal(value, theirs[key]), key


def test_equals_a_hand_written_loop_bit_for_bit(tmp_path):
    """AdamW with weight decay, clipping and a schedule that multiplies the current rate."""
    make = lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1)  # noqa: E731
    decay = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
    module, _ = run(tmp_path, make, [Scripted(RHO)], decay, 0.5)

    weights = torch.nn.Linear(64, 80)
    with torch.no_grad():
        weights.weight.zero_()
        weights.bias.zero_()
    optimizer, rate = make(weights.parameters()), LR
    for k in range(STEPS):
        generator = torch.Generator().manual_seed(k)
        optimizer.zero_grad()
        for _ in range(PARTS):
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in weights.parameters())
            (loss / PARTS).backward()
        torch.nn.utils.clip_grad_norm_(weights.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = rate * RHO[k]
        optimizer.step()
        rate *= 0.9
    assert torch.equal(module.path[-1], torch.cat([p.detach().flatten() for p in weights.parameters()]))


class Failing(torch.optim.SGD):
    """Its second step ends with whatever it is given, before any weight has moved."""

    ending: BaseException | None = None

    def step(self, closure=None):
        closure()
        if self.ending is not None:
            assert self.param_groups[0]["lr"] == 1.5 * LR  # the rate that must not stay
            raise self.ending
        return super().step()


class SavesOnException(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.optimizers[0].ending = self.ending if batch_idx == 1 else None

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("ending", [KeyError("disk full"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("first", ["multiplier", "checkpoint"])
def test_a_step_that_fails_leaves_the_base_rate_in_optimizer_and_checkpoint(tmp_path, ending, first):
    saves = SavesOnException(tmp_path / "now.ckpt")
    saves.ending = ending
    callbacks = [ConstantMultiplier(1.5), saves]
    module = build(
        FixedGradients, tiny_model(), half_right, tokenizer=TOKENIZER, optimizer=lambda p: Failing(p, lr=LR), **LIMITS
    )
    t = trainer(tmp_path, max_steps=4, callbacks=callbacks if first == "multiplier" else callbacks[::-1])
    with pytest.raises((KeyError, KeyboardInterrupt, SystemExit)):
        t.fit(module, loader(range(4), 1))
    assert module.steps == 1
    assert t.optimizers[0].param_groups[0]["lr"] == LR
    saved = torch.load(tmp_path / "now.ckpt", weights_only=False)["optimizer_states"][0]["param_groups"][0]
    assert saved["lr"] == LR


def test_a_step_that_the_gradient_scaler_leaves_out_leaves_the_base_rate(tmp_path):
    class Overflow(L.Callback):
        """The scaler finds an overflow after the multiplier has been asked."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert optimizer.param_groups[0]["lr"] == 1.5 * LR
            state = trainer.precision_plugin.scaler._per_optimizer_states[id(optimizer)]
            state["found_inf_per_device"] = {torch.device("cpu"): torch.ones(())}

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    module = build(FixedGradients, tiny_model(), half_right, tokenizer=TOKENIZER, optimizer=OPTIMIZERS["sgd"], **LIMITS)
    t = trainer(tmp_path, max_steps=2, callbacks=[ConstantMultiplier(1.5), Overflow()], plugins=[plugin])
    t.fit(module, loader(range(2), 1))
    assert not module.path[-1].any()  # nothing moved
    assert [float(rate) for rate in module.rates] == [LR, LR]


def test_two_steps_of_a_multiplier_do_not_multiply_each_other(tmp_path):
    module, optimizer = run(tmp_path, OPTIMIZERS["sgd"], [])
    module.scale_rates(optimizer, 3.0)
    module.scale_rates(optimizer, 2.0)  # the first was not put back
    assert optimizer.param_groups[0]["lr"] == 2 * LR
    module.restore_rates()
    module.restore_rates()
    assert optimizer.param_groups[0]["lr"] == LR


def test_two_multipliers_are_refused(tmp_path):
    t = trainer(tmp_path, callbacks=[ConstantMultiplier(1.1), RandomMultiplier()])
    module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS)
    with pytest.raises(
        MisconfigurationException, match=r"one step-size multiplier, but got ConstantMultiplier and Random"
    ):
        t.fit(module, loader(range(2), 1))


def test_information_needs_a_teacher(tmp_path):
    limits = {k: v for k, v in LIMITS.items() if k != "max_reprompt_len"}
    module = build(GRPO, tiny_model(), half_right, tokenizer=TOKENIZER, **limits)
    with pytest.raises(MisconfigurationException, match=r"a module with a teacher .* but GRPO has none"):
        trainer(tmp_path, callbacks=[InformationMultiplier()]).fit(module, loader(range(2), 1))
