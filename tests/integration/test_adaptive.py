"""The rules of others do what their sources say, and an adaptive alpha finds its target. As a program: a worker under DDP.

Usage: test_adaptive.py OUTPUT RANKS NAME trains on fixed rows, each rank with its own share, with the named multiplier.
"""

import math
import random
import sys
from pathlib import Path
from statistics import fmean, stdev

import bitsandbytes
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import (
    AdaptiveInformationMultiplier,
    EffectiveSampleSizeMultiplier,
    KLAdaptiveMultiplier,
    LossScaledMultiplier,
    PolyakMultiplier,
)
from pgpo_lightning.callbacks.adaptive import policy_change, slope
from pgpo_lightning.commands.main import main
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules import GRPO, SDPO
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.monitoring.run_record import RunRecord
from tests.support import ranks_worker
from tests.support.fixed_gradients import one_row
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    accumulate,
    build,
    config,
    half_right,
    loader,
    questions,
    random_rows,
    tiny_model,
    tiny_sdpo,
    trainer,
)
from tests.support.processes import finish, start_ranks

# ------------------------------------------------------------------------------------------------ KL-adaptive


def test_the_rule_of_rsl_rl():
    multiplier = KLAdaptiveMultiplier(target=0.01, rho_min=0.5, rho_max=2.0)
    expected = 1.0
    kls = [0.0201, 0.0199, 0.0, 0.0051, 0.5, 0.5, 0.5, 0.0049, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 0.03]
    for kl in kls:
        assert multiplier.multiplier(StepStatistics.empty(), 0) == expected
        multiplier.decide(kl)
        if kl > 0.02:
            expected = max(0.5, expected / 1.5)
        elif 0 < kl < 0.005:
            expected = min(2.0, expected * 1.5)
    assert expected == pytest.approx(2 / 1.5)


def test_policy_change_is_the_kl_of_the_sampler_to_the_policy():
    """One prompt and responses of one token: the exact KL is known, in both directions, and they differ."""
    module = tiny_sdpo(temperature=1.5, micro_batch_tokens=4000)
    prompt = list(range(5, 12))
    log_p = lambda: module.model(torch.tensor([prompt])).logits[0, -1].detach().div(1.5).log_softmax(0)  # noqa: E731
    old = log_p()
    tokens = torch.multinomial(old.exp(), 4000, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Sample(Rollout(Question("?", "1"), prompt, [t], old[t].view(1), "", True), Verdict(0.0)) for t in tokens]
    assert policy_change(module, rows) == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        module.model.model.norm.weight.mul_(3)  # sharper: the KL to it is larger than the KL from it
    new = log_p()
    forward, reverse = ((a.exp() * (a - b)).sum().item() for a, b in ((old, new), (new, old)))
    terms = (new - old)[tokens].double()
    error = (terms.expm1() - terms).std().item() / 4000**0.5
    measured = policy_change(module, rows)
    assert measured == pytest.approx(forward, abs=3 * error)
    assert abs(measured - reverse) > 3 * error


def test_policy_change_is_a_mean_over_tokens_whatever_the_micro_batches():
    rows = random_rows(8)
    few, many = tiny_sdpo(micro_batch_tokens=30), tiny_sdpo(micro_batch_tokens=10**6)
    changes = []
    for row in rows:
        ids = torch.tensor([row.rollout.prompt_ids + row.rollout.response_ids])
        log_p = many.model(ids).logits[0].log_softmax(-1)
        at = len(row.rollout.prompt_ids) - 1
        now = torch.stack([log_p[at + i, token] for i, token in enumerate(row.rollout.response_ids)])
        changes.append((now - row.rollout.log_probs).detach().double())
    change = torch.cat(changes)
    expected = (change.expm1() - change).mean().item()
    assert policy_change(many, rows) == pytest.approx(expected, rel=1e-4)
    assert policy_change(few, rows) == pytest.approx(expected, rel=1e-4)


class Sometimes(SDPO):
    """The loss of the second batch is not a number."""

    def accumulate_gradients(self, rows):
        loss = accumulate(super(), rows)
        return math.nan if self.steps == 1 else loss


