"""The device: tensors that hold CPU data and say that they are elsewhere, and the kernels that run their operations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

from tests.support.pretended_gpu import graphs, rules
from tests.support.pretended_gpu.counts import note_cast, note_operation, note_wait

NAME = "pretend"
_NO_KERNELS = {
    "detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "_local_scalar_dense", "alias", "empty", "empty_strided",
    "empty_like", "new_empty", "new_empty_strided",
}  # fmt: skip
"""Operations that start no kernel, besides views."""
_FACTORIES = (
    "arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm", "randperm.generator", "tril_indices",
    "triu_indices",
)  # fmt: skip
"""Factories that torch would compose of `empty` and an operation that resizes it, which a wrapper does not follow."""
_kept: list[torch.library.Library] = []


class PretendedTensor(Tensor):
    """A tensor on the pretended device, whose data are in `inner`, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "PretendedTensor":
        return Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(NAME, 0), requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, inner: Tensor, requires_grad: bool = False) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "PretendedTensor":
        if id(self) not in memo:
            copy = PretendedTensor(self.inner.detach().clone(), self.requires_grad)
            copy.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "inner"}
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)  # a file holds plain tensors, which are read on the CPU

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        note_wait("tolist")
        return self.inner.detach().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert pretend:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: "PretendedTensor") -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner


def _each(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to all tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each(function, part) for part in value])
    if isinstance(value, dict):
        return {key: _each(function, part) for key, part in value.items()}
    return value


def _wrap(tensor: Tensor) -> Tensor:
    return PretendedTensor(tensor)


def _unwrap(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, PretendedTensor) else tensor


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check and count an operation as CUDA would run it, and compute it on the CPU."""
    name, overload = func._schema.name.partition("::")[2], func._overloadname
    tensors: list[Tensor] = []
    _each(tensors.append, args)
    _each(tensors.append, kwargs)
    on = [t for t in tensors if isinstance(t, PretendedTensor)]
    off = [t for t in tensors if not isinstance(t, PretendedTensor)]
    device = kwargs.get("device")
    target = bool(on) if device is None else torch.device(device).type == NAME
    rules.check_generator(func, kwargs, target)
    rules.check(func, name, args, kwargs, on, off)
    if on:
        rules.check_deterministic(name, args)
    if (on or target) and (why := rules.wait(name, overload, args, kwargs, target)) is not None:
        note_wait(why)
    if (on or target) and not func.is_view and name not in _NO_KERNELS:
        note_operation(name)
        if name == "_to_copy" and kwargs.get("dtype") not in (None, args[0].dtype):
            note_cast(args[0].shape, args[0].numel())
    plain_args, plain = _each(_unwrap, args), _each(_unwrap, kwargs)
    if device is not None:
        plain["device"] = torch.device("cpu") if target else device
    plain.pop("pin_memory", None)
    if name in ("mm", "addmm", "bmm") and overload.startswith("dtype"):
        out = rules.narrow_product(name, plain_args, plain)
        graphs.after(partial(_narrow_product, name), plain_args, plain, out)
    else:
        graphs.before(func, plain_args)
        out = func(*plain_args, **plain)
        graphs.after(func, plain_args, plain, out)
    if not target:
        return out
    wrapped = _each(_wrap, out)
    if func._schema.is_mutable or func.is_view:
        if torch.Tag.inplace_view not in func.tags and any(t.shape != t.inner.shape for t in on):
            raise NotImplementedError(f"{func} resized a tensor, which the pretended device does not follow.")
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if on else wrapped
    return wrapped


def _narrow_product(name: str, *args: Any, **kwargs: Any) -> Tensor:
    return rules.narrow_product(name, args, kwargs)


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    return run(func, args, kwargs)


class _Module:
    """What torch asks of the module of a device."""

    CUDAGraph = graphs.PretendedGraph
    graph = staticmethod(graphs.graph)

    def graph_pool_handle(self) -> None:
        pass

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def synchronize(self, device: Any = None) -> None:
        pass


def register() -> None:
    """Register the device, once per process."""
    if _kept:
        return
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    kernels = torch.library.Library("_", "IMPL", "PrivateUse1")
    kernels.fallback(_run)
    factories = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        factories.impl(name, partial(_run, getattr(getattr(torch.ops.aten, packet), overload or "default")))
    _kept.extend([kernels, factories])
    torch._C._set_only_lift_cpu_tensors(True)  # or `torch.tensor(..., device=...)` would go around the tensor's class
    from tests.support.pretended_gpu.autocast import register_autocast

    _kept.extend(register_autocast(NAME))
