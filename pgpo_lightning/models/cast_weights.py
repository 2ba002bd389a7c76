"""Which weights outside of linear layers autocast casts for every token, found by a trial: those of experts, routers, GPT-2."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from pgpo_lightning.models.lm_head import decoder
from pgpo_lightning.models.loading import known_tokens

Place = tuple[nn.Module, str]
"""A module and the name of one of its parameters."""

_PARTS = {"aten::index", "aten::index_select", "aten::clone"}
"""Operations that copy a part of a tensor, so that to cast before or after them is the same. Views are no copies."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_tried: "weakref.WeakKeyDictionary[PreTrainedModel, dict[torch.dtype, list[Place]]]" = weakref.WeakKeyDictionary()


def cast_weights(model: PreTrainedModel, narrow: torch.dtype) -> list[Place]:
    """Return the matrices outside of linear layers that autocast casts to `narrow`, and that nothing else reads.

    It depends on the implementation of the experts: some products are left in the type of the weights. So a few tokens are
    watched, once per model. A model without such matrices is not run.

    Args:
        model: The student, in evaluation mode, in the caller's autocast.
        narrow: The type of autocast.
    """
    known = _tried.setdefault(model, {})
    if narrow not in known:
        head = model.get_output_embeddings()
        candidates = [
            (module, name)
            for module in model.modules()
            if module is not head and not isinstance(module, (nn.Linear, nn.Embedding))
            for name, own in module._parameters.items()
            if own is not None and own.ndim > 1 and own.dtype in _FLOATS and own.dtype != narrow
        ]
        known[narrow] = _only_cast(model, candidates, narrow) if candidates else []
    return known[narrow]


def _only_cast(model: PreTrainedModel, candidates: list[Place], narrow: torch.dtype) -> list[Place]:
    reads = _Reads({_storage(module._parameters[name]): (module, name) for module, name in candidates}, narrow)
    ids = torch.arange(min(8, known_tokens(model)), device=next(model.parameters()).device).unsqueeze(0)
    with torch.no_grad(), reads:
        made = decoder(model)(input_ids=ids, use_cache=True)
        for name in ("past_key_values", "cache_params"):  # a token after a prompt may take another path through a layer
            if (cache := getattr(made, name, None)) is not None:
                decoder(model)(input_ids=ids[:, :1], use_cache=True, **{name: cache})
    return [place for place in candidates if place in reads.cast - reads.other]


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Reads(TorchDispatchMode):
    """Watches which parameters are cast, and which are read in another way.

    Args:
        places: Places of parameters, by storage.
        narrow: The type to which they may be cast.
    """

    def __init__(self, places: dict[int, Place], narrow: torch.dtype) -> None:
        super().__init__()
        self.places, self.narrow = places, narrow
        self.cast: set[Place] = set()
        self.other: set[Place] = set()
        self.parts: list[Tensor] = []  # alive, so that no other tensor gets their storage

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and note the parameters among its arguments."""
        result = function(*args, **(kwargs or {}))
        given = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
        read = {place for tensor in given if (place := self.places.get(_storage(tensor))) is not None}
        if not read or function.is_view or function._schema.name.startswith("prim::"):  # without data, for a device
            return result
        if function._schema.name in _PARTS:
            self.parts.append(result)
            self.places[_storage(result)] = read.pop()
        elif function._schema.name == "aten::_to_copy" and result.dtype == self.narrow:
            self.cast |= read
        else:
            self.other |= read
        return result