@pytest.mark.parametrize("updates", [1, 2])
def test_a_batch_decides_once_and_a_skipped_one_not_at_all(tmp_path, updates):
    module = build(
        Sometimes, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, updates_per_batch=updates, **LIMITS
    )
    multiplier = KLAdaptiveMultiplier(target=1e3)  # any change is too little
    trainer(tmp_path, max_steps=3 * updates, max_epochs=1, callbacks=[multiplier]).fit(module, loader(questions(12), 2))
    assert multiplier.history == [1.0] * updates + [1.5] * updates + [2.25] * updates
    assert module.steps == 4


# ------------------------------------------------------------------------------------------ effective sample size


def weighted(log_ratio, length):
    values = {name: torch.ones(len(length)) for name in StepStatistics.__dataclass_fields__}
    mean = torch.tensor(log_ratio) / torch.tensor(length)
    return StepStatistics(**values | {"sampler_log_ratio": mean, "length": torch.tensor(length)})


@pytest.mark.parametrize(
    ("settings", "weights", "rho"),
    [
        ({}, [1.0, 1.0, 1.0], 1.0),
        ({}, [2.0, 2.0], 1.0),  # a common factor is no disagreement
        ({}, [1.0, 3.0], math.sqrt(16 / 10 / 2)),
        ({"scaling_rule": "linear"}, [1.0, 3.0], 0.8),
        ({"scaling_rule": "linear", "base_ratio": 0.9}, [1.0, 3.0], 0.8 / 0.9),
        ({"base_ratio": 0.7}, [1.0, 3.0], 1.0),
        ({"clip": 2.0, "scaling_rule": "linear"}, [1.0, 3.0], 9 / 5 / 2),
        ({}, [math.exp(300), 1.0, 1.0, 1.0], 0.5),  # overflows if it is computed as it is written
        ({"rho_min": 0.6}, [math.exp(300), 1.0, 1.0, 1.0], 0.6),
    ],
)
def test_effective_sample_size(settings, weights, rho):
    multiplier = EffectiveSampleSizeMultiplier(**settings)
    lengths = [float(3 + i) for i in range(len(weights))]
    statistics = weighted([math.log(weight) for weight in weights], lengths)
    assert multiplier.bounded(multiplier.multiplier(statistics, 0)) == pytest.approx(rho, rel=1e-5)


def test_no_sequence_is_no_disagreement():
    assert EffectiveSampleSizeMultiplier().multiplier(StepStatistics.empty(), 0) == 1.0


# ------------------------------------------------------------------------------------------------------- Polyak

DIRECTIONS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.03),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.03, betas=(0.0, 0.9)),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.03, betas=(0.0, 0.9), weight_decay=0.0),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_slope_is_what_a_linear_loss_loses_in_the_step(name):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (5, 3))
    unused = torch.nn.Parameter(torch.zeros(2))
    optimizer = DIRECTIONS[name]([{"params": [a, unused]}, {"params": [b], "lr": torch.tensor(0.01)}])
    for k in range(6):
        gradients = [(1 + k) * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in (a, b)]
        before = [p.detach().clone() for p in (a, b)]
        a.grad, b.grad = (g.clone() for g in gradients)
        expected = slope(optimizer)
        optimizer.step()
        lost = -sum((g * (p.detach() - p0)).sum() for g, p, p0 in zip(gradients, (a, b), before, strict=True))
        assert expected == pytest.approx(float(lost), rel=1e-6)


class Quadratic(SDPO):
    """Loss (w - 3)^2 / 2 of every weight, through the real update."""

    def configure_model(self):
        self.model = torch.nn.Linear(4, 1)
        with torch.no_grad():
            self.model.weight.zero_()
            self.model.bias.zero_()
        self.losses = []

    def training_step(self, batch, batch_idx):
        self.scalars = {}
        loss = sum((p - 3).square().sum() / 2 for p in self.model.parameters())
        self.manual_backward(loss)
        self.update(loss.item())
        self.losses.append(loss.item())
        self.steps += 1


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("c", "optimum"), [(1.0, 0.0), (0.7, 0.0), (2.0, 4.5)])
def test_polyak_takes_the_step_that_its_formula_says(tmp_path, optimizer, clip, c, optimum):
    """All five weights are alike, so that SGD and Adam walk the same line, w: |g|^2 = 5 (w - 3)^2 = 2 L."""
    module = build(
        Quadratic,
        tiny_model(),
        half_right,
        tokenizer=TOKENIZER,
        optimizer=DIRECTIONS[optimizer],
        max_grad_norm=clip,
        **LIMITS,
    )
    multiplier = PolyakMultiplier(c=c, optimum=optimum)
    multiplier.rho_max = 1e9  # the formula itself
    trainer(tmp_path, max_steps=5, callbacks=[multiplier]).fit(module, loader(range(5), 1))
    loss, expected = 22.5, []
    for _ in range(5):
        expected.append(loss)
        length = max(0.0, loss - optimum) / (c * 2 * loss)  # in units of the gradient
        loss *= (1 - length) ** 2
    assert module.losses == pytest.approx(expected, rel=1e-4)


