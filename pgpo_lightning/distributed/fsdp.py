"""Where the weights live: replicated on every rank, or sharded over the ranks by FSDP2, one layer at a time.

FSDP2 gathers weights around the forward pass of the module that it wraps, and reduces gradients behind that module's outputs.
Our loss uses the embedding and the head outside of any forward pass of the model, so it runs inside the forward pass of a shell.
"""

from abc import ABC, abstractmethod
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
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from pgpo_lightning.core.buffers import keeping_buffers

T = TypeVar("T")


class Placement(ABC):
    """Where the weights of student and teacher live, and how they are made available for a computation.

    Attributes:
        sharded: Whether each rank holds only a slice of every weight.
    """

    sharded: bool

    @abstractmethod
    def run(self, function: Callable[[], T]) -> T:
        """Call a function with all weights that it needs available, and return its result."""

    @abstractmethod
    def generation(self) -> AbstractContextManager[None]:
        """Context in which forward passes of the student need no collectives: its weights stay gathered."""


class Replicated(Placement):
    """Every rank holds all weights."""

    sharded = False

    def run(self, function: Callable[[], T]) -> T:
        """See :meth:`Placement.run`."""
        return function()

    def generation(self) -> AbstractContextManager[None]:
        """See :meth:`Placement.generation`."""
        return nullcontext()


class _Shell(nn.Module):
    """A forward pass for weights used outside of the layers' own forward passes: embedding, last norm, head."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class FullySharded(Placement):
    """Each rank holds a slice of every weight of student and teacher, of its gradient and of the optimizer's state.

    Args:
        student: On any device. Its parameters become ``DTensor``, unless they are shards already.
        teacher: The model of a teacher with weights of its own, or its adapter, or ``None``.
        mesh: One-dimensional, over the data-parallel ranks.
        precision: The trainer's. With bf16-mixed, weights are stored and gradients reduced in fp32, and gathered in bf16.

    Raises:
        MisconfigurationException: If the model does not name its layers, or the precision needs a gradient scaler.
    """

    sharded = True

    def __init__(
        self, student: PreTrainedModel, teacher: nn.Module | None, mesh: DeviceMesh, precision: Precision
    ) -> None:
        compute = {"32-true": None, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
        if precision.precision not in compute:
            raise MisconfigurationException(
                f"Expected `trainer.precision` 32-true, bf16-mixed or bf16-true with sharded weights, but got "
                f"{precision.precision}."
            )
        if precision.precision == "bf16-true":
            # Lightning converts only later, when FSDP2 would not notice.
            student._apply(keeping_buffers(student, lambda t: t.bfloat16() if t.is_floating_point() else t))
        narrow = compute[precision.precision]
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=None if narrow is None else torch.float32)
        shells: list[nn.Module] = []
        for model in (teacher, student):
            if model is None:
                continue
            # An adapter is small: it is gathered at once, for the student's layers to compute with, and in its own type.
            layers = layers_of(model) if isinstance(model, PreTrainedModel) else []
            own = policy if layers else MixedPrecisionPolicy()
            with shards_set_aside(model, on_meta=True):  # it shards whole or empty parameters
                for layer in layers:
                    fully_shard(layer, mesh=mesh, mp_policy=own)
                # The teacher's shell is nested in the student's: FSDP2 has one root, and each may have a dtype of its own.
                shell = _Shell(model, *shells)
                fully_shard(shell, mesh=mesh, mp_policy=own)
            shells.append(shell)
        self.student, self.shells = student, shells[::-1]

    def run(self, function: Callable[[], T]) -> T:
        """See :meth:`Placement.run`. Every rank must call it equally often."""
        for shell in reversed(self.shells):
            function = _within(shell, function)
        return function()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """See :meth:`Placement.generation`. The whole student is gathered once, on entry."""
        root = self.shells[0]
        modules = [module for module in (*self.student.modules(), root) if isinstance(module, FSDPModule)]
        root(lambda: None)  # FSDP2 must run its root before anything else
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(module is not root, recurse=False)
                module.reshard()

    def between_passes(self, reduce: bool | None) -> Callable[[], AbstractContextManager[None]]:
        """Return the context of all backward passes of an optimizer step but the last.

        Args:
            reduce: Whether gradients are reduced over ranks, and sharded, in each of them. ``None``: if what is trained is fp32,
                because reduced gradients have the type of the weights, in which they are summed.
        """
        if reduce is None:
            reduce = next(p.dtype for p in self.student.parameters() if p.requires_grad) == torch.float32
        return nullcontext if reduce else self._accumulating

    @contextmanager
    def _accumulating(self) -> Iterator[None]:
        """Context in which backward passes accumulate whole gradients, in fp32, without reducing them over ranks."""
        root = self.shells[0]
        assert isinstance(root, FSDPModule)  # noqa: S101  (for the type checker: `fully_shard` changed its class)
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)


def _within(shell: Callable[..., T], function: Callable[[], T]) -> Callable[[], T]:
    return lambda: shell(function)


def parameters_at(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return every parameter with its module and its name there; one that is tied several times."""
    return [
        (module, name, own) for module in model.modules() for name, own in module._parameters.items() if own is not None
    ]


@contextmanager
def shards_set_aside(model: nn.Module, *, on_meta: bool = False) -> Iterator[None]:
    """Context in which parameters without memory stand in for shards, with the shapes of the whole ones. They may be frozen.

    Args:
        model: With shards or without.
        on_meta: Whether they are on the meta device, as FSDP2 wants what it takes over, and not on that of the shards.
    """
    shards = [each for each in parameters_at(model) if isinstance(each[2], DTensor)]
    empty: dict[int, nn.Parameter] = {}
    for module, name, shard in shards:
        if id(shard) not in empty:
            if on_meta:
                data = torch.empty(shard.shape, dtype=shard.dtype, device="meta")
            else:
                data = torch.zeros((), dtype=shard.dtype, device=shard.device).expand(shard.shape)
            empty[id(shard)] = nn.Parameter(data, requires_grad=shard.requires_grad)
        module._parameters[name] = empty[id(shard)]
    yield
    for module, name, shard in shards:
        setattr(module, name, shard.requires_grad_(empty[id(shard)].requires_grad))


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model, by which its weights are sharded.

    Raises:
        MisconfigurationException: If it does not name them.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise MisconfigurationException(
            f"Expected {type(model).__name__} to name its layers in `_no_split_modules`, because weights are sharded by layers, "
            "but it names none. Set `trainer.strategy` to ddp."
        )
    return layers


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one. This is a collective operation: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this rank holds, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: DTensor) -> int:
    """Return the number of the first row that this rank holds of a tensor sharded by rows."""
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0]
