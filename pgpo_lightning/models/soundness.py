"""Checks by trial that a model gives the same log-probabilities in every layout: padding, shared prompts, sampling."""

import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.models.decoding import CAPTURED, WAYS, Way
from pgpo_lightning.models.lm_head import damaged, source
from pgpo_lightning.models.loading import evaluating, fp32_by_default, known_tokens, positions
from pgpo_lightning.models.packing import PackedSequences, Packing, Sequences, SharedSequences

Pairs = list[tuple[list[int], list[int]]]
"""Prompts and responses, as token ids."""

Layout = Callable[[PreTrainedModel, Pairs], list[Tensor]]
"""Computes the log-probabilities of response tokens of every pair, in one layout."""

_EXACT, _NEARLY, _NARROW = 1e-3, 2e-2, 0.1
"""Tolerances of log-probabilities (nats): of any token in fp32 on a CPU; of any token in fp32 on a GPU, whose kernels may use
narrower products; of the mean over a response in 16 bits."""
_WIDEN = 3_000_000_000
"""Maximum parameters of a 16-bit model that is compared in fp32, where a fault cannot be confused with rounding."""
_LONGEST = 4096
"""Longest span that is tried (tokens)."""
_WORK, _GPU_WORK = 1e12, 1e15
"""Maximum of parameters times padded tokens in one comparison, so that it takes seconds."""
_ways: "weakref.WeakKeyDictionary[PreTrainedModel, dict[bool, tuple[int, Way]]]" = weakref.WeakKeyDictionary()
_SPANS = re.compile(r"window|chunk|local|block_size|max_distance|topk|budget|rel_extent|mem_len|stride")


def check_padding(model: PreTrainedModel, longest: int) -> None:
    """Check that the log-probabilities of a response do not depend on longer responses in the same batch.

    Args:
        model: Student.
        longest: Maximum tokens of prompt and response together in this run.

    Raises:
        MisconfigurationException: If they do; then no layout of a batch is correct.
    """
    with _comparable(model):
        if not (reason := _failure(model, longest, _padded)):
            _warn_of_untried_lengths(model, longest)
            return
        advice = _length_advice(model, longest, lambda length: _failure(model, length, _padded))
    raise MisconfigurationException(
        f"Expected a response to have the same log-probabilities alone and beside longer responses, but with "
        f"{type(model).__name__} {reason}. This architecture is not supported{advice}: it attends to later tokens, or its output "
        "depends on the length of other sequences."
    )


def shares_prompts(model: PreTrainedModel, longest: int = _LONGEST, trained: bool = True) -> bool:
    """Return whether prompts can be computed once and their keys and values shared by several responses, found by trial.

    It is not possible with a cache that drops tokens (sliding windows), a recurrent state (Mamba), or local attention that counts
    positions in the cache (GPT-Neo). Nor is it while gradients are checkpointed, when transformers drops the cache. The trial
    runs in evaluation mode, as the teacher does, and in training mode, as the student does, unless that mode is random.

    Args:
        model: Student or teacher.
        longest: Maximum tokens of prompt and response together in this run.
        trained: Whether it is run in training mode too.
    """
    if trained and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    with _comparable(model):
        spans = _spans(model.config, longest)
        if any(span > _room(model) for span in spans):
            return False
        return not any(_failure(model, longest, _shared, training) for training in _modes(model, trained))


def concatenates(model: PreTrainedModel, longest: int = _LONGEST) -> str:
    """Return why sequences cannot be concatenated in one row, or an empty text; found by trial.

    It is not possible with a recurrent state (Mamba, linear attention) or a convolution over neighbours, which run on from one
    sequence into the next.

    Args:
        model: Student or teacher.
        longest: Maximum tokens of prompt and response together in this run.
    """
    with _comparable(model):
        if any(span > _room(model) for span in _spans(model.config, longest)):
            return "its local attention is too long for a trial"
        found = (_failure(model, longest, _concatenated, training) for training in _modes(model, trained=True))
        return next(filter(None, found), "")


def _modes(model: PreTrainedModel, trained: bool) -> tuple[bool, ...]:
    return (True, False) if trained and model.training and not _random(model) else (False,)


