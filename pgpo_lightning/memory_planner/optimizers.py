"""Bytes of an optimizer's state, measured by steps of its class on small tensors."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.memory_planner.counter import LiveBytes
from pgpo_lightning.memory_planner.work import WorkCounter

_SMALL = 2**16  # parameters up to this size are measured in their own size


@dataclass(frozen=True)
class OptimizerNeed:
    """Memory of an optimizer, without weights and gradients.

    Attributes:
        name: Name of its class.
        state: Bytes of its state for all parameters.
        per_parameter: Bytes of its state per parameter.
        passing: Bytes that exist only during a step.
        paged: Whether the state is in memory that the driver moves to the host when the device is full.
        traffic: Bytes that a step reads and writes.
    """

    name: str
    state: int
    per_parameter: float
    passing: int
    paged: bool
    traffic: int = 0


def optimizer_need(
    make: Callable[[Any], torch.optim.Optimizer], shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: str
) -> OptimizerNeed:
    """Measure the optimizer's memory on small tensors and scale it to the model.

    Parameters of at most 65,536 elements are measured in their own size, because 8-bit optimizers keep small ones in 32 bits.
    Larger ones are measured on a tensor of about a million elements with the same number of dimensions, in proportion. On a
    GPU torch's own optimizers update all parameters at once by default (`foreach`). Their temporary tensors have the size of
    all parameters, which is measured too.

    Args:
        make: Function from parameters to the optimizer.
        shapes: Shapes of all trainable parameters.
        dtype: Type of parameters and gradients.
        device: cuda or cpu: the device of the planned run.

    Raises:
        ValueError: If the class fails on small tensors on a CPU.
    """
    counted = Counter(shapes)
    stand_ins = {shape: _stand_in(shape) for shape in counted}
    state = traffic = 0.0
    name, paged, at_once = "", False, False
    passing: dict[tuple[int, ...], float] = {}
    for shape in dict.fromkeys(stand_ins.values()):
        name, paged, at_once, bytes_, temporary, moved = _measure(make, shape, dtype, device)
        passing[shape] = temporary
        times = sum(
            torch.Size(real).numel() / torch.Size(shape).numel() * times
            for real, times in counted.items()
            if stand_ins[real] == shape
        )
        state += bytes_ * times
        traffic += moved * times
    needs = [
        passing[stand_ins[s]] * torch.Size(s).numel() / torch.Size(stand_ins[s]).numel() for s in counted.elements()
    ]
    total = sum(torch.Size(shape).numel() for shape in counted.elements())
    peak = sum(needs) if at_once else max(needs)
    return OptimizerNeed(name, round(state), state / total, round(peak), paged, round(traffic))


def _stand_in(shape: tuple[int, ...]) -> tuple[int, ...]:
    if torch.Size(shape).numel() <= _SMALL:
        return shape
    # So large that tables which all parameters share are negligible.
    return (1024, 1024) if len(shape) == 2 else (1024**2,) + (1,) * (len(shape) - 1)


def _measure(
    make: Callable[[Any], torch.optim.Optimizer], shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[str, bool, bool, int, int, float]:
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    try:
        optimizer = make([parameter])
        name = f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}"
        at_once = _whole_list(optimizer, device)
        # Compiling a step (torchao) would take a minute. Paged optimizers warn that a CPU has no pages.
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            for group in optimizer.param_groups:
                if at_once:
                    group["foreach"] = True
            for _ in range(2):  # the first step creates the state
                parameter.grad = torch.zeros_like(parameter)
                with LiveBytes() as counter, WorkCounter() as work:
                    optimizer.step()
    except Exception as error:
        raise ValueError(
            f"Expected `optimizer` to take a step on a small tensor on a CPU, by which its memory is measured, but got "
            f"{type(error).__name__}: {error}"
        ) from error
    state = state_bytes(optimizer)
    # Kernels of other libraries are not seen: they read parameter, gradient and state, and write parameter and state.
    moved = max(work.work.bytes, 3 * parameter.nbytes + 2 * state)
    return name, bool(getattr(optimizer, "is_paged", False)), at_once, state, counter.peak, moved


def _whole_list(optimizer: torch.optim.Optimizer, device: str) -> bool:
    group = optimizer.param_groups[0]
    if "foreach" not in group or group.get("fused"):
        return False
    return group["foreach"] or (group["foreach"] is None and is_gpu(device))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in an optimizer's state. Tensors that parameters share count once."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _inside(value):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def _inside(value: Any) -> list[Tensor]:
    if not isinstance(value, Tensor):
        return []
    if hasattr(value, "__tensor_flatten__"):  # quantised state, such as torchao's, and shards
        return [inner for name in value.__tensor_flatten__()[0] for inner in _inside(getattr(value, name))]
    return [value]