def test_polyak_is_capped_and_one_without_a_gradient(tmp_path):
    multiplier = PolyakMultiplier(rho_max=3.0)
    multiplier.loss, multiplier.slope = 1.0, 1e-12
    assert multiplier.bounded(multiplier.multiplier(StepStatistics.empty(), 0)) == 3.0
    multiplier.loss = multiplier.slope = 0.0
    assert multiplier.multiplier(StepStatistics.empty(), 0) == 1.0


@pytest.mark.parametrize("settings", [{"full_logit_distillation": False, "alpha": 1.0}, None])
def test_polyak_needs_a_divergence(tmp_path, settings):
    limits = {k: v for k, v in LIMITS.items() if settings or k != "max_reprompt_len"}
    module = (SDPO if settings else GRPO)(tiny_model(), half_right, tokenizer=TOKENIZER, **limits, **(settings or {}))
    with pytest.raises(
        MisconfigurationException, match=r"a loss that is a divergence for PolyakMultiplier, .* has none"
    ):
        trainer(tmp_path, callbacks=[PolyakMultiplier()], max_steps=2).fit(module, loader(range(2), 1))


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3), lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True)],
)
def test_polyak_needs_an_optimizer_whose_direction_is_known(tmp_path, optimizer):
    module = build(Quadratic, tiny_model(), half_right, tokenizer=TOKENIZER, optimizer=optimizer, **LIMITS)
    with pytest.raises(MisconfigurationException, match=r"without amsgrad for PolyakMultiplier, but got .*AdamW"):
        trainer(tmp_path, callbacks=[PolyakMultiplier()], max_steps=2).fit(module, loader(range(2), 1))


# ------------------------------------------------------------------------------------------------ adaptive alpha


def steps(multiplier, information):
    """Rho of every step of a run with such an information, as the callback would decide it."""
    for k, value in enumerate(information):
        multiplier.history.append(multiplier.bounded(multiplier.multiplier(one_row(1.0 + value, 1.0), k)))
    return multiplier.history


def test_alpha_solves_for_the_mean_and_for_the_spread():
    """With information x and 0 in turn, exp(alpha x) and 1: the mean and the spread have closed forms."""
    information = [0.1, 0.0] * 3
    mean = AdaptiveInformationMultiplier(target_mean=1.2, window=4, warmup=4, sensitivity=2.0)
    assert steps(mean, information)[:4] == pytest.approx([math.exp(0.2), 1.0] * 2, rel=1e-5)
    assert mean.history[4:] == pytest.approx([1.4, 1.0], rel=1e-5)
    assert mean.sensitivity == pytest.approx(math.log(1.4) / 0.1, rel=1e-5)
    spread = AdaptiveInformationMultiplier(target_spread=0.2, window=4, warmup=4)
    steps(spread, information)
    assert spread.sensitivity == pytest.approx(math.log(1 + 0.2 * math.sqrt(3)) / 0.1, rel=1e-5)


@pytest.mark.parametrize("size", [0.004, 0.05])
def test_a_target_is_met_whatever_the_size_of_the_information(size):
    rng = random.Random(0)
    information = [size * (1 + 0.2 * rng.gauss(0, 1)) for _ in range(110)]
    mean = steps(AdaptiveInformationMultiplier(target_mean=1.1), information)
    assert fmean(mean[10:]) == pytest.approx(1.1, abs=0.005)
    spread = steps(AdaptiveInformationMultiplier(target_spread=0.05, rho_max=4.0, sensitivity_max=1e3), information)
    assert stdev(spread[10:]) == pytest.approx(0.05, abs=0.015)