def way_to_sample(model: PreTrainedModel, longest: int, captured: bool = False) -> Way:
    """Return the fastest way of decoding that gives the model's own log-probabilities. The trial runs once per model.

    Args:
        model: Student.
        longest: Maximum tokens of prompt and response together in this run.
        captured: Whether its step has to be captured as a CUDA graph.

    Raises:
        MisconfigurationException: If there is none.
    """
    ways = _ways.setdefault(model, {})
    tried, known = ways.get(captured, (0, None))
    if known is not None and longest <= tried:
        return known

    def failure(way: Way, length: int) -> str:
        return _failure(model, length, lambda model, pairs: _sampled(model, pairs, way), right=_own)

    with _comparable(model):
        for way in (CAPTURED,) if captured else WAYS:
            reason = failure(way, longest) if way.suits(model) else "not all of its layers are attention through sdpa"
            if not reason:
                ways[captured] = (longest, way)
                return way
        if captured:
            raise MisconfigurationException(
                f"Expected a step of decoding of {type(model).__name__} to work as a CUDA graph, but {reason}. "
                "Set `cuda_graphs` of TransformersEngine to false."
            )
        advice = _length_advice(model, longest, lambda length: failure(WAYS[-1], length))
    raise MisconfigurationException(
        f"Expected tokens of {type(model).__name__} to have the same log-probabilities during sampling and in a single pass, "
        f"but {reason}. This architecture cannot be sampled with TransformersEngine{advice}."
    )


# ---- the layouts that are compared


def _alone(model: PreTrainedModel, pairs: Pairs) -> list[Tensor]:
    """Return the log-probabilities of every response token, one sequence per pass: the reference for the layouts."""
    device = next(model.parameters()).device
    return [_log_probs(model, Sequences.pack([pair], 0, device))[0] for pair in pairs]


def _own(model: PreTrainedModel, pairs: Pairs) -> list[Tensor]:
    """Return the same from the model's own logits: the reference for sampling."""
    found = []
    for prompt, response in pairs:
        ids = torch.tensor([[*prompt, *response]], device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1].float()
        found.append(logits.log_softmax(-1).gather(2, ids[:, len(prompt) :, None])[0, :, 0])
    return found


def _padded(model: PreTrainedModel, pairs: Pairs) -> list[Tensor]:
    return _log_probs(model, Sequences.pack(pairs, 0, next(model.parameters()).device))


def _shared(model: PreTrainedModel, pairs: Pairs) -> list[Tensor]:
    return _log_probs(model, SharedSequences.pack_shared(pairs, 0, next(model.parameters()).device))


def _concatenated(model: PreTrainedModel, pairs: Pairs) -> list[Tensor]:
    packing = Packing(padding_free=True)
    return _log_probs(model, Sequences.pack(pairs, 0, next(model.parameters()).device, packing))


def _log_probs(model: PreTrainedModel, sequences: PackedSequences) -> list[Tensor]:
    result = source(model, sequences)
    log_p = result.head(result.hidden).float().log_softmax(-1).gather(1, sequences.targets.unsqueeze(1)).squeeze(1)
    return list(log_p.split(sequences.lengths.tolist()))


def _sampled(model: PreTrainedModel, pairs: Pairs, way: Way) -> list[Tensor]:
    """Return the log-probabilities during decoding, as if the sampler had drawn the given responses."""
    groups = [list(range(len(pairs)))]
    if not way.padding:
        lengths = [len(prompt) for prompt, _ in pairs]
        groups = [[i for i, length in enumerate(lengths) if length == wanted] for wanted in dict.fromkeys(lengths)]
    found: list[Tensor] = [torch.empty(0)] * len(pairs)
    for group in groups:
        for i, log_p in zip(group, _grown(model, [pairs[i] for i in group], way), strict=True):
            found[i] = log_p
    return found


