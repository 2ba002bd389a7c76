"""Operations, FLOPs and bytes of a part of a step, how they are counted, and how long they take."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from pgpo_lightning.memory_planner.cards import Rates

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}

_LOOK_UPS = {"embedding", "gather", "index", "index_select"}  # read of their table what they return


@dataclass(frozen=True)
class Work:
    """What one device does in a part of a step. Sums and multiples are those of every field.

    Attributes:
        launches: Operations that the host gives to the device.
        flops: Of matrix products and attention. A multiplication with an addition counts as two.
        product_bytes: Bytes that matrix products and attention read and write.
        other_bytes: Bytes that all other operations read and write, each of them on its own (no fusion).
    """

    launches: float = 0.0
    flops: float = 0.0
    product_bytes: float = 0.0
    other_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Return the work of both."""
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Work":
        """Return several times this work; arrays of times give arrays."""
        return Work(*(value * times for value in dataclasses.astuple(self)))

    @property
    def bytes(self) -> float:
        """All bytes that are read and written."""
        return self.product_bytes + self.other_bytes

    def seconds(self, rates: Rates) -> float:
        """Return the seconds that this takes: those of the host or those of the device, whichever are more.

        Host and device work at the same time. On the device, products are bound by FLOPs or by bytes, other operations by bytes.
        """
        products = _larger(self.flops / rates.flops, self.product_bytes / rates.bandwidth)
        return _larger(self.launches * rates.overhead, products + self.other_bytes / rates.bandwidth)


def _larger(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(*torch.broadcast_tensors(torch.as_tensor(a), torch.as_tensor(b)))
    return max(a, b)


class WorkCounter(TorchDispatchMode):
    """Counts operations, FLOPs and bytes while it is active, on real tensors and on tensors without data.

    Views and allocations are no operations. FLOPs are those of ``torch.utils.flop_counter``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.flops = self.product_bytes = self.other_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        schema = function._schema
        written = [t for t in tree_iter(result) if isinstance(t, Tensor)]
        if schema.is_mutable:  # those that return nothing write into their arguments too
            places = zip(schema.arguments, args, strict=False)
            changed = [value for argument, value in places if argument.alias_info and argument.alias_info.is_write]
            written = [t for t in tree_iter(changed) if isinstance(t, Tensor)] or written
        name = schema.name.partition("::")[2]
        old = {id(t.untyped_storage()) for t in given}
        views = not schema.is_mutable and all(id(t.untyped_storage()) in old for t in written)
        if not written or views or name in _ALLOCATIONS:
            return result
        size = sum(_touched(t) for t in written)
        size += size if name in _LOOK_UPS else sum(_touched(t) for t in given)
        self.launches += 1
        packet = function._overloadpacket
        formula = _FORMULAS.get(packet) or _OF_EXPERTS.get(name) or flop_registry.get(packet)
        if formula is None:
            self.other_bytes += size
        else:
            self.flops += int(formula(*args, **kwargs, out_val=result))
            self.product_bytes += size
        return result

    @property
    def work(self) -> Work:
        """What has been counted."""
        return Work(self.launches, self.flops, self.product_bytes, self.other_bytes)


def _touched(tensor: Tensor) -> int:
    """Return the bytes of the different numbers of a tensor: an expanded one is not read several times from memory."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(_wide(query, query), _wide(key, query), _wide(value, query))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = (_wide(gradient, query), _wide(query, query), _wide(key, query), _wide(value, query))
    return sdpa_backward_flop_count(*shapes)


def _wide(tensor: Tensor, query: Tensor) -> tuple[int, ...]:
    """Return the shape with as many heads as the query has: each head of keys serves several."""
    return (tensor.size(0), query.size(1), *tensor.shape[2:])


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""FLOPs of the CPU's attention, which ``torch.utils.flop_counter`` leaves out."""


_OF_EXPERTS: dict[str, Callable[..., int]] = {
    "grouped_mm_fallback": lambda rows, experts, *_, **__: 2 * rows.size(0) * experts[0].numel(),
    "grouped_mm_fallback_backward": lambda rows, experts, *_, **__: 4 * rows.size(0) * experts[0].numel(),
}
"""FLOPs of transformers' grouped products, by the name of the operation. Their bytes are those of all experts."""


@dataclass(frozen=True)
class TokenWork:
    """The work of one forward pass with a cache, as a function of its size.

    Attributes:
        once: Work whatever the size, mostly the reading of the weights.
        row: Additional work per row.
        context: Additional work per row and token of its context, mostly the reading of keys and values.
    """

    once: Work
    row: Work
    context: Work

    def of(self, rows: Any, contexts: Any) -> Work:
        """Return the work of a pass.

        Args:
            rows: Number of rows; numbers or tensors.
            contexts: Tokens of all rows' contexts together.
        """
        return self.once + self.row * rows + self.context * contexts
