"""Sampling with the model's own forward pass, through transformers."""

import torch
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
            for keys and values.
    """

    repeats = True

    def __init__(self, max_sequences: Count | None = None) -> None:
        self.max_sequences = max_sequences

    def prepare(self, model: PreTrainedModel, longest: int) -> None:
        """See :meth:`Engine.prepare`."""
        way_to_sample(model, longest)

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
        limit = self.max_sequences or max(1, len(questions)) * n
        prompts_at_once, responses_at_once = max(1, limit // n), min(n, limit)
        way = way_to_sample(model, max(map(len, prompts), default=1) + sampling.max_tokens)
        found: list[list[Rollout]] = [[] for _ in questions]
        with evaluating(model), sampling_weights(model):
            for group in _batchable(prompts, way):
                for start in range(0, len(group), prompts_at_once):
                    part = group[start : start + prompts_at_once]
                    batch, batch_prompts = [questions[i] for i in part], [prompts[i] for i in part]
                    for done in range(
                        0, n, responses_at_once
                    ):  # several rounds only if one prompt has too many responses
                        count = min(responses_at_once, n - done)
                        seeds = None if sampling.seeds is None else [sampling.seeds[i] for i in part]
                        streams = seeds and [derive_seed(seed, i) for seed in seeds for i in range(done, done + count)]
                        rollouts = _decode(model, tokenizer, batch, batch_prompts, count, sampling, way, streams)
                        for k, i in enumerate(part):
                            found[i] += rollouts[k * count : (k + 1) * count]
        return [rollout for rollouts in found for rollout in rollouts]


def _batchable(prompts: list[list[int]], way: Way) -> list[list[int]]:
    """Return groups of indices of prompts that may be in one batch."""
    if way.padding:
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    return list(by_length.values())


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    way: Way,
    streams: list[int] | None,
) -> list[Rollout]:
    ends = end_tokens(model, tokenizer)
    tokens, log_probs = _sample(model, prompts, n, sampling, ends, way, streams)
    rollouts = []
    for i, row in enumerate(tokens.tolist()):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), len(row))
        response = row[:length]
        rollouts.append(
            Rollout(
                question=questions[i // n],
                prompt_ids=prompts[i // n],
                response_ids=response,
                # Copied, because a view would keep the whole padded matrix alive.
                log_probs=log_probs[i, :length].clone(),
                text=decode(tokenizer, response, skip_special_tokens=True),
                finished=response[-1] in ends,
            )
        )
    return rollouts


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    n: int,
    sampling: Sampling,
    ends: set[int],
    way: Way,
    streams: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return sampled tokens and their log-probabilities, ``(prompts * n, T)`` each, on the CPU.

    This loop replaces ``generate`` for three reasons. The prompt is computed once for all of its responses. Ended responses leave
    the batch, whereas ``generate`` decodes them until the longest has ended. The log-probability of a token is taken when it is
    drawn, so the logits of all steps need not be kept. Values after the end of a response are undefined.

    `streams` holds a seed per response. Without it torch's global generator is used.

    Raises:
        NotFiniteError: If logits are not finite.
    """
    device = next(model.parameters()).device
    end_ids = torch.tensor(sorted(ends), device=device)
    decoding = way.start(model, prompts, n, sampling.max_tokens)
    total = len(prompts) * n
    tokens = torch.zeros(sampling.max_tokens, total, dtype=torch.int64, device=device)
    log_probs = torch.zeros(sampling.max_tokens, total, device=device)
    active = torch.arange(total, device=device)  # responses that are still in the batch
    seeds = None if streams is None else torch.tensor(streams, device=device)
    ended = torch.zeros(total, dtype=torch.bool, device=device)
    looked, every = 0, look_every(device.type)
    for step in range(sampling.max_tokens):
        logits = decoding.logits.float()  # (active, V)
        p = (logits if sampling.temperature == 1 else logits / sampling.temperature).softmax(-1)
        # Numbers are drawn for all responses, ended or not, so that a response does not depend on when the others end.
        drawn = torch.rand(total, 1, device=device) if seeds is None else uniform(seeds, step).unsqueeze(1)
        token = _draw(p, drawn[active]) if sampling.top_p == 1 else _draw_nucleus(p, drawn[active], sampling.top_p)
        tokens[step, active] = token
        log_probs[step, active] = p.gather(1, token.unsqueeze(1)).squeeze(1).log().masked_fill(ended, 0.0)
        ended |= torch.isin(token, end_ids)
        last = step + 1 == sampling.max_tokens
        if last or step % every == every - 1:
            # In one transfer, because the host waits for a GPU at each.
            seen = torch.cat([ended, log_probs[looked : step + 1].isfinite().all().unsqueeze(0)]).cpu()
            if not seen[-1]:
                raise _not_finite(log_probs[looked : step + 1].cpu(), looked)
            looked = step + 1
            going = (~seen[:-1]).nonzero().squeeze(1)
            if last or not len(going):
                break
            if len(going) <= _WORTH_LEAVING * len(active):
                decoding.keep(going)
                going = going.to(device)
                token, active, ended = token[going], active[going], ended[going]
        decoding.append(token)
    return tokens[: step + 1].T.cpu(), log_probs[: step + 1].T.cpu()


def look_every(device: str) -> int:
    """Return the tokens between two looks for ended responses. On a GPU the host waits for it at each.

    Args:
        device: Type of the device.
    """
    return 1 if device == "cpu" else _LOOK_EVERY


def _not_finite(log_probs: Tensor, first: int) -> NotFiniteError:
    """Return the error for tokens from step `first` on, of which some were drawn from logits that are not finite."""
    bad = ~log_probs.isfinite()
    step = int(bad.any(1).nonzero()[0])
    return NotFiniteError(
        f"Expected finite logits, but token {first + step + 1} of {int(bad[step].sum())} out of {bad.size(1)} responses has "
        "NaN or infinity among them. Either weights are no longer finite (go back to a checkpoint, and lower the learning "
        "rate), or float16 overflows: set `model_config.dtype` to bfloat16 or float32, and `trainer.precision` to bf16-mixed."
    )


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
