"""Sampling with the model's own forward pass, through transformers."""

from collections import deque
from collections.abc import Iterator
from itertools import count

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TopPLogitsWarper

from pgpo_lightning.core.devices import is_gpu
from pgpo_lightning.core.seeding import derive_seed, uniform
from pgpo_lightning.core.settings import Count, checked
from pgpo_lightning.core.types import Question, Rollout
from pgpo_lightning.losses.top_k import likeliest
from pgpo_lightning.models.decoding import Way
from pgpo_lightning.models.loading import decode, evaluating
from pgpo_lightning.models.sampling_weights import sampling_weights
from pgpo_lightning.models.soundness import way_to_sample
from pgpo_lightning.rollout.engine import Engine, NotFiniteError, Sampling, end_tokens

_LOOK_EVERY = 16  # steps between two checks for ended responses on a GPU
_NUCLEUS = (128, 1024)  # on a CPU, numbers of likeliest tokens that are tried before the whole vocabulary is sorted
_ONE = 2**40  # probability 1 where probabilities are integers
_WORTH_LEAVING = 0.75  # if at most this fraction of the responses goes on, copying their keys and values pays off


@checked
class TransformersEngine(Engine):
    """Samples with the model's own forward pass. Each prompt is computed once for all of its responses.

    The way of decoding is found by trial, once per model. By default all prompts are in one batch. Prompts of different lengths
    are separated if padding would enter a recurrent state. The cache is not used if it gives wrong log-probabilities.

    Args:
        max_sequences: Maximum responses decoded at the same time. The whole step at once is fastest; a lower value saves memory
            for keys and values. Others take the places of ended responses, except in models with a recurrent state.
        cuda_graphs: Whether the operations for a token are captured as a CUDA graph and repeated, instead of being started one by
            one by the host. For GPUs, and models whose layers are all attention. Tested on a pretended GPU only.

    Raises:
        MisconfigurationException: If a step cannot be captured, at the start.
    """

    repeats = hands_over = True

    def __init__(self, max_sequences: Count | None = None, cuda_graphs: bool = False) -> None:
        self.max_sequences, self.cuda_graphs = max_sequences, cuda_graphs

    def prepare(self, model: PreTrainedModel, longest: int) -> None:
        """See :meth:`Engine.prepare`."""
        self._way(model, longest)

    def _way(self, model: PreTrainedModel, longest: int) -> Way:
        device = next(model.parameters()).device
        if self.cuda_graphs and not is_gpu(device):
            raise MisconfigurationException(
                f"Expected a GPU for `cuda_graphs` of TransformersEngine, but the model is on {device.type}. Set it to false."
            )
        return way_to_sample(model, longest, self.cuda_graphs)

    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: list[Question],
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
    ) -> list[Rollout]:
        """See :meth:`Engine.generate`."""
        way = self._way(model, max(map(len, prompts), default=1) + sampling.max_tokens)
        ends = end_tokens(model, tokenizer)
        found: dict[int, Rollout] = {}  # by its place in the result
        with evaluating(model), sampling_weights(model):
            for part, first, each, at_once in _batches(prompts, n, way, self.max_sequences):
                streams = None
                if sampling.seeds is not None:
                    responses = range(first, first + each)
                    streams = [derive_seed(sampling.seeds[i], response) for i in part for response in responses]
                batch = [prompts[i] for i in part]
                early = self.receive is not None
                rows = _sample(model, batch, each, sampling, ends, way, streams, at_once, early)
                for k, response, log_probs in rows:
                    i = part[k // each]
                    found[i * n + first + k % each] = rollout = Rollout(
                        question=questions[i],
                        prompt_ids=prompts[i],
                        response_ids=response,
                        log_probs=log_probs,
                        text=decode(tokenizer, response, skip_special_tokens=True),
                        finished=response[-1] in ends,
                    )
                    if self.receive is not None:
                        self.receive(rollout)
        return [found[place] for place in range(len(questions) * n)]


def _batches(
    prompts: list[list[int]], n: int, way: Way, at_once: int | None
) -> Iterator[tuple[list[int], int, int, int]]:
    """Divide the responses into batches, each of which is decoded by itself.

    Args:
        prompts: Token ids.
        n: Responses per prompt.
        way: How they are decoded.
        at_once: Maximum responses that are decoded at the same time; null for all.

    Yields:
        Indices of prompts, the number of the first response to each, the number of responses to each, and how many of them all
        are decoded at the same time.
    """
    limit = at_once or max(1, len(prompts)) * n
    for group in _batchable(prompts, way):
        if way.refills:
            yield group, 0, n, min(limit, len(group) * n)
            continue
        each = max(1, limit // n)
        for start in range(0, len(group), each):
            part = group[start : start + each]
            for done in range(0, n, limit):  # several rounds only if one prompt has too many responses
                number = min(limit, n - done)
                yield part, done, number, len(part) * number


def _batchable(prompts: list[list[int]], way: Way) -> list[list[int]]:
    """Return groups of indices of prompts that may be in one batch."""
    if way.padding:
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    return list(by_length.values())


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    ends: set[int],
    way: Way,
    streams: list[int] | None = None,
    at_once: int | None = None,
    early: bool = False,
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Yield the number of every response, its tokens, and their log-probabilities, on the CPU.

    This loop replaces ``generate`` for three reasons. The prompt is computed once for all of its responses. Ended responses leave
    the batch, and others take their place, whereas ``generate`` decodes them until the longest has ended. The log-probability of
    a token is taken when it is drawn, so the logits of all steps need not be kept.

    Args:
        model: In evaluation mode.
        prompts: Token ids.
        n: Responses per prompt.
        sampling: Temperature and limits.
        ends: Tokens that end a response.
        way: How it is decoded.
        streams: A seed per response. Without it torch's global generator is used.
        at_once: Responses that are decoded at the same time, if `way` refills; null for all.
        early: Whether a response is yielded once its end is seen, which lets the host wait for a GPU once more; otherwise all
            are at the end.

    Raises:
        NotFiniteError: If logits are not finite.
    """
    device = next(model.parameters()).device
    end_ids = torch.tensor(sorted(ends), device=device)
    total = len(prompts) * n
    at_once = at_once or total
    if streams is None and at_once < total:  # numbers that do not depend on when others end
        streams = torch.randint(2**63 - 1, (total,)).tolist()
    decoding = way.start(model, prompts, n, sampling.max_tokens, at_once)
    tokens = torch.zeros(sampling.max_tokens, total, dtype=torch.int64, device=device)
    log_probs = torch.zeros(sampling.max_tokens, total, device=device)
    waiting = deque(range(at_once, total))
    rows = list(range(at_once))  # the response of each row
    begun = [0] * at_once  # the step at which it began
    left = set(range(total))  # responses that are still to be yielded
    active, ages = torch.tensor(rows, device=device), torch.zeros(at_once, dtype=torch.int64, device=device)
    seeds = None if streams is None else torch.tensor(streams, device=device)
    ended = torch.zeros(at_once, dtype=torch.bool, device=device)
    unseen: list[Tensor] = []  # log-probabilities since the last look
    every = look_every(device.type)
    for step in count():
        logits = decoding.logits.float()  # (active, V)
        p = (logits if sampling.temperature == 1 else logits / sampling.temperature).softmax(-1)
        # Numbers are drawn for all responses, ended or not, so that a response does not depend on when the others end.
        number = (
            torch.rand(total, device=device)[active] if seeds is None else uniform(seeds[active], ages)
        ).unsqueeze(1)
        token = _next_token(p, number, sampling.top_p, active, ages)
        drawn = p.gather(1, token.unsqueeze(1)).squeeze(1).log().masked_fill(ended, 0.0)
        tokens[ages, active], log_probs[ages, active] = token, drawn
        unseen.append(drawn)
        ended |= torch.isin(token, end_ids)
        new: list[int] = []
        full = step - min(begun) + 1 == sampling.max_tokens
        if full or step % every == every - 1:
            # In one transfer, because the host waits for a GPU at each.
            seen = torch.cat([ended, torch.stack(unseen).isfinite().all().unsqueeze(0)]).tolist()
            if not seen.pop():
                raise _not_finite(torch.stack(unseen).cpu(), [step - start for start in begun])
            unseen.clear()
            going = [row for row, over in enumerate(seen) if not over and step - begun[row] + 1 < sampling.max_tokens]
            if not going and not waiting:
                break
            if early and (over := left.intersection(rows).difference(rows[row] for row in going)):
                left -= over
                yield from _responses(sorted(over), tokens, log_probs, ends)
            if full or len(going) <= _WORTH_LEAVING * len(begun):
                new = [waiting.popleft() for _ in range(min(len(waiting), at_once - len(going)))]
                rows = [rows[row] for row in going] + new
                begun = [begun[row] for row in going] + [step + 1] * len(new)
                decoding.keep(going)
                kept = torch.tensor(going, dtype=torch.int64, device=device)
                token, active, ages, ended = token[kept], active[kept], ages[kept], ended[kept]
        if len(token):
            decoding.append(token)
        ages = ages + 1
        if new:
            decoding.join(new)
            active = torch.cat([active, torch.tensor(new, device=device)])
            ages, ended = (torch.cat([part, part.new_zeros(len(new))]) for part in (ages, ended))
    yield from _responses(sorted(left), tokens, log_probs, ends)


def _responses(
    which: list[int], tokens: Tensor, log_probs: Tensor, ends: set[int]
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Yield responses with these numbers, from tokens and log-probabilities ``(tokens, responses)``."""
    chosen = torch.tensor(which, dtype=torch.int64, device=tokens.device)
    ids, values = tokens[:, chosen].T.tolist(), log_probs[:, chosen].T.cpu()
    for number, row, log_p in zip(which, ids, values, strict=True):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), len(row))
        # Copied, because a view would keep the whole padded matrix alive.
        yield number, row[:length], log_p[:length].clone()


