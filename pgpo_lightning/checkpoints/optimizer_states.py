"""Optimizer state in a checkpoint, numbered as optimizers do it: by the positions of their parameters.

Lightning numbers sharded parameters by their positions in the module, which has others too: those under an adapter. It writes
single files with such numbers, and takes the numbers of any file for such ones.
"""

from functools import partial
from typing import Any
from unittest.mock import patch

from lightning.fabric.strategies import model_parallel
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

_State = dict[str, Any]


def by_position(state: _State) -> _State:
    """Return an optimizer's state with parameters identified by their positions, instead of other numbers or names."""
    groups = state["param_groups"]
    if isinstance(groups, dict):  # in folders of shards
        groups = [groups[i] for i in sorted(groups)]
    return _renamed(state, groups, range(sum(len(group["params"]) for group in groups)))


def by_name(state: _State, module: nn.Module, optimizer: Optimizer) -> _State:
    """Return an optimizer's state with parameters identified by their names.

    Args:
        state: Of the optimizer of a run with the same parameters.
        module: Has the parameters.
        optimizer: Of this run.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    own = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return _renamed(state, state["param_groups"], own)


def _renamed(state: _State, groups: list[dict[str, Any]], names: Any) -> _State:
    new: dict[Any, Any] = dict(zip((old for group in groups for old in group["params"]), names, strict=True))
    values = {new.get(old, old): value for old, value in state.get("state", {}).items()}
    return state | {
        "state": values,
        "param_groups": [group | {"params": [new[old] for old in group["params"]]} for group in groups],
    }


def read_by_position(strategy: ModelParallelStrategy) -> None:
    """Let a strategy read optimizer states whose parameters are numbered by their positions in the optimizer."""
    if not isinstance(strategy.load_checkpoint, partial):
        setattr(strategy, "load_checkpoint", partial(_load, strategy, strategy.load_checkpoint))  # noqa: B010  (a method)


def _load(strategy: ModelParallelStrategy, load: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    optimizers = iter(strategy.optimizers)

    def renamed(state: _State, module: nn.Module) -> _State:
        return by_name(state, module, next(optimizers))

    with patch.object(model_parallel, "_rekey_optimizer_state_if_needed", renamed):
        return load(*args, **kwargs)  # type: ignore[no-any-return]