def test_alpha_knows_the_past_only_and_passes_over_steps_without_a_teacher():
    make = lambda: AdaptiveInformationMultiplier(target_mean=1.3, window=3, warmup=2)  # noqa: E731
    a, b = steps(make(), [0.1, 0.2, 0.3, 0.1]), steps(make(), [0.1, 0.2, 0.3, 0.9])
    assert a[:3] == b[:3]
    multiplier = make()
    steps(multiplier, [0.1, 0.2, 0.3, 0.1])
    recent = multiplier.recent
    assert multiplier.multiplier(StepStatistics.empty(), 4) == 1.0
    assert multiplier.recent == recent


@pytest.mark.parametrize("information", [[-0.1, -0.2] * 3, [0.0] * 6, [1e-9] * 6])
def test_alpha_stays_where_no_alpha_meets_the_target(information):
    multiplier = AdaptiveInformationMultiplier(target_mean=1.3, warmup=2, sensitivity=4.0)
    steps(multiplier, information)
    assert multiplier.sensitivity == 4.0


def test_alpha_is_the_smallest_that_reaches_a_spread():
    """Far above it both values are at their bound and the spread is gone."""
    multiplier = AdaptiveInformationMultiplier(target_spread=0.1, warmup=4, rho_max=1.5)
    steps(multiplier, [0.1, 0.2] * 3)
    assert stdev(multiplier.bounded(math.exp(multiplier.sensitivity * i)) for i in multiplier.recent[:-1]) >= 0.1
    assert multiplier.sensitivity < 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLAdaptiveMultiplier(target=0.0), "`target` to be above 0, but got 0.0"),
        (lambda: KLAdaptiveMultiplier(factor=1.0), r"`factor` to lie in \(1, 10\], but got 1.0"),
        (lambda: KLAdaptiveMultiplier(rho_min=0.0), r"`rho_min` to lie in \(0, 1\], but got 0.0"),
        (lambda: KLAdaptiveMultiplier(rho_max=0.9), r"`rho_max` to lie in \[1, 1000\], but got 0.9"),
        (lambda: EffectiveSampleSizeMultiplier("root"), "`scaling_rule` to be one of sqrt, linear, but got 'root'"),
        (lambda: EffectiveSampleSizeMultiplier(base_ratio=0.0), r"`base_ratio` to lie in \(0, 1\], but got 0.0"),
        (lambda: EffectiveSampleSizeMultiplier(clip=0.0), "`clip` to be above 0, but got 0.0"),
        (lambda: EffectiveSampleSizeMultiplier(rho_min=1.5), r"`rho_min` to lie in \[0, 1\], but got 1.5"),
        (lambda: PolyakMultiplier(c=0.0), "`c` to be above 0, but got 0.0"),
        (lambda: PolyakMultiplier(optimum=-1.0), "`optimum` to be at least 0, but got -1.0"),
        (lambda: PolyakMultiplier(rho_min=3.0), "`rho_min` to be at most `rho_max`, but got 3.0 and 2.0"),
        (lambda: AdaptiveInformationMultiplier(), "one of `target_mean` and `target_spread`, but got None and None"),
        (lambda: AdaptiveInformationMultiplier(1.1, 0.1), "one of `target_mean` and `target_spread`"),
        (lambda: AdaptiveInformationMultiplier(0.9), "`target_mean` to be at least 1, but got 0.9"),
        (lambda: AdaptiveInformationMultiplier(2.0), r"below `rho_max` \(2.0\), but got 2.0"),
        (lambda: AdaptiveInformationMultiplier(None, 0.0), "`target_spread` to be above 0"),
        (lambda: AdaptiveInformationMultiplier(1.1, warmup=1), "`warmup` to be at least 2, but got 1"),
        (
            lambda: AdaptiveInformationMultiplier(1.1, sensitivity_max=0.5),
            "`sensitivity_max` to be at least",
        ),
        (lambda: AdaptiveInformationMultiplier(1.1, sensitivity=-1.0), "`sensitivity` to be at least 0"),
    ],
)
def test_bad_settings_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------- whole runs

RUNS = {
    "KLAdaptiveMultiplier": ["--multiplier.target", "0.01"],
    "AdaptiveInformationMultiplier": ["--multiplier.target_mean", "1.4", "--multiplier.warmup", "2"],
    "PolyakMultiplier": ["--multiplier.rho_max", "100"],
    "EffectiveSampleSizeMultiplier": ["--model.update.updates_per_batch", "2", "--seed_everything", "2"],
}