def look_every(device: str) -> int:
    """Return the tokens between two looks for ended responses. On a GPU the host waits for it at each.

    Args:
        device: Type of the device.
    """
    return 1 if device == "cpu" else _LOOK_EVERY


def _not_finite(log_probs: Tensor, ages: list[int]) -> NotFiniteError:
    """Return the error for log-probabilities of the latest steps, ``(steps, rows)``, some of which are not finite.

    Args:
        log_probs: Of tokens that were drawn.
        ages: Tokens of every row's response before the last of them.
    """
    bad = ~log_probs.isfinite()
    step = int(bad.any(1).nonzero()[0])
    age = ages[int(bad[step].nonzero()[0])] - (len(bad) - 1 - step)
    return NotFiniteError(
        f"Expected finite logits, but token {age + 1} of {int(bad[step].sum())} out of {bad.size(1)} responses has "
        "NaN or infinity among them. Either weights are no longer finite (go back to a checkpoint, and lower the learning "
        "rate), or float16 overflows: set `model_config.dtype` to bfloat16 or float32, and `trainer.precision` to bf16-mixed."
    )


def _next_token(p: Tensor, uniform: Tensor, top_p: float, active: Tensor, ages: Tensor) -> Tensor:
    """Draw a token per row.

    Args:
        p: Probabilities, ``(n, V)``.
        uniform: Random numbers in [0, 1), ``(n, 1)``.
        top_p: In (0, 1].
        active: Response of each row, ``(n,)``; for benchmarks, which set its length.
        ages: Its tokens so far, ``(n,)``; for them too.
    """
    return _draw(p, uniform) if top_p == 1 else _draw_nucleus(p, uniform, top_p)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token per row by inverting the distribution function, on a CPU several times as fast as ``torch.multinomial``.

    Args:
        weights: Probabilities up to a factor, shape ``(n, V)``.
        uniform: Random numbers in [0, 1), shape ``(n, 1)``.
    """
    if _sums_integers(weights.device):
        whole = (weights * _ONE).long().cumsum(-1)  # (n, V)
        reach = ((1 - uniform).double() * whole[:, -1:]).ceil().long()
        return torch.searchsorted(whole, reach).squeeze(1).clamp(max=weights.size(-1) - 1)
    cumulative = weights.cumsum(-1)  # (n, V)
    # 1 - u lies in (0, 1], so a token of probability zero is never the first to reach it.
    place = torch.searchsorted(cumulative, (1 - uniform) * cumulative[:, -1:]).squeeze(1)
    return place.clamp(max=weights.size(-1) - 1)  # with NaN the index is one too large


def _draw_nucleus(p: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Draw a token per row from the smallest set of likeliest tokens whose probabilities sum to at least `top_p`.

    The set is looked for among the likeliest tokens first, because to sort a whole vocabulary takes longer than all the rest.
    Candidates are in the order of the vocabulary, so the same number gives the same token whatever was sorted, up to rounding.

    Args:
        p: Probabilities, shape ``(n, V)``.
        uniform: Random numbers in [0, 1), shape ``(n, 1)``.
        top_p: In (0, 1).
    """
    token = torch.empty(len(p), dtype=torch.int64, device=p.device)
    rows = torch.arange(len(p), device=p.device)  # whose set has not been found yet
    for k in _NUCLEUS:
        # On a GPU a whole sort is fast, and the look for unfinished rows would synchronise host and device.
        if p.device.type != "cpu" or p.size(-1) < 4 * k or not len(rows):
            continue
        ids = likeliest(p[rows], k).sort(-1).values  # (rows, k)
        sorted_p, order = p[rows].gather(-1, ids).sort(-1, descending=True)
        total = sorted_p.cumsum(-1)
        weights = torch.where(total - sorted_p < top_p, sorted_p, 0.0)
        places = _draw(torch.zeros_like(weights).scatter_(-1, order, weights), uniform[rows])
        found = total[:, -1] >= top_p  # not with NaN
        token[rows[found]] = ids[found, places[found]]
        rows = rows[~found]
    if len(rows):
        token[rows] = _draw(_nucleus(p[rows], top_p), uniform[rows])
    return token


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """Return probabilities ``(n, V)`` with those outside of the nucleus set to 0, by sorting the whole vocabulary."""
    if not _sums_integers(p.device):
        return TopPLogitsWarper(top_p)(None, p.log()).exp()
    ordered, order = p.sort(-1, descending=True)
    whole = (ordered * _ONE).long()
    inside = whole.cumsum(-1) - whole < int(top_p * _ONE)
    return torch.zeros_like(p).scatter(-1, order, torch.where(inside, ordered, 0.0))


def _sums_integers(device: torch.device) -> bool:
    """Return whether cumulative sums are taken of integers: CUDA has no deterministic ones of floating-point numbers."""
    return is_gpu(device) and torch.are_deterministic_algorithms_enabled()
