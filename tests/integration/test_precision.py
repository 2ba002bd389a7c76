"""Half precision with a gradient scaler: steps that overflow are skipped, the rest are those of full precision."""

import platform
import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from pgpo_lightning.callbacks import ConstantMultiplier
from pgpo_lightning.modules import SDPO
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, questions, tiny_model, trainer


class Watched(SDPO):
    """Remembers what every optimizer step left behind."""

    def configure_model(self):
        super().configure_model()
        self.learner.apply = self.watched

    def watched(self, *args):
        updated = type(self.learner).apply(self.learner, *args)
        rate = self.optimizers().param_groups[0]["lr"]
        self.seen.append((updated, self.scalars["actor/grad_norm"], rate, self.learner.skipped_in_a_row))
        return updated


def fit(folder, scaler=None, batches=3, max_skipped_steps=0, **settings):
    module = build(
        Watched,
        tiny_model(),
        half_right,
        tokenizer=TOKENIZER,
        num_generations=4,
        max_skipped_steps=max_skipped_steps,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        **LIMITS | settings,
    )
    module.seen = []
    plugins = [] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler)]
    t = trainer(folder, max_epochs=1, callbacks=[ConstantMultiplier(1.5)], plugins=plugins)
    start = [p.detach().clone() for p in module.student.given.parameters()]
    t.fit(module, loader(questions(2 * batches), 2))
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(module.model.parameters(), start, strict=True)])
    return module, moved, t


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_one_step_with_a_scaler_is_the_step_of_full_precision(tmp_path, max_grad_norm):
    """Whatever the scale, so that it is divided out again and clipping looks at the true norm."""
    full, expected, _ = fit(tmp_path, batches=1, max_grad_norm=max_grad_norm)
    for scale in (2.0**4, 2.0**14):
        half, moved, _ = fit(
            tmp_path, torch.amp.GradScaler("cpu", init_scale=scale), batches=1, max_grad_norm=max_grad_norm
        )
        (_, norm, rate, _), (_, exact, expected_rate, _) = half.seen[0], full.seen[0]
        assert norm == pytest.approx(exact, rel=0.02)
        assert exact > 0.05, "clipping must have something to do"
        assert rate == expected_rate == 0.1
        assert (moved - expected).norm() < 0.02 * expected.norm()


def test_steps_that_overflow_are_skipped_and_the_rate_stays_exact(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-13, growth_interval=1000)
    module, moved, t = fit(tmp_path, scaler, batches=4)
    updated = [seen[0] for seen in module.seen]
    assert updated[0] is False
    assert updated[-1] is True
    skips = updated.count(False)
    assert scaler.get_scale() == 2.0 ** (40 - 13 * skips)
    assert (module.learner.skipped, t.global_step) == (skips, 4 - skips)
    assert all(in_a_row == 0 for *_, in_a_row in module.seen), "looking for the scale is no failure of the run"
    assert [rate for _, _, rate, _ in module.seen] == [0.1 * 0.5**k for k in range(4)]
    assert moved.isfinite().all()
    assert moved.abs().max() > 0


def test_a_scale_that_cannot_fall_any_further_counts_as_failure(tmp_path):
    class Poisoned(Watched):
        def configure_model(self):
            super().configure_model()
            sound = type(self.objective).token_loss
            self.objective.token_loss = lambda tokens, given: sound(self.objective, tokens, given) * torch.nan

    module = build(
        Poisoned, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, max_skipped_steps=1, **LIMITS
    )
    module.seen = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, backoff_factor=0.5)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    with pytest.raises(RuntimeError, match="2 optimizer steps in a row had none"):
        trainer(tmp_path, max_epochs=1, plugins=plugins).fit(module, loader(questions(12), 2))
    assert module.learner.skipped == 3


class Rounding(torch.optim.SGD):
    bf16_stochastic_round = True


def test_narrow_weights_under_an_optimizer_that_rounds_to_nearest_are_warned_of(recwarn):
    def module(model, optimizer):
        made = build(SDPO, model, half_right, tokenizer=TOKENIZER, optimizer=lambda p: optimizer(p, lr=1e-6), **LIMITS)
        made.configure_model()
        return made

    module(tiny_model(), torch.optim.AdamW).configure_optimizers()
    module(tiny_model().bfloat16(), Rounding).configure_optimizers()
    assert not [warning for warning in recwarn if "rounds to nearest" in str(warning.message)]
    with pytest.warns(
        UserWarning, match=r"Weights in bfloat16 .* are lost .* `model_config.dtype` float32 .* `bf16_stochastic_round`"
    ):
        module(tiny_model().bfloat16(), torch.optim.AdamW).configure_optimizers()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_narrow_weights_leave_random_numbers_and_statistics_wide(tmp_path, precision):
    """Lightning's bf16-true makes bf16 the type of every new tensor: rollouts would be drawn with numbers of eight bits."""
    module = build(Watched, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, eval_samples=2,
                     optimizer=lambda p: Rounding(p, lr=0.1), **LIMITS)  # fmt: skip
    module.seen, types = [], set()
    module.actor.verifier = lambda question, response: (
        types.add(torch.get_default_dtype()) or half_right(question, response)
    )
    t = trainer(tmp_path, max_steps=2, precision=precision, val_check_interval=1)
    t.fit(module, loader(questions(4), 2), loader(questions(2), 2))
    assert types == {torch.float32}
    assert {p.dtype for p in module.model.parameters()} == {
        torch.bfloat16 if precision == "bf16-true" else torch.float32
    }
    assert all(updated for updated, *_ in module.seen)
    assert module.step_statistics.table().isfinite().all()
    # Sampler and trainer read one distribution, in which most log-probabilities need more than eight bits.
    log_probs = torch.cat([row.rollout.log_probs for row in module.last_samples])
    assert log_probs.dtype == torch.float32
    assert (log_probs != log_probs.bfloat16()).double().mean() > 0.9
    assert torch.get_default_dtype() == torch.float32


def test_narrow_products_on_a_cpu_that_cannot_multiply_them_are_told_of_once(tmp_path):
    fast = platform.machine() not in ("x86_64", "AMD64") or any(
        getattr(torch.cpu, name)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    told = []
    for precision, dtype in (("bf16-mixed", "float32"), ("32-true", "bfloat16"), ("32-true", "float32")):
        module = build(SDPO, "toy", half_right, num_generations=2, dtype=dtype, **LIMITS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                trainer(tmp_path, precision=precision, limit_test_batches=1).test(
                    module, loader(questions(1), 1), verbose=False
                )
        told.append([str(each.message) for each in caught if "are slow on this CPU" in str(each.message)])
    assert [len(each) for each in told] == ([0, 0, 0] if fast else [1, 1, 0])
    assert fast or "Products in bfloat16" in told[0][0]
