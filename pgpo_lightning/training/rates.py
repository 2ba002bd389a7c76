"""Checks of the optimizer. Its class may be any, so its settings are read from its parameter groups."""

import inspect
import warnings
from numbers import Real
from typing import Annotated, Any

from lightning.pytorch.cli import OptimizerCallable
from torch.nn import Parameter
from torch.optim import Optimizer

from pgpo_lightning.core.settings import Decay, NonNegative, Range, check
from pgpo_lightning.core.texts import shown

HIGHEST_RATE = 10.0
"""Adam changes every weight by about `lr` per step, and the weights of language models are far below 1."""

SETTINGS = {
    "lr": Annotated[float, Range(above=0, most=HIGHEST_RATE)],
    "weight_decay": Annotated[float, Range(least=0, most=HIGHEST_RATE)],
    "momentum": Decay,
    "dampening": NonNegative,
    "betas": Annotated[float, Range(least=0, below=1)],
}
"""Settings that are checked if a group has them, besides `eps` and `maximize`."""

EPS = Range(above=0, most=1)


def build_optimizer(make: OptimizerCallable, parameters: list[Parameter]) -> Optimizer:
    """Return the optimizer of these parameters, after checking its settings.

    Args:
        make: Constructs the optimizer from parameters.
        parameters: The trained parameters.

    Raises:
        ValueError: If the optimizer's class or :func:`check_optimizer` rejects the settings.
    """
    try:
        optimizer = make(parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected settings that the class of `optimizer` takes, but it says: {error}.") from error
    check_optimizer(optimizer)
    return optimizer


def check_optimizer(optimizer: Optimizer) -> None:
    """Check that the optimizer would change the weights, in the right direction, and without overflow in float32.

    Args:
        optimizer: The new optimizer, before a schedule or a multiplier has changed its rates.

    Raises:
        ValueError: Names the setting.
    """
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise ValueError(
                "Expected `optimizer.maximize` to be false, because the loss is minimised, but got true. Leave it out."
            )
        for name, hint in SETTINGS.items():
            value = group.get(name)
            for i, each in enumerate(value if isinstance(value, (tuple, list)) else [value]):
                if each is not None:
                    check(
                        f"optimizer.{name}{f'[{i}]' if isinstance(value, (tuple, list)) else ''}", _number(each), hint
                    )
        eps = group.get("eps")  # a pair with None in Adafactor; 0 in bitsandbytes' Lion, which has none
        if isinstance(eps, Real) and _takes(optimizer, "eps") and not EPS.holds(eps):
            raise ValueError(f"Expected `optimizer.eps` {EPS.text}, but got {shown(eps)}.")


def check_rates(optimizer: Optimizer) -> None:
    """Check the learning rates that a schedule has set. 0 is allowed, because a warm-up may start there.

    Raises:
        ValueError: Names the schedule.
    """
    for group in optimizer.param_groups:
        rate = _number(group["lr"])
        if not (isinstance(rate, (int, float)) and 0 <= rate <= HIGHEST_RATE):
            raise ValueError(
                f"Expected `scheduler` to make learning rates from 0 to {HIGHEST_RATE:g}, but got {shown(rate)}."
            )


def advance_schedule(scheduler: Any, optimizer: Optimizer) -> None:
    """Step the schedule, if there is one, and check the rates that it makes.

    Raises:
        ValueError: If a rate is one that no step should be taken with.
    """
    if scheduler is None:
        return
    with warnings.catch_warnings():
        # It goes by batches, and the first may have been skipped.
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
        scheduler.step()
    check_rates(optimizer)


def _takes(optimizer: Optimizer, setting: str) -> bool:
    return setting in inspect.signature(type(optimizer)).parameters


def _number(value: Any) -> Any:
    """Return the number in a tensor, because some optimizers store their rate as one."""
    return value.item() if hasattr(value, "item") else value


class ScaledRates:
    """Learning rates that are scaled for one optimizer step, and put back after it."""

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], Any]] = []

    def scale(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply all learning rates for the rest of the optimizer step that is under way.

        The step puts them back, also after an exception, an interrupt, or a step that a gradient scaler leaves out.

        Args:
            optimizer: Whose rates.
            factor: At least 0.
        """
        self.restore()
        # The very objects are kept and put back: dividing by the factor would round, and a tensor would lose its identity.
        self._before = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, rate in self._before:
            group["lr"] = rate * factor

    def restore(self) -> None:
        """Undo :meth:`scale`. Does nothing where there is nothing to undo."""
        for group, rate in self._before:
            group["lr"] = rate
        self._before = []
