"""Where the weights are: whole on every device, or sharded over the ranks by FSDP2, a layer at a time.

FSDP2 gathers weights around the forward pass of the module it was given, and sends gradients out behind that module's outputs.
The loss of this project needs embedding and head outside of any forward pass of the model, so it is made part of one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

T = TypeVar("T")


class Whole:
    """Every process has all weights, and they are used as they are."""

    sharded = False

    def inside(self, function: Callable[[], T]) -> T:
        """Return what the function returns; while it runs, the weights that it needs are there."""
        return function()

    def generation(self) -> AbstractContextManager[None]:
        """While it lasts, the student's forward passes take no part of any other rank."""
        return nullcontext()


class _Shell(nn.Module):
    """A forward pass for weights that are used outside of the forward passes of the layers: embedding, last norm, head."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class Sharded(Whole):
    """Each rank keeps a slice of every weight of student and teacher, of its gradient and of the optimizer's state.

    Args:
        student: On any device; its parameters become ``DTensor``.
        teacher: A teacher's own model, or ``None``.
        mesh: One-dimensional, of the ranks that share the data.
        precision: The trainer's. With bf16-mixed, weights are kept and gradients summed in fp32, gathered in bf16.

    Raises:
        MisconfigurationException: If the model does not say what its layers are, or the precision needs a gradient scaler.
    """

    sharded = True

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, mesh: DeviceMesh, precision: Precision
    ) -> None:
        compute = {"32-true": None, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
        if precision.precision not in compute:
            raise MisconfigurationException(
                f"Expected `trainer.precision` 32-true, bf16-mixed or bf16-true with sharded weights, but got "
                f"{precision.precision}."
            )
        if precision.precision == "bf16-true":
            student.to(torch.bfloat16)  # Lightning would convert it only after this, behind FSDP2's back
        narrow = compute[precision.precision]
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=None if narrow is None else torch.float32)
        shells = []
        for model in (teacher, student):
            if model is None:
                continue
            for layer in _layers(model):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            # The teacher's inside the student's: FSDP2 knows one root, and both may have a type of their own.
            shells.append(fully_shard(_Shell(model, *shells), mesh=mesh, mp_policy=policy))
        self.student, self.shells = student, shells[::-1]

    def inside(self, function: Callable[[], T]) -> T:
        """See :meth:`Whole.inside`. Every rank has to call it as often as the others."""
        for shell in reversed(self.shells):
            function = _within(shell, function)
        return function()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """See :meth:`Whole.generation`. All of the student is gathered once, at the beginning."""
        layers = [module for module in self.student.modules() if isinstance(module, FSDPModule)]
        root = self.shells[0]
        root(lambda: None)  # before anything else FSDP2 has to see its root
        for module in (*layers, root):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in (*layers, root):
                module.set_reshard_after_forward(module is not root, recurse=False)
                module.reshard()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """While it lasts, backward passes keep their gradients to themselves."""
        self.shells[0].set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.shells[0].set_requires_gradient_sync(True)


def _within(shell: nn.Module, function: Callable[[], T]) -> Callable[[], T]:
    return lambda: shell(function)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise MisconfigurationException(
            f"Expected {type(model).__name__} to name its layers in `_no_split_modules`, because weights are sharded by layers, "
            "but it names none. Set `trainer.strategy` to ddp."
        )
    return layers


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with what all ranks have of it; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