def command(folder, *args, steps=6):
    slow = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}}
    quick = ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
    main(["fit", "--config", config(folder, steps, model=slow), *quick, *args])


def checkpoint(folder, steps=6):
    return torch.load(folder / "checkpoints" / f"step={steps:06d}.ckpt", weights_only=True)


@pytest.mark.parametrize("name", ["KLAdaptiveMultiplier", "AdaptiveInformationMultiplier"])
def test_resume_is_exact(tmp_path, name):
    args = ["--multiplier", name, *RUNS[name]]
    command(tmp_path / "whole", *args)
    command(tmp_path / "run", *args, steps=3)
    command(tmp_path / "run", *args, "--ckpt_path", "last")
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "run")
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())
    assert a["callbacks"][name] == b["callbacks"][name]
    rho = RunRecord.load(tmp_path / "whole").rho
    assert rho == RunRecord.load(tmp_path / "run").rho
    assert len(set(rho)) >= 4
    scalars = read_scalars(tmp_path / "run")
    logged = {"KLAdaptiveMultiplier": "lr/kl", "AdaptiveInformationMultiplier": "information/sensitivity"}[name]
    assert scalars[logged] == read_scalars(tmp_path / "whole")[logged]


@pytest.mark.parametrize("name", ["PolyakMultiplier", "EffectiveSampleSizeMultiplier"])
def test_a_whole_run(tmp_path, name):
    command(tmp_path / "run", "--multiplier", name, *RUNS[name])
    rho = RunRecord.load(tmp_path / "run").rho
    assert len(rho) == 6
    if name == "PolyakMultiplier":
        assert len(set(rho)) == 6
        assert all(0.1 < value < 100 for value in rho), "a step of Adam's own size"
    else:
        assert rho[::2] == pytest.approx([1.0] * 3, abs=1e-6), "the first update of a batch is on-policy"
        assert 0 < min(rho[1::2]) < 0.99


# ----------------------------------------------------------------------------------------------- several processes

WORKERS = {
    "loss-scaled": lambda: LossScaledMultiplier(sensitivity=20.0, rho_min=None, rho_max=10.0),
    "kl-adaptive": lambda: KLAdaptiveMultiplier(target=0.01, factor=1.1),
}


@pytest.mark.parametrize("name", WORKERS)
def test_two_processes_equal_one(tmp_path, name):
    worker(tmp_path / "out1", 1, name)
    finish(*start_ranks([__file__, tmp_path / "out2", 2, name], tmp_path / "log", 2), log=tmp_path / "log")
    one, two, other = (torch.load(tmp_path / out, weights_only=True) for out in ("out1.0", "out2.0", "out2.1"))
    assert torch.equal(two["weights"], other["weights"])
    assert two["rho"] == other["rho"]
    assert len(set(one["rho"])) == 3, "the multiplier must move for the comparison to mean anything"
    assert two["rho"] == pytest.approx(one["rho"], rel=1e-3)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=3e-4)
    assert (two["weights"] - one["weights"]).abs().mean() < 1e-6


class FixedRows(ranks_worker.FixedSDPO):
    """Uneven shares, kept for whoever looks at the batch afterwards."""

    split = "uneven"

    def training_step(self, batch, batch_idx):
        self.seen = []
        super().training_step(batch, batch_idx)
        share = ranks_worker.ROWS // self.trainer.world_size
        rows = ranks_worker.rows_of(self.steps - 1, self.split)
        self.last_samples = rows[self.global_rank * share : (self.global_rank + 1) * share]


def worker(output, ranks, name):
    torch.set_num_threads(1)
    module = build(FixedRows,
        tiny_model(), half_right, tokenizer=TOKENIZER, micro_batch_tokens=120, max_grad_norm=0.5,
        loss_agg_mode="token-mean", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **LIMITS,
    )  # fmt: skip
    multiplier = WORKERS[name]()
    t = trainer(
        Path(output).parent, devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_steps=3, callbacks=[multiplier]
    )
    t.fit(module, loader(range(3 * ranks), 1))
    weights = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    torch.save({"weights": weights, "rho": multiplier.history}, f"{output}.{t.global_rank}")


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), sys.argv[3])