def _grown(model: PreTrainedModel, pairs: Pairs, way: Way) -> list[Tensor]:
    device = next(model.parameters()).device
    # Each prompt has two equal responses, one of which leaves the batch a token early. So repetition and selection are tried too.
    responses = [response[: len(response) - copy] or response for _, response in pairs for copy in range(2)]
    # The last three begin when others have ended, the first of them beside a sibling.
    begun = len(responses) - 3 if way.refills and len(pairs) > 2 else len(responses)
    decoding = way.start(model, [prompt for prompt, _ in pairs], 2, max(map(len, responses)), begun, trial=True)
    waiting, active = list(range(begun, len(responses))), list(range(begun))
    log_p: list[list[Tensor]] = [[] for _ in responses]
    while active:
        tokens = torch.tensor([responses[i][len(log_p[i])] for i in active], device=device)
        drawn = decoding.logits.float().log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        for i, value in zip(active, drawn, strict=True):
            log_p[i].append(value)
        going = [row for row, i in enumerate(active) if len(log_p[i]) < len(responses[i])]
        new, waiting = (waiting, []) if len(going) < len(active) else ([], waiting)
        if len(going) < len(active) and (going or new):
            decoding.keep(going)
        if going:
            decoding.append(tokens[going])
        if new:
            decoding.join(new)
        active = [active[row] for row in going] + new
    return [_equal_or_nan(torch.stack(log_p[2 * i]), log_p[2 * i + 1]) for i in range(len(pairs))]


def _equal_or_nan(first: Tensor, second: list[Tensor]) -> Tensor:
    """Return the first of two responses, with NaN where the second, which ended earlier, differs."""
    same = torch.stack([*second, *first[len(second) :]])
    return first.masked_fill((first - same).abs() > 0.05, math.nan)


# ---- the comparison


def _failure(
    model: PreTrainedModel,
    longest: int,
    layout: Layout,
    training: bool = False,
    right: Layout = _alone,
) -> str:
    """Return how a layout fails, or an empty text.

    Two sets of tokens are tried, and one agreement is enough: a rounding error that routes a token to another expert depends on
    the tokens, whereas a fault of the layout shows with all.
    """
    reason, exact = "", _exact(model)
    for seed in range(2):
        pairs = _trials(model, longest, seed)
        try:
            with evaluating(model, training), torch.no_grad():
                try:
                    results = [run(model, pairs) for run in (right, layout)]
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # some kernels of linear attention have no fp32 version
                    exact = False
                    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
                        results = [run(model, pairs) for run in (right, layout)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"a trial raised {type(error).__name__}: {' '.join(str(error).split())}"
        if any(values.isnan().any() for values in results[0]):
            raise damaged(type(model).__name__)
        limit = _NARROW
        if exact:  # if all log-probabilities are nearly equal, a fault is small too
            limit = _EXACT if next(model.parameters()).device.type == "cpu" else _NEARLY
            limit *= min(1.0, max(1e-2, float(torch.cat(results[0]).std())))
        gaps = [torch.where(a == b, 0.0, (a - b).abs()) for a, b in zip(*results, strict=True)]
        worst = [float(gap.max() if exact else gap.mean()) for gap in gaps]
        if all(gap <= limit for gap in worst):
            return ""
        reason = f"they differ by {max(worst):.3g} nats"
    return reason


def _length_advice(model: PreTrainedModel, longest: int, failure: Callable[[int], str]) -> str:
    """Return advice if the failure occurs beyond some length only, else an empty text."""
    for span in _spans(model.config, longest):
        if not failure(span):
            return (
                f" beyond {span} tokens of prompt and response (lower `max_response_length` or the limits of prompts)"
            )
    return ""


def _trials(model: PreTrainedModel, longest: int, seed: int) -> Pairs:
    """Return random prompts and responses of uneven lengths, some of which cross the spans of the model's local attention."""
    config = model.config.get_text_config()
    taken = set(_special(config))
    allowed = [i for i in range(min(known_tokens(model), 1000)) if i not in taken] or [0]
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        picked = torch.randint(len(allowed), (length,), generator=generator, device="cpu")
        return [allowed[i] for i in picked.tolist()]

    spans = [span for span in _spans(model.config, longest) if span <= _room(model)]
    longest = max(2, min(longest, positions(config) or longest))
    sizes = [(5, 4), (12, 6), (3, 7), *((max(1, span + more), 8) for span in spans for more in (-4, 9))]
    sizes = [
        (min(prompt, longest - 1), min(response, longest - min(prompt, longest - 1))) for prompt, response in sizes
    ]
    pairs = [(ids(prompt), ids(response)) for prompt, response in sizes]
    return [*pairs, (pairs[0][0], ids(len(pairs[0][1])))]  # two responses to one prompt


def _special(config: PretrainedConfig) -> Iterator[int]:
    """Yield the special tokens of a model."""
    for name, value in config.to_dict().items():
        if "token" in name:
            yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))


