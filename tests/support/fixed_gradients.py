"""A module whose gradients do not depend on its weights, so that the effect of a multiplier is known exactly."""

import math
from contextlib import nullcontext

import bitsandbytes
import torch

from pgpo_lightning.callbacks import StepSizeMultiplier
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules import SDPO
from pgpo_lightning.training.learner import Learner, Step
from pgpo_lightning.training.rates import advance_schedule

STEPS, PARTS, LR = 20, 3, 0.01
RHO = [1.0 + 0.5 * math.sin(k) for k in range(STEPS)]


class Scripted(StepSizeMultiplier):
    """A given sequence."""

    def __init__(self, values, applies_to="update"):
        super().__init__(applies_to)
        self.values = values

    def multiplier(self, statistics, step):
        return self.values[step]


def gradient_source(step, rank=0):
    return torch.Generator().manual_seed(step + 1000 * rank)


def linear_loss(model, generator):
    return sum((p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters())


def gradient_loop(make, rho, clip=None, ranks=1):
    """The final weights of a loop written by hand: gradients of all micro-batches and ranks, clipped, then times rho."""
    model = torch.nn.Linear(64, 80)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    optimizer = make(model.parameters())
    for k, factor in enumerate(rho):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(ranks):
            optimizer.zero_grad()
            generator = gradient_source(k, rank)
            for _ in range(PARTS):
                (linear_loss(model, generator) / PARTS).backward()
            for sum_, p in zip(total, model.parameters(), strict=True):
                sum_ += p.grad / ranks
        for sum_, p in zip(total, model.parameters(), strict=True):
            p.grad = sum_
        torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
        for p in model.parameters():
            p.grad *= factor
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class FixedGradients(SDPO):
    """The real update, clip and schedule, on gradients that do not depend on the weights: the loss is linear in them."""

    def configure_model(self):
        self.model = torch.nn.Linear(64, 80)  # over 4096 elements: below, the 8-bit optimizer keeps 32-bit state
        with torch.no_grad():
            self.model.weight.zero_()
            self.model.bias.zero_()
        self.learner = Learner(self.model, self.objective, self.update)
        self.path, self.rates = [], []

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        generator = gradient_source(self.steps, self.global_rank)
        for part in range(PARTS):
            with nullcontext() if part == PARTS - 1 else self._no_sync():
                self.manual_backward(linear_loss(self.model, generator) / PARTS)
        step = Step(0.0, self.step_statistics)
        self.learner.apply(self.optimizers(), step, self.scalars, self._scaler, self.steps)
        advance_schedule(self.lr_schedulers(), self.optimizers(use_pl_optimizer=False))
        self.steps += 1
        self.path.append(torch.cat([p.detach().flatten().clone() for p in self.model.parameters()]))
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def on_save_checkpoint(self, checkpoint):
        pass


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(LR), weight_decay=0.0, foreach=False),
    "adamw-8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=LR, weight_decay=0.0),
}


def one_row(student, teacher):
    values = {name: torch.ones(1) for name in StepStatistics.__dataclass_fields__}
    return StepStatistics(
        **values | {"entropy_student": torch.tensor([student]), "entropy_teacher": torch.tensor([teacher])}
    )