def _spans(config: PretrainedConfig, longest: int) -> list[int]:
    """Return the lengths below `longest` at which attention may start to behave differently, at most four."""
    settings: dict[str, Any] = config.get_text_config().to_dict()
    ropes = settings.get("rope_parameters") or {}
    for i, rope in enumerate([ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]):
        if rope.get("rope_type") in ("dynamic", "longrope"):  # frequencies depend on the length of the batch
            settings[f"window of rope {i}"] = rope.get("original_max_position_embeddings") or settings.get(
                "original_max_position_embeddings", settings.get("max_position_embeddings")
            )
    recurrent = any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=config).layers)
    found = {64} if recurrent and longest > 64 else set()  # chunk size of linear attention
    for name, value in settings.items():
        if _SPANS.search(name):
            values = value if isinstance(value, list) else [value]
            found |= {v for v in values if isinstance(v, int) and not isinstance(v, bool) and 8 <= v < longest}
    ordered = sorted(found)
    return ordered if len(ordered) <= 4 else [*ordered[:2], *ordered[-2:]]


def _room(model: PreTrainedModel) -> float:
    """Return the longest span that can be tried in seconds."""
    size = sum(parameter.numel() for parameter in model.parameters())
    rows = 24  # padded, of all trials and layouts
    return min(_LONGEST, (_GPU_WORK if is_gpu(next(model.parameters()).device) else _WORK) / (rows * size))


def _warn_of_untried_lengths(model: PreTrainedModel, longest: int) -> None:
    if untried := [span for span in _spans(model.config, longest) if span > _room(model)]:
        warnings.warn(
            f"The attention of {type(model).__name__} may behave differently beyond {untried[0]} tokens, which would take too "
            "long to try here. `rollout_corr/gap` shows whether sampler and trainer agree there.",
            stacklevel=2,
        )


def _random(model: PreTrainedModel) -> bool:
    """Return whether the model's output is random in training mode."""
    pairs = _trials(model, 16, 0)[:1]
    try:
        with evaluating(model, True), torch.no_grad():
            first, second = _alone(model, pairs), _alone(model, pairs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # then only evaluation mode is tried
        return True
    return any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _exact(model: PreTrainedModel) -> bool:
    """Return whether products are computed in fp32."""
    types = {parameter.dtype for parameter in model.parameters()}
    return types <= {torch.float32, torch.float64} and not getattr(model, "is_quantized", False)


@contextmanager
def _comparable(model: PreTrainedModel) -> Iterator[None]:
    """Context with the model in fp32 and exact products, where that is cheap. Weights and random state are restored.

    Autocast and inference mode of the caller are disabled: they would narrow products, or make weights untrainable.
    """
    before = torch.get_float32_matmul_precision()
    narrow: list[tuple[Tensor, torch.dtype]] = []
    quantized = getattr(model, "is_quantized", False)
    if sum(parameter.numel() for parameter in model.parameters()) <= _WIDEN and not quantized:
        tensors = (*model.parameters(), *model.buffers())
        whole = (tensor for tensor in tensors if not isinstance(tensor, DTensor))  # shards are gathered in fp32
        narrow = [(tensor, tensor.dtype) for tensor in whole if tensor.dtype in (torch.bfloat16, torch.float16)]
    device = next(model.parameters()).device
    gpu = [device] if is_gpu(device) else []
    generators = torch.random.fork_rng(gpu, device_type=device.type if gpu else "cuda")
    plain = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), plain, generators, fp32_by_default():
        try:
            torch.set_float32_matmul_precision("highest")
            for tensor, _ in narrow:
                tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, dtype in narrow:
                tensor.data = tensor.data.to(dtype)
            torch.set_float32_matmul_precision(before)
